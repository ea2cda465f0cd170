"""The configuration's shape: presets, suites, variants and studies as frozen, strict models.

A preset is model + data + recipe; a variant is one regularizer block; a suite is what is measured. The resolved
configuration of a run is preset + regularizer + seed, so two variants differ in the regularizer block alone.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator


class StrictModel(BaseModel):
    """Immutable; unknown keys are errors."""

    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=())


# --- variant -------------------------------------------------------------------------------------------------


Layer = Literal["quarter", "half", "three_quarters", "last"] | int
"""Decoder layer l: a fraction of the depth, or 1..L."""


class PredictiveConfig(StrictModel):
    """Predictive Regularization (arXiv 2603.20808), its ablations and two of its controls."""

    type: Literal["predictive"] = "predictive"
    weight: float = Field(0.0, ge=0)
    """lambda in L_LM + lambda * L_PRe; 0 is the baseline, which only logs the loss of a detached predictor."""
    layer: Layer = "half"
    """Decoder layer l whose input is predicted from."""
    anchor: Literal["pre_llm", "pre_projector", "shuffled", "frozen_copy"] = "pre_llm"
    """What is predicted, never with gradient: h_v^0 (the projector's output), the vision tower's output, h_v^0 of
    another image of the micro-batch, or h_v^0 as the projector of the stage's start makes it."""
    level: Literal["patch", "global"] = "patch"
    """Cosine per visual token, or of their mean."""
    hidden_size: int | None = Field(None, gt=0)
    """Width of the predictor's hidden layer; the LM's width where null."""
    learning_rate: float = Field(1e-3, gt=0)
    """Of the predictor's own optimiser (constant)."""
    max_grad_norm: float = Field(1.0, gt=0)
    """Clipping of the predictor's gradients, apart from the model's."""


class NormPenaltyConfig(StrictModel):
    """A penalty on the same states that knows nothing of the image: control of PRe. It has no predictor."""

    type: Literal["norm_penalty"] = "norm_penalty"
    weight: float = Field(0.0, ge=0)
    """lambda in L_LM + lambda * L_norm; 0 only logs the loss."""
    layer: Layer = "half"
    """Decoder layer l whose input's length is held."""

    @model_validator(mode="before")
    @classmethod
    def _no_option_of_the_predictor(cls, values: Any) -> Any:
        given = set(values) if isinstance(values, Mapping) else set()
        meaningless = [name for name in PredictiveConfig.model_fields if name in given - set(cls.model_fields)]
        if meaningless:
            raise ValueError(
                f"{', '.join(meaningless)}: no meaning for type norm_penalty; leave them out, and don't extend a "
                "variant of another type"
            )
        return values


_REGULARIZERS: dict[str, type[StrictModel]] = {"predictive": PredictiveConfig, "norm_penalty": NormPenaltyConfig}


def _of_its_type(values: Any) -> Any:
    """Build the block's own class; pydantic's tagged unions would put the tag into the path of every error."""
    if isinstance(values, StrictModel):
        return values
    if not isinstance(values, Mapping):
        raise ValueError("a mapping with type, weight and layer is expected")
    kind = values.get("type", "predictive")
    if not isinstance(kind, str) or kind not in _REGULARIZERS:
        raise ValueError(f"unknown type {kind!r}; known: {', '.join(_REGULARIZERS)}")
    return _REGULARIZERS[kind].model_validate(values)


RegularizerConfig = Annotated[NormPenaltyConfig | PredictiveConfig, BeforeValidator(_of_its_type)]
"""The one block in which variants differ; `type` decides which of the two it is."""


Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")]
"""A name that is a folder's name, too."""


class VariantConfig(StrictModel):
    """A training objective: a name and its regularizer (null: none at all, not even logged)."""

    name: Name
    description: str = ""
    regularizer: RegularizerConfig | None
    seed_offset: int = Field(0, ge=0)
    """The same objective with other randomness: seed s trains with s + offset in initialisation and data order."""


# --- preset --------------------------------------------------------------------------------------------------


class ScenesConfig(StrictModel):
    """Generated scenes for training (prebench.data.scenes)."""

    num_images: int = Field(gt=0)
    questions_per_image: int = Field(gt=0)
    """Turns in one conversation."""
    min_objects: int = Field(2, ge=1)
    max_objects: int = Field(5, ge=1, le=9)

    @model_validator(mode="after")
    def _ordered(self) -> ScenesConfig:
        if self.min_objects > self.max_objects:
            raise ValueError(f"min_objects {self.min_objects} is larger than max_objects {self.max_objects}")
        return self


class EasyVqaConfig(StrictModel):
    """The training split of easy-VQA (real, from its PyPI package)."""

    num_images: int = Field(3600, gt=0, le=3600)
    """The split's last 400 pictures are held out as validation."""
    questions_per_image: int = Field(6, gt=0)


class DataConfig(StrictModel):
    """What a model is trained on."""

    seed: int = Field(0, ge=0)
    """Seed of the generated training data: the same for all runs of a study."""
    scenes: ScenesConfig | None = None
    easy_vqa: EasyVqaConfig | None = None
    suffix_share: float = Field(0.5, ge=0, le=1)
    """Share of the questions that carry the benchmarks' answer-format suffix."""

    @model_validator(mode="after")
    def _some_source(self) -> DataConfig:
        if self.scenes is None and self.easy_vqa is None:
            raise ValueError("name at least one source: scenes or easy_vqa")
        return self


def _require_multiple(name: str, value: int, of: str, divisor: int) -> None:
    if value % divisor:
        raise ValueError(f"{name} {value} is no multiple of {of} ({divisor})")


class VisionTowerConfig(StrictModel):
    """The vision tower: shipped with the package, a local folder, or built from scratch for tests."""

    pretrained: str | None = "embedded"
    """`embedded` (ships with prebench), a local Hugging Face folder, or null for random weights."""
    hidden_size: int = Field(128, gt=0)
    num_hidden_layers: int = Field(3, gt=0)
    num_attention_heads: int = Field(4, gt=0)
    intermediate_size: int = Field(512, gt=0)
    image_size: int = Field(96, gt=0)
    patch_size: int = Field(16, gt=0)

    @model_validator(mode="after")
    def _divisible(self) -> VisionTowerConfig:
        _require_multiple("hidden_size", self.hidden_size, "num_attention_heads", self.num_attention_heads)
        _require_multiple("image_size", self.image_size, "patch_size", self.patch_size)
        return self


class LanguageModelConfig(StrictModel):
    """A small Llama; from scratch its initial scale decides whether it learns (docs/experiments.md)."""

    pretrained: str | None = None
    """`embedded` (ships with prebench), a local Hugging Face folder, or null for random weights."""
    hidden_size: int = Field(64, gt=0)
    num_hidden_layers: int = Field(6, gt=0)
    num_attention_heads: int = Field(4, gt=0)
    intermediate_size: int = Field(192, gt=0)
    max_position_embeddings: int = Field(1024, gt=0)
    initializer_range: float = Field(0.1, gt=0)
    embedding_std: float = Field(0.3, gt=0)

    @model_validator(mode="after")
    def _divisible(self) -> LanguageModelConfig:
        # Rotary embeddings turn pairs of dimensions, so a head's width is even.
        _require_multiple("hidden_size", self.hidden_size, "2 * num_attention_heads", 2 * self.num_attention_heads)
        return self


class ModelConfig(StrictModel):
    """A LlavaForConditionalGeneration of a vision tower, a two-layer projector and a causal LM."""

    vision_tower: VisionTowerConfig = VisionTowerConfig()
    language_model: LanguageModelConfig = LanguageModelConfig()
    projector_std: float = Field(1.0, gt=0)
    """Standard deviation of the projector's output at the start."""


class StageConfig(StrictModel):
    """One training stage."""

    steps: int = Field(ge=0)
    batch_size: int = Field(gt=0)
    """Examples per optimiser step, over all processes and accumulation steps."""
    gradient_accumulation_steps: int = Field(1, gt=0)
    learning_rate: float = Field(gt=0)
    warmup_steps: int = Field(0, ge=0)
    weight_decay: float = Field(0.0, ge=0)
    max_grad_norm: float = Field(1.0, gt=0)
    trainable: tuple[Literal["vision_tower", "multi_modal_projector", "language_model"], ...] = Field(
        ("multi_modal_projector", "language_model"), min_length=1
    )
    """Parts whose weights move; LLaVA's align stage trains the projector alone, on a pretrained LM."""
    caption_share: float = Field(0.0, ge=0, le=1)
    """Share of the examples that are captions instead of questions."""

    @model_validator(mode="after")
    def _divisible(self) -> StageConfig:
        if self.batch_size % self.gradient_accumulation_steps:
            raise ValueError("batch_size must be a multiple of gradient_accumulation_steps")
        return self


class TrainConfig(StrictModel):
    """The recipe: LLaVA's two stages."""

    align: StageConfig
    instruct: StageConfig
    log_every: int = Field(10, gt=0)
    validate_every: int = Field(0, ge=0)
    """Optimiser steps between two points of the learning curves (held-out loss and accuracy); 0: none."""
    validation_images: int = Field(60, gt=0)
    """Pictures of each source that the learning curves ask about."""
    cache_vision_features: bool = True
    """Compute the frozen tower's output once per study, in float32."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    cpu_threads: int | None = Field(None, gt=0)
    """Threads of one run on a CPU; null: all cores. Small models gain more from several runs side by side."""


class PresetConfig(StrictModel):
    """Model + data + recipe."""

    name: Name
    description: str = ""
    model: ModelConfig = ModelConfig()
    data: DataConfig
    train: TrainConfig


def _require_distinct(what: str, names: Sequence[str]) -> None:
    for name in names:
        if names.count(name) > 1:
            raise ValueError(f"{what} {name!r} is named twice")


# --- suite ---------------------------------------------------------------------------------------------------


class TaskConfig(StrictModel):
    """One column of the tables: an lmms-eval task and how prebench reads it."""

    task: str
    """lmms-eval's task id."""
    label: str
    """Column title; names generated data as such."""
    data_source: Literal["generated", "real"]
    primary_metric: str
    """The metric of the task's own aggregation that the tables show."""
    num_images: int = Field(gt=0)
    """Images in the embedded mirror (easy-VQA: of the real test split, at most 1000)."""
    questions_per_image: int = Field(8, gt=0)


class AttributeConfig(StrictModel):
    """One attribute that the linear probes decode."""

    name: str
    kind: Literal["asked", "unasked", "rare"]
    """Mentioned in questions; in no text at all; in 2% of the questions."""


class ProbeConfig(StrictModel):
    """The internal visual probe: an lmms-eval task of ours."""

    task: str = "prebench_visual_probe"
    num_train: int = Field(gt=0)
    num_val: int = Field(gt=0)
    num_test: int = Field(gt=0)
    attributes: tuple[AttributeConfig, ...]
    reference_attribute: str
    """The attribute on which degradation is defined; fixed before a run."""

    @model_validator(mode="after")
    def _reference_is_known(self) -> ProbeConfig:
        names = [attribute.name for attribute in self.attributes]
        if self.reference_attribute not in names:
            raise ValueError(f"reference_attribute {self.reference_attribute!r} is none of {', '.join(names)}")
        return self


class SuiteDefaults(StrictModel):
    """What `prebench run --suite S` takes where the command line is silent."""

    preset: str
    variants: tuple[str, ...] = ("baseline", "pre")
    seeds: tuple[int, ...] = (0,)


class SuiteConfig(StrictModel):
    """What is measured."""

    name: Name
    description: str = ""
    defaults: SuiteDefaults
    mirror_seed: int = Field(0, ge=0)
    tasks: tuple[TaskConfig, ...]
    probe: ProbeConfig | None = None
    max_error_share: float = Field(0.01, ge=0, le=1)
    """A task with a larger share of failed documents is no result."""

    @model_validator(mode="after")
    def _distinct_tasks(self) -> SuiteConfig:
        _require_distinct("task", self.task_names)
        return self

    @property
    def task_names(self) -> list[str]:
        """Return the lmms-eval ids, the probe last."""
        return [t.task for t in self.tasks] + ([self.probe.task] if self.probe else [])


def _require_another_image(variant: VariantConfig, preset: PresetConfig) -> None:
    if not (isinstance(variant.regularizer, PredictiveConfig) and variant.regularizer.anchor == "shuffled"):
        return
    for name in ("align", "instruct"):
        stage: StageConfig = getattr(preset.train, name)
        size = stage.batch_size // stage.gradient_accumulation_steps
        if stage.steps > 0 and size < 2:
            raise ValueError(
                f"variant {variant.name}: anchor shuffled takes another image of the micro-batch, so "
                f"train.{name}.batch_size / gradient_accumulation_steps must be at least 2 (is {size})"
            )


class StudyConfig(StrictModel):
    """A study: preset x suite x variants x seeds; `study.yaml`."""

    name: str
    preset: PresetConfig
    suite: SuiteConfig
    variants: tuple[VariantConfig, ...]
    seeds: tuple[Annotated[int, Field(ge=0)], ...]

    @model_validator(mode="after")
    def _consistent(self) -> StudyConfig:
        _require_distinct("variant", [v.name for v in self.variants])
        _require_distinct("seed", [str(seed) for seed in self.seeds])
        self._require_independent()
        depth = self.preset.model.language_model.num_hidden_layers
        for variant in self.variants:
            layer = variant.regularizer.layer if variant.regularizer else 1
            if isinstance(layer, int) and not 1 <= layer <= depth:
                raise ValueError(
                    f"variant {variant.name}: regularizer.layer {layer} lies outside 1..{depth}, the decoder layers of "
                    f"preset {self.preset.name}"
                )
            _require_another_image(variant, self.preset)
        return self

    def training_seed(self, variant: str, seed: int) -> int:
        """Return the seed that decides initialisation and data order of a run: seed plus the variant's offset."""
        return seed + next(v.seed_offset for v in self.variants if v.name == variant)

    def _require_independent(self) -> None:
        """Refuse two runs that would be one and the same model: an A/A comparison of a model with itself."""
        seen: dict[tuple[Any, int], VariantConfig] = {}
        for variant in self.variants:
            for seed in self.seeds:
                number = seed + variant.seed_offset
                other = seen.setdefault((variant.regularizer, number), variant)
                if other.name != variant.name and other.seed_offset != variant.seed_offset:
                    both = (
                        f"variants {other.name} and {variant.name} would both train the same model with seed {number}"
                    )
                    raise ValueError(f"seeds: {both} (seed_offset); choose seeds that lie apart")

    def run_config(self, variant: str, seed: int) -> dict[str, Any]:
        """Return the resolved configuration of one run: everything that decides its weights."""
        chosen = next(v for v in self.variants if v.name == variant)
        return {
            "model": self.preset.model.model_dump(mode="json"),
            "data": self.preset.data.model_dump(mode="json"),
            "train": self.preset.train.model_dump(mode="json"),
            "regularizer": None if chosen.regularizer is None else chosen.regularizer.model_dump(mode="json"),
            "seed": self.training_seed(variant, seed),
        }
