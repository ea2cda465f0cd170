"""A study: preset x suite x variants x seeds."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import Field, model_validator

from prebench.schema.base import StrictModel, require_distinct
from prebench.schema.preset import PresetConfig, StageConfig
from prebench.schema.regularizers import PredictiveConfig, layer_names
from prebench.schema.suite import SuiteConfig
from prebench.schema.variant import VariantConfig


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
        require_distinct("variant", [v.name for v in self.variants])
        require_distinct("seed", [str(seed) for seed in self.seeds])
        self._require_independent()
        depth = self.preset.model.language_model.num_hidden_layers
        for variant in self.variants:
            for layer in layer_names(variant.regularizer.layer) if variant.regularizer else ():
                if isinstance(layer, int) and not 1 <= layer <= depth:
                    raise ValueError(
                        f"variant {variant.name}: regularizer.layer {layer} lies outside 1..{depth}, the decoder "
                        f"layers of preset {self.preset.name}"
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
            "train": self.preset.train.model_dump(mode="json", exclude={"checkpoint_every", "snapshots"}),
            "regularizer": None if chosen.regularizer is None else chosen.regularizer.model_dump(mode="json"),
            "seed": self.training_seed(variant, seed),
        }
