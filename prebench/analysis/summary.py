"""What `prebench run` prints at the end: scores beside scores that need no image, degradation, and a plain verdict."""

from __future__ import annotations

import textwrap

from prebench.analysis import degradation, question_types
from prebench.analysis.compare import (
    HIGHER,
    LOWER,
    MIN_SEEDS,
    Comparison,
    DegradationComparison,
    TaskComparison,
    compare,
    references,
)
from prebench.analysis.join import Study
from prebench.analysis.render import interval, marked, percent, text_table
from prebench.analysis.tables import SPREAD_IMAGES, SPREAD_SEEDS, score
from prebench.errors import ComparisonError

WIDTH = 100


def summary_text(study: Study, width: int = WIDTH) -> str:
    """Return the scores, by type of question too, degradation and a verdict per variant, as plain text.

    Raises:
        StoreError: a record is damaged.
    """
    parts = [_scores(study, width)]
    parts += [table for table in (question_types.text(study, width), _degradation(study, width)) if table]
    parts.append("".join(f"{textwrap.fill(line, width)}\n" for line in _verdicts(study)))
    return "\n".join(parts).rstrip("\n")


def _scores(study: Study, width: int) -> str:
    rows, n_seeds = [], 0
    for task in study.tasks:
        cells = [percent(value) for value in references(study, task.task)]
        for variant in study.variants:
            found = score(study, variant, task.task)
            n_seeds = max(n_seeds, found.n_seeds if found else 0)
            spread = f" ± {percent(found.spread)}" if found and found.spread is not None else ""
            cells.append(f"{percent(found.mean if found else None)}{spread}")
        rows.append([marked(task.label, task.data_source), *cells])
    if not rows:
        return f"{study.name}: no task was evaluated yet, the probe alone\n"
    title = f"{study.name}: scores in % (± {SPREAD_SEEDS if n_seeds > 1 else SPREAD_IMAGES})"
    return text_table(title, ["task", "majority", "blind", *study.variants], rows, width)


def _degradation(study: Study, width: int) -> str:
    known = degradation.of_study(study)
    if not known:
        return ""
    rows = []
    for variant in study.variants:
        mine = [value for (name, _), value in known.items() if name == variant]
        means = [mean for mean in (value.over_middle() for value in mine) if mean is not None]
        if means:
            reference = sum(value.reference for value in mine) / len(mine)
            worst = max(sum(values) / len(values) for values in _by_layer(mine).values())
            total = percent(sum(means) / len(means), signed=True)
            rows.append([variant, percent(reference), total, percent(worst, signed=True), str(len(mine))])
    first = next(iter(known.values()))
    layers = degradation.middle_layers(first.num_layers)
    title = f"degradation: probe accuracy of {first.attribute!r} at the encoder minus at the layers, in points"
    middle = f"layers {layers.start}-{layers.stop - 1}"
    return text_table(title, ["variant", "encoder, %", middle, "worst layer", "seeds"], rows, width)


def _by_layer(found: list[degradation.Degradation]) -> dict[int, list[float]]:
    return {layer: [value.per_layer[layer] for value in found] for layer in found[0].per_layer}


def _verdicts(study: Study) -> list[str]:
    base = study.baseline
    others = [variant for variant in study.variants if variant != base]
    if base is None or not others:
        return ["No baseline and variant to compare yet."]
    lines = []
    for variant in others:
        try:
            lines.append(_verdict(compare(study, base, variant)))
        except ComparisonError as error:
            # The runs stand for themselves; what can't be paired is said, not hidden.
            lines.append(f"{variant}: not compared with {base}: {error}")
    return lines


def _verdict(found: Comparison) -> str:
    shown = "; ".join(_difference(row) for row in found.tasks) or "no task was evaluated for both"
    parts = [f"{found.b} against {found.a}, difference in points with 95% interval: {shown}."]
    if found.degradation:
        parts.append(_reduction(found.degradation[0]))
    if found.tasks:
        parts.append(_conclusion(found, min(row.n_seeds for row in found.tasks)))
    return " ".join(parts)


def _difference(row: TaskComparison) -> str:
    return f"{marked(row.label, row.data_source)} {percent(row.difference, signed=True)} {interval(row.low, row.high)}"


def _reduction(row: DegradationComparison) -> str:
    bounds = interval(row.low, row.high) if row.low is not None else "(no interval)"
    return f"Degradation reduction over layers {row.layers}: {percent(row.reduction, signed=True)} {bounds}."


def _conclusion(found: Comparison, n_seeds: int) -> str:
    if n_seeds < MIN_SEEDS:
        seeds = "one seed" if n_seeds == 1 else f"{n_seeds} seeds"
        return (
            f"With {seeds} per variant nothing can be concluded about the procedure: the intervals are about "
            f"{found.tasks[0].estimand}."
        )
    parts = []
    for verdict in (HIGHER, LOWER):
        names = [marked(row.label, row.data_source) for row in found.tasks if row.verdict == verdict]
        if names:
            parts.append(f"{verdict} on {', '.join(names)}")
    said = " and ".join(parts) if parts else "no difference shown on any task"
    return f"Over {n_seeds} seeds, with Holm's correction at 5%: {said}."
