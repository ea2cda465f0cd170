"""Health of the regularizer's loss: does it still ask for something, and is its target worth predicting?

Read from the training lines of train.jsonl. docs/regularizers.md has what each value means.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import pandas as pd

from prebench.analysis.join import Study
from prebench.analysis.learning_curves import INSTRUCT, TRAIN_LOG
from prebench.analysis.report.charts import Panel, Point, Series, lines, number
from prebench.analysis.report.curves import is_light
from prebench.analysis.report.parts import Figure, Group, Section
from prebench.store import read_jsonl

VALUES = {
    "pre_loss": "regularizer's loss",
    "constant_cosine": "cosine that a constant predictor reaches",
    "anchor_rank": "effective rank of the anchor",
    "anchor_drift": "drift of the anchor: cosine with its start",
}
SATURATED = 0.95
"""Of the way from its first to its lowest value: from there on the loss has little left to ask for."""
WINDOW = 5
"""Logged steps of a running mean: a single batch may be an easy one."""


def saturation_step(steps: Sequence[int], losses: Sequence[float]) -> int | None:
    """Return the first step from which the smoothed loss stays within 5% of its fall; None where it does not fall.

    Args:
        steps: logged steps, ascending.
        losses: the regularizer's loss at each.
    """
    smooth = pd.Series(losses, dtype=float).rolling(WINDOW, min_periods=1, center=True).mean().to_numpy()
    if len(smooth) < 2 or smooth[0] <= smooth[-1]:
        return None
    level = smooth[0] - SATURATED * (smooth[0] - smooth.min())
    above = [number for number, value in enumerate(smooth) if value > level]
    return int(steps[above[-1] + 1]) if above[-1] + 1 < len(smooth) else None


def with_health(section: Section, study: Study) -> Section:
    """Return the section with a figure per value over the instruct steps, and where the loss saturates.

    Args:
        section: the page's on training.
        study: the study.

    Raises:
        StoreError: a log is no JSON.
    """
    logged = _logged(study)
    present = [name for name in VALUES if name in logged and logged[name].notna().any()]
    if not present:
        return section
    figures = []
    for name in present:
        series = [_series(study, variant, logged[logged["variant"] == variant], name) for variant in study.variants]
        panel = Panel(f"h-{name}", VALUES[name], "instruct step", series, least_span=0.02)
        figures.append(Figure(VALUES[name], lines(panel)))
    note = "Where the regularizer's weight is 0 its loss is logged and trains nothing but the predictor."
    group = Group("Health of the regularizer's loss", figures, note, folded=True)
    notes = (*section.notes, *_saturation(study, logged))
    return dataclasses.replace(section, groups=(*section.groups, group), notes=notes)


def _series(study: Study, variant: str, logged: pd.DataFrame, name: str) -> Series:
    """Return a variant's line: mean, lowest and highest over the seeds at every logged step."""
    points = []
    for step, found in logged.dropna(subset=[name]).groupby("step", sort=True):
        values = found[name].astype(float)
        seeds = ", ".join(
            f"seed {seed}: {number(value, 0.0)}" for seed, value in zip(found["seed"], values, strict=True)
        )
        title = f"{variant}, step {step}: {number(values.mean(), 0.0)} ({seeds}; runs/{variant}-s<seed>/{TRAIN_LOG})"
        points.append(Point(float(str(step)), values.mean(), values.min(), values.max(), title))
    return Series(study.variants.index(variant), variant, points, is_light(study, variant))


def _logged(study: Study) -> pd.DataFrame:
    rows: list[dict[str, Any]] = []
    for variant in study.variants:
        for run in study.of_variant(variant):
            path = run.folder / TRAIN_LOG
            for line in read_jsonl(path) if path.is_file() else ():
                if line.get("stage") == INSTRUCT and line.get("kind") is None:
                    values = {name: line.get(name) for name in VALUES}
                    rows.append({"variant": variant, "seed": run.seed, "step": line.get("step"), **values})
    return pd.DataFrame(rows, columns=["variant", "seed", "step", *VALUES])


def _saturation(study: Study, logged: pd.DataFrame) -> list[str]:
    """Return a line per variant whose runs saturate: at which step of the instruct stage, by seed."""
    notes = []
    known = logged.dropna(subset=["pre_loss"])
    for variant in study.variants:
        mine = known[known["variant"] == variant]
        parts = []
        for seed, run in mine.groupby("seed", sort=True):
            step = saturation_step(run["step"].tolist(), run["pre_loss"].tolist())
            parts.append(f"seed {seed} {'not' if step is None else f'step {step}'}")
        if parts:
            notes.append(
                f"{variant}: the regularizer's loss has made 95% of its fall at {', '.join(parts)} "
                f"(runs/{variant}-s<seed>/{TRAIN_LOG})."
            )
    return notes
