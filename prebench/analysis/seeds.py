"""One row per trained model: what the means and intervals of the other tables are made of."""

from __future__ import annotations

from typing import Any

import pandas as pd

from prebench.analysis import degradation
from prebench.analysis.join import Run, Study, gain
from prebench.analysis.render import NOT_DEFINED, marked, percent


def table(study: Study) -> tuple[pd.DataFrame, pd.DataFrame, str]:
    """Return the table in fractions, the one to print in per cent and points, and its caption.

    Degradation is that of the suite's reference attribute; reduction and gain are against the baseline of the same
    seed (NA for the baseline itself, or where that was not run).

    Raises:
        StoreError: a record is damaged.
    """
    known, kept = degradation.of_study(study), _reductions(study)
    titles = {task.task: marked(task.label, task.data_source) for task in study.tasks}
    rows = [_cells(study, run, known, kept, titles) for variant in study.variants for run in study.of_variant(variant)]
    columns = ["variant", "seed", "degradation", "degradation_excluded", "reduction", "lm_loss"]
    columns += [*(part for title in titles.values() for part in (title, f"{title} gain")), "weights_hash"]
    numbers = pd.DataFrame(rows, columns=columns)
    attribute = next(iter(degradation.attributes(study)), "none")
    caption = (
        f"Study {study.name}: every trained model. D: degradation of {attribute} over the middle layers, in points; D "
        "without: the same without the layers that a variant of this study regularises; reduction: D of the baseline "
        "of the same seed minus this D; lm_loss: of the last logged training step, in nats per token. Scores in %, "
        "with the gain over the baseline of the same seed, in points."
    )
    return numbers, _printed(numbers, list(titles.values())), caption


def _cells(
    study: Study,
    run: Run,
    known: dict[tuple[str, int], degradation.Degradation],
    kept: dict[tuple[str, int], float],
    titles: dict[str, str],
) -> dict[str, Any]:
    base = None if study.baseline in (None, run.variant) else study.runs.get((str(study.baseline), run.seed))
    row: dict[str, Any] = {"variant": run.variant, "seed": run.seed, "lm_loss": run.lm_loss}
    found = known.get((run.variant, run.seed))
    if found is not None:
        row["degradation"] = found.over_middle()
        excluded = _regularised(study)
        row["degradation_excluded"] = found.over_middle(excluded) if excluded else None
        row["reduction"] = kept.get((run.variant, run.seed))
    for task, title in titles.items():
        row[title] = _score(run, task)
        if base is not None:
            row[f"{title} gain"] = gain(base, run, task)
    # All records of a run name the same weights, else it would not have been loaded.
    made = [record.hashes for record in run.tasks.values()] + [run.probe_hashes or {}]
    return row | {"weights_hash": next((hashes["weights"] for hashes in made if "weights" in hashes), None)}


def _reductions(study: Study) -> dict[tuple[str, int], float]:
    """Return the reduction of every run that has one, by variant and seed."""
    base = study.baseline
    found: dict[tuple[str, int], float] = {}
    for variant in study.variants if base is not None else ():
        if variant != base:
            frame = degradation.reductions(study, str(base), variant)
            found |= {(variant, int(s)): r for s, r in zip(frame["seed"], frame["reduction"], strict=True)}
    return found


def _regularised(study: Study) -> set[int]:
    """Return the layers that any run regularises: left out of every row, so that a column compares like with like."""
    return {layer for run in study.runs.values() for layer in run.regularised_layers}


def _score(run: Run, task: str) -> float | None:
    return run.tasks[task].score if task in run.tasks else None


def _printed(numbers: pd.DataFrame, titles: list[str]) -> pd.DataFrame:
    printed = pd.DataFrame({"Variant": numbers["variant"], "Seed": numbers["seed"].astype(str)})
    for name, title in (("degradation", "D"), ("degradation_excluded", "D without"), ("reduction", "Reduction")):
        printed[title] = [percent(value, signed=True) for value in numbers[name]]
    printed["lm_loss"] = [NOT_DEFINED if pd.isna(value) else f"{value:.3f}" for value in numbers["lm_loss"]]
    for title in titles:
        cells = zip(numbers[title], numbers[f"{title} gain"], strict=True)
        printed[title] = [
            percent(score) + ("" if pd.isna(gain) else f" ({percent(gain, signed=True)})") for score, gain in cells
        ]
    return printed
