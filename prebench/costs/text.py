"""A plan as text, with everything that it assumes, and as JSON."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

from prebench.costs.plan import ROOM, Plan, VariantCost
from prebench.costs.stages import PREDICTOR, StageCost
from prebench.schema import NormPenaltyConfig, PredictiveConfig, VariantConfig

BYTES = {"MB": 1e6, "GB": 1e9}
FLOP = {"TFLOP": 1e12, "PFLOP": 1e15}
LABEL, COLUMN = 34, 18
Row = tuple[str, Callable[[StageCost], str]]


def render(plan: Plan, machine: str, assumptions: Sequence[str]) -> str:
    """Return the plan as text.

    Args:
        plan: what a study costs.
        machine: in words.
        assumptions: that the caller made.
    """
    shown = plan.largest
    blocks = [f"{plan.preset.name} on {machine}", *_stages(plan, shown), *_memory(plan, shown), *_work(shown)]
    lines = [*blocks, "", *_study(plan), "", "assumptions"]
    return "\n".join([*lines, *(f"- {text}" for text in (*assumptions, *_assumptions(plan)))])


def _table(title: str, stages: Sequence[StageCost], rows: Sequence[Row]) -> list[str]:
    lines = ["", title.ljust(LABEL) + "".join(stage.name.rjust(COLUMN) for stage in stages)]
    for name, value in rows:
        lines.append(f"  {name}".ljust(LABEL) + "".join(value(stage).rjust(COLUMN) for stage in stages))
    return lines


def _unit(units: dict[str, float], largest: float) -> tuple[str, float]:
    """Return the largest unit in which a number is at least 1, or the smallest."""
    fitting = [(name, size) for name, size in units.items() if largest >= size]
    return fitting[-1] if fitting else next(iter(units.items()))


def _number(value: float) -> str:
    """Return three digits, without an exponent."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}" if value >= 0.001 else f"{value:.1g}" if value else "0"


def _stages(plan: Plan, variant: VariantCost) -> list[str]:
    visual = plan.preset.model.vision_tower.num_tokens
    rows: list[Row] = [
        ("steps x examples", lambda s: f"{s.steps:,} x {s.batch_size}"),
        (f"micro-batches x examples per {_who(plan)}", lambda s: f"{s.accumulation} x {s.micro_batch}"),
        ("pictures per example", lambda s: f"{s.lengths.pictures:.2f}"),
        ("visual tokens per picture", lambda s: f"{visual}"),
        ("tokens per example", lambda s: f"{s.lengths.tokens:,.0f}"),
        ("  of the longest", lambda s: f"{s.lengths.longest:,}"),
        ("target tokens per example", lambda s: f"{s.lengths.targets:,.0f}"),
        ("  at most", lambda s: f"{s.lengths.most_targets:,}"),
    ]
    lines = _table("data", variant.stages, rows)
    parts = [
        (part, part.removeprefix("multi_modal_").replace("_", " "))
        for part in variant.stages[0].counts.total
        if part != PREDICTOR
    ]

    def number(part: str) -> Callable[[StageCost], str]:
        return lambda s: f"{s.counts.trained[part]:,}"

    all_of = variant.stages[0].counts.total
    rows = [(f"{name}, {_number(all_of[part] / 1e6)}M", number(part)) for part, name in parts]
    rows.append((f"predictor, {_number(all_of[PREDICTOR] / 1e6)}M", number(PREDICTOR)))
    return [*lines, *_table("weights that learn", variant.stages, rows)]


def _memory(plan: Plan, variant: VariantCost) -> list[str]:
    unit, size = _unit(BYTES, variant.peak)

    def amount(name: str) -> Callable[[StageCost], str]:
        return lambda s: _number(getattr(s.memory, name) / size)

    kept = "activations, checkpointed" if plan.preset.train.gradient_checkpointing else "activations"
    half = "gathered by fsdp" if plan.machine.sharding == "fsdp" else "copies in bfloat16"
    names = [
        ("weights", "weights"),
        (half, "half_weights"),
        ("gradients", "gradients"),
        ("optimiser", "optimizer"),
        ("DDP's buckets", "buckets"),
        ("kept for the log", "log"),
        (kept, "activations"),
        ("logits", "logits"),
        ("most at one moment", "peak"),
    ]
    rows: list[Row] = [
        (label, amount(name)) for label, name in names if any(getattr(s.memory, name) for s in variant.stages)
    ]
    if plan.limit is not None:
        limit = plan.limit
        rows.append((f"of {limit / size:g}", lambda s: _verdict(s.memory.peak, limit)))
    lines = _table(f"{unit} per {_who(plan)}, {variant.name}", variant.stages, rows)
    lines += [f"  {stage.name} needs most at the {stage.memory.worst}" for stage in variant.stages]
    if plan.fits:
        return lines
    if plan.remedy is None:
        return [*lines, "  no smaller micro-batches help: more GPUs with --sharding fsdp, or larger ones, would"]
    changes, peak = plan.remedy
    return [*lines, f"  it would need {_number(peak / size)} {unit} with {' '.join(changes)}"]


