"""The configuration's shape: presets, suites, variants and studies as frozen, strict models.

A preset is model + data + recipe; a variant is one regularizer block; a suite is what is measured. The resolved
configuration of a run is preset + regularizer + seed, so two variants differ in the regularizer block alone.
"""

from __future__ import annotations

from prebench.schema.base import Name, StrictModel
from prebench.schema.data import (
    ColumnsConfig,
    DataConfig,
    EasyVqaConfig,
    LlavaJsonConfig,
    ScenesConfig,
    SourceConfig,
    TableConfig,
)
from prebench.schema.preset import (
    STAGES,
    LanguageModelConfig,
    ModelConfig,
    PresetConfig,
    StageConfig,
    TrainConfig,
    VisionTowerConfig,
)
from prebench.schema.regularizers import (
    Layer,
    LearnedRegularizerConfig,
    NormPenaltyConfig,
    PredictiveConfig,
    RegularizerConfig,
    config_class,
    installed_regularizer,
    layer_names,
    package_of,
)
from prebench.schema.study import StudyConfig
from prebench.schema.suite import AttributeConfig, ProbeConfig, SuiteConfig, SuiteDefaults, TaskConfig
from prebench.schema.variant import VariantConfig

__all__ = [
    "STAGES",
    "AttributeConfig",
    "ColumnsConfig",
    "DataConfig",
    "EasyVqaConfig",
    "LanguageModelConfig",
    "Layer",
    "LearnedRegularizerConfig",
    "LlavaJsonConfig",
    "ModelConfig",
    "Name",
    "NormPenaltyConfig",
    "PredictiveConfig",
    "PresetConfig",
    "ProbeConfig",
    "RegularizerConfig",
    "ScenesConfig",
    "SourceConfig",
    "StageConfig",
    "StrictModel",
    "StudyConfig",
    "SuiteConfig",
    "SuiteDefaults",
    "TableConfig",
    "TaskConfig",
    "TrainConfig",
    "VariantConfig",
    "VisionTowerConfig",
    "config_class",
    "installed_regularizer",
    "layer_names",
    "package_of",
]
