"""What `prebench run` prints at the end: scores beside scores that need no image, degradation, a verdict in words."""

from __future__ import annotations

import contextlib
import textwrap

from prebench.analysis import ablation, degradation, dose, question_types, verdict
from prebench.analysis.compare import TOO_FEW_SEEDS, compare, references
from prebench.analysis.join import Study
from prebench.analysis.render import interval, marked, percent, text_table
from prebench.analysis.tables import SPREAD_IMAGES, SPREAD_SEEDS, score
from prebench.errors import ComparisonError
from prebench.records import middle_layers

WIDTH = 100


def summary_text(study: Study, width: int = WIDTH) -> str:
    """Return scores, by type of question too, degradation, differences and the verdict in words, as plain text.

    Raises:
        StoreError: a record is damaged.
    """
    parts = [_scores(study, width)]
    tables = [question_types.text(study, width), _degradation(study, width), _differences(study, width)]
    tables += [ablation.text(study, width), dose.text(study, width)]
    parts += [table for table in tables if table]
    parts.append("".join(f"{textwrap.fill(line, width)}\n" for line in verdict.sentences(study)))
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
    table = text_table(title, ["task", "majority", "blind", *study.variants], rows, width)
    return table + "".join(f"{textwrap.fill(line, width)}\n" for line in _failures(study))


def _failures(study: Study) -> list[str]:
    """Say for each task how many documents failed, which are no wrong answers; nothing where none did."""
    lines = []
    for task in study.tasks:
        records = {r.folder.name: r.tasks[task.task] for r in study.runs.values() if task.task in r.tasks}
        failed = {name: record for name, record in records.items() if record.n_errors}
        if failed:
            counts = ", ".join(f"{record.n_errors} of {record.n} in {name}" for name, record in failed.items())
            lines.append(
                f"{marked(task.label, task.data_source)}: documents failed and are in no score: {counts} (reasons: "
                f"runs/*/eval/{task.task}.samples.jsonl)"
            )
    return lines


def _differences(study: Study, width: int) -> str:
    """Return what the benchmarks' part of the verdict rests on: every variant against the baseline, task by task."""
    base = study.baseline
    found = {}
    for variant in study.variants:
        # What can't be compared has its reason in the verdict.
        with contextlib.suppress(ComparisonError):
            if base not in (None, variant):
                found[variant] = {row.task: row for row in compare(study, str(base), variant).tasks}
    rows, short = [], {TOO_FEW_SEEDS: "too few seeds"}
    for task in study.tasks:
        for variant, cells in found.items():
            row = cells.get(task.task)
            if row is not None:
                shown = [percent(row.difference, signed=True), interval(row.low, row.high), percent(row.mdd)]
                rows.append(
                    [f"{marked(task.label, task.data_source)}: {variant}", *shown, short.get(row.verdict, row.verdict)]
                )
    if not rows:
        return ""
    title = (
        f"difference from {base}, in points, with 95% interval over seeds (one seed: over images); MDD: smallest "
        "difference found with 80% power"
    )
    return text_table(title, ["benchmark: variant", "difference", "95% interval", "MDD", "verdict"], rows, width)


def _degradation(study: Study, width: int) -> str:
    rows, first = [], None
    names = degradation.attributes(study)
    for attribute in names:
        known = degradation.of_study(study, attribute)
        # Controls belong to the claim; for the other attributes they stand in tables/degradation.csv.
        claim = attribute == names[0]
        for variant in (name for name in study.variants if claim or not verdict.is_control(study, name)):
            mine = [value for (name, _), value in known.items() if name == variant]
            found = degradation.over_seeds(study, variant, attribute)
            if found is None:
                continue
            first = mine[0]
            reference = sum(value.reference for value in mine) / len(mine)
            worst = max(sum(values) / len(values) for values in _by_layer(mine).values())
            cells = [percent(reference), _with_interval(found), percent(worst, signed=True)]
            base = study.baseline
            less = None if base in (None, variant) else degradation.reduction(study, str(base), variant, attribute)
            rows.append([f"{attribute.replace('_', ' ')}: {variant}", *cells, _with_interval(less), str(len(mine))])
    if first is None:
        return ""
    layers = middle_layers(first.num_layers)
    title = (
        "degradation: probe accuracy at the encoder minus at the layers, in points, with 95% t interval over seeds; "
        f"the claim is about {names[0].replace('_', ' ')}"
    )
    middle = f"layers {layers.start}-{layers.stop - 1}"
    header = ["attribute: variant", "encoder", middle, "worst", "reduction", "seeds"]
    return text_table(title, header, rows, width)


def _with_interval(found: degradation.Estimate | None) -> str:
    if found is None:
        return ""
    text = percent(found.mean, signed=True)
    return text if found.interval is None else f"{text} {interval(found.interval.low, found.interval.high)}"


def _by_layer(found: list[degradation.Degradation]) -> dict[int, list[float]]:
    return {layer: [value.per_layer[layer] for value in found] for layer in found[0].per_layer}