def _who(plan: Plan) -> str:
    return "GPU" if plan.machine.cuda else "process"


def _verdict(peak: float, limit: float) -> str:
    if peak <= ROOM * limit:
        return "fits"
    return "tight" if peak <= limit else "does not fit"


def _work(variant: VariantCost) -> list[str]:
    unit, size = _unit(FLOP, variant.operations)

    def part(name: str) -> Callable[[StageCost], str]:
        return lambda s: _number(s.work[name].total / size)

    def kind(name: str) -> Callable[[StageCost], str]:
        return lambda s: _number(sum(getattr(work, name) for work in s.work.values()) / size)

    rows: list[Row] = [(name, part(name)) for name in variant.stages[0].work]
    rows += [("in all", lambda s: _number(s.operations / size)), ("  forward", kind("forward"))]
    rows += [("  backward", kind("backward")), ("  forward again (checkpointing)", kind("again"))]
    if variant.hours is not None:
        rows.append(("hours", lambda s: _number((s.seconds or 0) / 3600)))
    return _table(f"{unit} of a run, {variant.name}", variant.stages, rows)


def _study(plan: Plan) -> list[str]:
    unit, size = _unit(FLOP, plan.largest.operations)
    heads = ((unit, 14), ("regularizer", 14), ("hours", 10), (f"{_who(plan)} hours", 16))
    lines = ["a run of".ljust(24) + "".join(name.rjust(width) for name, width in heads)]
    total = 0.0
    for variant in plan.variants:
        hours = variant.hours
        times = ["-", "-"] if hours is None else [_number(hours), _number(hours * plan.machine.processes)]
        total += 0 if hours is None else hours * plan.machine.processes * plan.seeds
        cells = [_number(variant.operations / size), f"{variant.regularizer_share:.2%}", *times]
        columns = zip(cells, heads, strict=True)
        lines.append(variant.name.ljust(24) + "".join(cell.rjust(width) for cell, (_, width) in columns))
    number = len(plan.variants) * plan.seeds
    runs = f"{len(plan.variants)} variants x {plan.seeds} seeds: {number} runs"
    return [*lines, runs if plan.variants[0].hours is None else f"{runs}, {_number(total)} {_who(plan)} hours"]


def _assumptions(plan: Plan) -> list[str]:
    found = [f"tokens of {stage.name}: {stage.lengths.source}" for stage in plan.largest.stages]
    if not plan.exact_rows:
        found.append("up to 64 rows of the embeddings are counted for the image token: the tokenizer is not here")
    if any(stage.cached_features for stage in plan.largest.stages):
        found.append("the frozen tower's features are read from the study's cache; computing them once is not counted")
    if plan.machine.sharding == "fsdp":
        found.append("fsdp: activations as under ddp, an upper bound (its residual stream is bfloat16)")
    found += [
        "GB are 10^9 bytes; memory is that of a micro-batch of the longest examples, each with a picture",
        "not counted: CUDA's context, memory in pieces, element-wise work, communication, evaluation, probes",
    ]
    return found


def unknown_regularizers(variants: Sequence[VariantConfig]) -> list[str]:
    """Return an assumption for every regularizer whose own cost is unknown."""
    known = (PredictiveConfig, NormPenaltyConfig, type(None))
    return [
        f"{variant.name}: the cost of a regularizer of type {variant.regularizer.type} is not counted"
        for variant in variants
        if not isinstance(variant.regularizer, known) and variant.regularizer is not None
    ]


def as_json(plan: Plan, machine: str, assumptions: Sequence[str]) -> dict[str, Any]:
    """Return everything that the text says, in bytes, operations and seconds."""
    variants = []
    for variant in plan.variants:
        stages = []
        for stage in variant.stages:
            peak = {"peak": stage.memory.peak, "at": stage.memory.worst}
            values = dataclasses.asdict(stage)
            stages.append({**values, "memory": values["memory"] | peak, "operations": stage.operations})
        share = {"regularizer_share": variant.regularizer_share, "hours": variant.hours}
        variants.append({"name": variant.name, "stages": stages, "operations": variant.operations, **share})
    return {
        "preset": plan.preset.name,
        "machine": {"description": machine, **dataclasses.asdict(plan.machine), "memory": plan.limit},
        "seeds": plan.seeds,
        "fits": None if plan.limit is None else plan.fits,
        "remedy": None if plan.remedy is None else {"changes": plan.remedy[0], "peak": plan.remedy[1]},
        "variants": variants,
        "assumptions": [*assumptions, *_assumptions(plan)],
    }
