"""Strict YAML to frozen models: presets, suites and variants, `extends`, `--set`, and the diff of two configs.

A preset is model + data + recipe; a variant is one regularizer block; a suite is what is measured. The resolved
configuration of a run is preset + regularizer + seed, so two variants differ in the regularizer block alone.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, TypeVar

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from prebench.errors import ConfigError, did_you_mean
from prebench.runtime import data_dir


class StrictModel(BaseModel):
    """Immutable; unknown keys are errors."""

    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=())


ModelT = TypeVar("ModelT", bound=StrictModel)


# --- variant -------------------------------------------------------------------------------------------------


class RegularizerConfig(StrictModel):
    """The one block in which variants differ."""

    type: Literal["predictive"] = "predictive"
    weight: float = Field(0.0, ge=0)
    """lambda in L_LM + lambda * L_PRe; 0 is the baseline, which only logs the loss of a detached predictor."""
    layer: Literal["quarter", "half", "three_quarters", "last"] | int = "half"
    """Decoder layer l whose input is predicted from: a fraction of the depth, or 1..L."""
    anchor: Literal["pre_llm", "pre_projector"] = "pre_llm"
    """What is predicted: h_v^0 (the projector's output) or the vision tower's output; never with gradient."""
    level: Literal["patch", "global"] = "patch"
    """Cosine per visual token, or of their mean."""
    hidden_size: int | None = Field(None, gt=0)
    """Width of the predictor's hidden layer; the LM's width where null."""
    learning_rate: float = Field(1e-3, gt=0)
    """Of the predictor's own optimiser (constant)."""
    max_grad_norm: float = Field(1.0, gt=0)
    """Clipping of the predictor's gradients, apart from the model's."""


class VariantConfig(StrictModel):
    """A training objective: a name and its regularizer (null: none at all, not even logged)."""

    name: str
    description: str = ""
    regularizer: RegularizerConfig | None


# --- preset --------------------------------------------------------------------------------------------------


class ScenesConfig(StrictModel):
    """Generated scenes for training (prebench.data.scenes)."""

    num_images: int = Field(gt=0)
    questions_per_image: int = Field(gt=0)
    """Turns in one conversation."""
    min_objects: int = Field(2, ge=1)
    max_objects: int = Field(5, ge=1, le=16)


class EasyVqaConfig(StrictModel):
    """The training split of easy-VQA (real, from its PyPI package)."""

    num_images: int = Field(4000, gt=0, le=4000)
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


class VisionTowerConfig(StrictModel):
    """The vision tower: shipped with the package, a local folder, or built from scratch for tests."""

    pretrained: str | None = "embedded"
    """`embedded` (ships with prebench), a local Hugging Face folder, or null for random weights."""
    hidden_size: int = Field(128, gt=0)
    num_hidden_layers: int = Field(3, gt=0)
    num_attention_heads: int = Field(4, gt=0)
    intermediate_size: int = Field(512, gt=0)
    image_size: int = Field(64, gt=0)
    patch_size: int = Field(8, gt=0)


class LanguageModelConfig(StrictModel):
    """A small Llama, from scratch (its initial scale decides whether it learns: docs/experiments.md)."""

    hidden_size: int = Field(96, gt=0)
    num_hidden_layers: int = Field(6, gt=0)
    num_attention_heads: int = Field(4, gt=0)
    intermediate_size: int = Field(256, gt=0)
    max_position_embeddings: int = Field(1024, gt=0)
    initializer_range: float = Field(0.1, gt=0)
    embedding_std: float = Field(0.3, gt=0)


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
    trainable: tuple[Literal["vision_tower", "multi_modal_projector", "language_model"], ...] = (
        "multi_modal_projector",
        "language_model",
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
    cache_vision_features: bool = True
    """Compute the frozen tower's output once per study (same numbers, fewer seconds)."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"


class PresetConfig(StrictModel):
    """Model + data + recipe."""

    name: str
    description: str = ""
    model: ModelConfig = ModelConfig()
    data: DataConfig
    train: TrainConfig


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

    name: str
    description: str = ""
    defaults: SuiteDefaults
    mirror_seed: int = Field(0, ge=0)
    tasks: tuple[TaskConfig, ...]
    probe: ProbeConfig | None = None
    max_error_share: float = Field(0.01, ge=0, le=1)
    """A task with a larger share of failed documents is no result."""

    @property
    def task_names(self) -> list[str]:
        """Return the lmms-eval ids, the probe last."""
        return [t.task for t in self.tasks] + ([self.probe.task] if self.probe else [])


class StudyConfig(StrictModel):
    """A study: preset x suite x variants x seeds; `study.yaml`."""

    name: str
    preset: PresetConfig
    suite: SuiteConfig
    variants: tuple[VariantConfig, ...]
    seeds: tuple[int, ...]

    def run_config(self, variant: str, seed: int) -> dict[str, Any]:
        """Return the resolved configuration of one run: everything that decides its weights."""
        chosen = next(v for v in self.variants if v.name == variant)
        return {
            "model": self.preset.model.model_dump(mode="json"),
            "data": self.preset.data.model_dump(mode="json"),
            "train": self.preset.train.model_dump(mode="json"),
            "regularizer": None if chosen.regularizer is None else chosen.regularizer.model_dump(mode="json"),
            "seed": seed,
        }


# --- reading -------------------------------------------------------------------------------------------------

KINDS: dict[str, type[StrictModel]] = {
    "presets": PresetConfig,
    "suites": SuiteConfig,
    "variants": VariantConfig,
}


def list_configs(kind: str) -> list[str]:
    """Return the names of the shipped `presets`, `suites` or `variants`."""
    return sorted(path.stem for path in (data_dir("configs") / kind).glob("*.yaml"))


def load_preset(name_or_path: str, overrides: Sequence[str] = ()) -> PresetConfig:
    """Load a preset by name or by the path of a YAML file, then apply `a.b=c` overrides."""
    return _load(PresetConfig, "presets", name_or_path, overrides)


def load_suite(name_or_path: str) -> SuiteConfig:
    """Load a suite by name or path."""
    return _load(SuiteConfig, "suites", name_or_path)


def load_variant(name_or_path: str) -> VariantConfig:
    """Load a variant by name or path."""
    return _load(VariantConfig, "variants", name_or_path)


def _load(model: type[ModelT], kind: str, name_or_path: str, overrides: Sequence[str] = ()) -> ModelT:
    path = _find(kind, name_or_path)
    values = _read_with_extends(path, kind)
    values.setdefault("name", path.stem)
    for override in overrides:
        _apply_override(values, override, model)
    where = str(path) + (" with --set" if overrides else "")
    return validate(model, values, where)


def _find(kind: str, name_or_path: str) -> Path:
    if name_or_path.endswith((".yaml", ".yml")):
        path = Path(name_or_path)
        if not path.is_file():
            raise ConfigError(f"{path}: no such file")
        return path
    known = list_configs(kind)
    if name_or_path not in known:
        raise ConfigError(f"unknown {kind[:-1]} {name_or_path!r}{did_you_mean(name_or_path, known)}")
    return data_dir("configs") / kind / f"{name_or_path}.yaml"


def read_yaml(path: Path) -> dict[str, Any]:
    """Read a YAML mapping.

    Raises:
        ConfigError: the file is no readable YAML mapping; line and column are named.
    """
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark
        where = f":{mark.line + 1}:{mark.column + 1}" if mark else ""
        raise ConfigError(f"{path}{where}: malformed YAML: {error.problem}") from error
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ConfigError(f"{path}: can't be read: {error}") from error
    if not isinstance(values, dict) or not all(isinstance(key, str) for key in values):
        raise ConfigError(f"{path}: a mapping of names to values is expected at the top level")
    return values


def _read_with_extends(path: Path, kind: str) -> dict[str, Any]:
    values = read_yaml(path)
    base = values.pop("extends", None)
    if base is None:
        return values
    base_path = _find(kind, str(base))
    base_values = read_yaml(base_path)
    if "extends" in base_values:
        raise ConfigError(f"{path}: extends {base!r}, which extends another file; one level is allowed")
    base_values.pop("name", None)
    return _merge(base_values, values)


def _merge(base: Mapping[str, Any], top: Mapping[str, Any]) -> dict[str, Any]:
    merged = dict(base)
    for key, value in top.items():
        if isinstance(value, dict) and isinstance(merged.get(key), dict):
            merged[key] = _merge(merged[key], value)
        else:
            merged[key] = value
    return merged


def _apply_override(values: dict[str, Any], override: str, model: type[StrictModel]) -> None:
    key, separator, text = override.partition("=")
    if not separator or not key:
        raise ConfigError(f"--set {override!r}: write it as section.field=value")
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ConfigError(f"--set {override!r}: the value is no YAML ({error})") from error
    target = values
    *sections, field = key.split(".")
    for section in sections:
        target = target.setdefault(section, {})
        if not isinstance(target, dict):
            raise ConfigError(f"--set {override!r}: {section!r} is a value, not a section")
    target[field] = value


def validate(model: type[ModelT], values: Mapping[str, Any], where: str) -> ModelT:
    """Build a config model; every problem becomes part of one ConfigError line that names file and field."""
    try:
        return model.model_validate(values)
    except ValidationError as error:
        problems = [_describe(model, problem) for problem in error.errors()]
        raise ConfigError(f"{where}: {'; '.join(problems)}") from error


def _describe(model: type[StrictModel], problem: Mapping[str, Any]) -> str:
    location = [str(part) for part in problem["loc"]]
    field = ".".join(location) or "top level"
    if problem["type"] == "extra_forbidden":
        known = _fields_at(model, location[:-1])
        return f"unknown key {field!r}{did_you_mean(location[-1], known)}"
    if problem["type"] == "missing":
        return f"the key {field!r} is missing"
    message = str(problem["msg"]).removeprefix("Value error, ")
    return f"{field}: {message} (got {problem['input']!r})" if location else message


def _fields_at(model: type[StrictModel], location: Sequence[str]) -> list[str]:
    current: type[BaseModel] = model
    for part in location:
        if part.isdigit():
            continue
        nested = _nested_model(current, part)
        if nested is None:
            return []
        current = nested
    return list(current.model_fields)


def _nested_model(model: type[BaseModel], field: str) -> type[BaseModel] | None:
    info = model.model_fields.get(field)
    pending: list[Any] = [info.annotation] if info else []
    while pending:
        candidate = pending.pop()
        if isinstance(candidate, type) and issubclass(candidate, BaseModel):
            return candidate
        pending.extend(getattr(candidate, "__args__", ()))
    return None


def dump_yaml(model: StrictModel) -> str:
    """Return a config as YAML text that `validate` reads back to an equal config."""
    return yaml.safe_dump(model.model_dump(mode="json"), sort_keys=False, allow_unicode=True)


def diff(old: Any, new: Any, prefix: str = "") -> Iterator[str]:
    """Yield one line per leaf that differs: `train.instruct.steps: 700 -> 800`."""
    if isinstance(old, Mapping) and isinstance(new, Mapping):
        for key in [*old, *(k for k in new if k not in old)]:
            path = f"{prefix}.{key}" if prefix else str(key)
            yield from diff(old.get(key, "(absent)"), new.get(key, "(absent)"), path)
    elif old != new:
        yield f"{prefix}: {old} -> {new}"
