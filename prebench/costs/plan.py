"""The cost of a study: every variant's stages on one kind of machine, and what would make a model fit that does not."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from prebench.costs.lengths import Lengths, stage_lengths
from prebench.costs.stages import Machine, StageCost, external_width, stage_costs, vocabulary
from prebench.model.local_files import local_processor
from prebench.schema import STAGES, PredictiveConfig, PresetConfig, VariantConfig

ROOM = 0.9
"""Share of the memory that may be planned with: CUDA's own context and what lies in pieces need the rest."""


@dataclass(frozen=True)
class VariantCost:
    """What one run of a variant costs."""

    name: str
    stages: Sequence[StageCost]

    @property
    def operations(self) -> float:
        """Return the operations of all stages."""
        return sum(stage.operations for stage in self.stages)

    @property
    def regularizer_share(self) -> float:
        """Return the regularizer's share of the operations."""
        return sum(stage.work["regularizer"].total for stage in self.stages) / self.operations

    @property
    def hours(self) -> float | None:
        """Return the hours of a run; None where no speed is known."""
        seconds = [stage.seconds for stage in self.stages]
        return None if None in seconds else sum(s for s in seconds if s is not None) / 3600

    @property
    def peak(self) -> float:
        """Return the bytes that a process needs at most."""
        return max(stage.memory.peak for stage in self.stages)


@dataclass(frozen=True)
class Plan:
    """What a study costs."""

    preset: PresetConfig
    machine: Machine
    limit: float | None
    """Bytes of one process' memory; None: not asked about."""
    variants: Sequence[VariantCost]
    seeds: int
    exact_rows: bool
    """The tokenizer was there, so that the embeddings' rows are known."""
    remedy: tuple[Sequence[str], float] | None
    """Changes with which all stages fit, and the bytes then; None where they fit already, or nothing suffices."""

    @property
    def largest(self) -> VariantCost:
        """Return the variant that needs the most memory; of equal ones the last."""
        return max(reversed(self.variants), key=lambda variant: variant.peak)

    @property
    def fits(self) -> bool:
        """Tell whether everything fits with room to spare."""
        return self.limit is None or self.largest.peak <= ROOM * self.limit


def plan_costs(
    preset: PresetConfig,
    variants: Sequence[VariantConfig],
    seeds: int,
    machine: Machine,
    limit: float | None,
    text_tokens: Mapping[str, float],
) -> Plan:
    """Return what a study costs.

    Args:
        preset: model, data and recipe.
        variants: their regularizers.
        seeds: how many.
        machine: what trains.
        limit: bytes of one process' memory, if that is asked about.
        text_tokens: mean text tokens per example by stage, instead of measuring.

    Raises:
        ConfigError: a batch can't be shared out.
        DataError: a data file is here and can't be read.
        ModelError: files of the model are here and damaged, or an external anchor's can't be read.
    """
    processor = local_processor(preset.model)
    rows = vocabulary(preset.model, None if processor is None else len(processor.tokenizer))
    names = [name for name in STAGES if getattr(preset.train, name).steps]
    lengths = {name: stage_lengths(preset, name, processor, text_tokens.get(name)) for name in names}
    found = [
        VariantCost(variant.name, stage_costs(preset, variant.regularizer, machine, lengths, rows, _width(variant)))
        for variant in variants
    ]
    plan = Plan(preset, machine, limit, found, seeds, processor is not None, None)
    if plan.fits:
        return plan
    variant = next(v for v in variants if v.name == plan.largest.name)
    return dataclasses.replace(plan, remedy=_remedy(plan, variant, lengths, rows))


def _width(variant: VariantConfig) -> int | None:
    block = variant.regularizer
    external = isinstance(block, PredictiveConfig) and block.anchor_model is not None
    return external_width(Path(str(block.anchor_model))) if external else None  # type: ignore[union-attr]


def _remedy(
    plan: Plan, variant: VariantConfig, lengths: Mapping[str, Lengths], rows: int
) -> tuple[Sequence[str], float] | None:
    """Return the first of the changes, the mildest first, with which the largest variant fits."""
    assert plan.limit is not None, "only what has a limit can be too large"
    for preset, machine, changes in _changes(plan.preset, plan.machine):
        costs = stage_costs(preset, variant.regularizer, machine, lengths, rows, _width(variant))
        peak = max(stage.memory.peak for stage in costs)
        if peak <= ROOM * plan.limit:
            return changes, peak
    return None


def _changes(preset: PresetConfig, machine: Machine) -> Iterator[tuple[PresetConfig, Machine, list[str]]]:
    shardings = [machine]
    if machine.processes > 1 and machine.sharding == "ddp":
        shardings.append(dataclasses.replace(machine, sharding="fsdp"))
    for chosen in shardings:
        for checkpointing in dict.fromkeys((preset.train.gradient_checkpointing, True)):
            for factor in _factors(preset, machine.processes):
                changed, texts = _with(preset, chosen.processes, checkpointing, factor)
                if chosen != machine:
                    texts = ["--sharding fsdp", *texts]
                if texts:
                    yield changed, chosen, texts


def _factors(preset: PresetConfig, processes: int) -> Iterator[int]:
    """Yield by how much the micro-batches of all stages can be divided, in powers of two."""
    factor = 1
    stages = [getattr(preset.train, name) for name in STAGES if getattr(preset.train, name).steps]
    while any(s.batch_size % (s.gradient_accumulation_steps * processes * factor) == 0 for s in stages):
        yield factor
        factor *= 2


def _with(preset: PresetConfig, processes: int, checkpointing: bool, factor: int) -> tuple[PresetConfig, list[str]]:
    """Return the recipe with smaller micro-batches, where a stage's can be divided so, and what that is to write."""
    values: dict[str, Any] = {"gradient_checkpointing": checkpointing}
    texts = [] if checkpointing == preset.train.gradient_checkpointing else ["train.gradient_checkpointing=true"]
    for name in STAGES:
        stage = getattr(preset.train, name)
        steps = stage.gradient_accumulation_steps * factor
        if stage.steps and factor > 1 and stage.batch_size % (steps * processes) == 0:
            values[name] = stage.model_copy(update={"gradient_accumulation_steps": steps})
            texts.append(f"train.{name}.gradient_accumulation_steps={steps}")
    train = preset.train.model_copy(update=values)
    return preset.model_copy(update={"train": train}), [f"--set {text}" for text in texts]
