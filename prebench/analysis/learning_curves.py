"""Validation during training: learning curves, whether training reached a plateau, and accuracy at equal lm_loss.

Abilities appear abruptly in small models, so a difference between two variants at the last step may be one of onset.
Formulae: docs/statistics.md, 9. Studies without validation lines in train.jsonl have no curves, and nothing is said.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from prebench.analysis import degradation
from prebench.analysis.degradation import Estimate
from prebench.analysis.join import Study
from prebench.analysis.render import NOT_DEFINED, interval, percent
from prebench.errors import StoreError
from prebench.store import read_jsonl

TRAIN_LOG = "train.jsonl"
INSTRUCT = "instruct"
KEYS = ("variant", "seed", "stage", "step", "lm_loss")
PLATEAU = 0.02
"""A validation lm_loss that changed by less over the last quarter of the instruct steps is called a plateau."""


@dataclass(frozen=True)
class Matched:
    """Two variants where they had the same validation lm_loss; accuracies are fractions, meaned over question types."""

    level: float
    """Mean over seeds of the level, in nats per token: the larger of the two variants' lowest validation lm_loss."""
    accuracy_a: float
    accuracy_b: float
    difference: Estimate
    """b - a, paired by seed."""


def curves(study: Study) -> pd.DataFrame:
    """Return every validation of every run.

    Returns:
        Columns variant, seed, stage, step, lm_loss (nats per token), and one per question type: accuracy as a fraction
        (NaN where a line lacks the type). Empty where no run has a validation line.

    Raises:
        StoreError: a log is no JSON, or a validation line lacks a field (file and line are named).
    """
    rows = []
    for variant in study.variants:
        for run in study.of_variant(variant):
            path = run.folder / TRAIN_LOG
            lines = read_jsonl(path) if path.is_file() else iter(())
            for number, line in enumerate(lines, start=1):
                if isinstance(line, dict) and line.get("kind") == "validation":
                    rows.append({"variant": variant, "seed": run.seed, **_validation(line, path, number)})
    kinds = sorted({name for row in rows for name in row} - set(KEYS))
    return pd.DataFrame(rows, columns=[*KEYS, *kinds])


def _validation(line: Mapping[str, Any], path: Path, number: int) -> dict[str, Any]:
    try:
        loss = float(line["lm_loss"])
        values = {"stage": str(line["stage"]), "step": int(line["step"]), "lm_loss": loss}
        accuracy = {str(name): float(value) for name, value in line["accuracy"].items()}
        if not all(math.isfinite(value) for value in (loss, *accuracy.values())):
            raise ValueError("a value is not finite")
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise StoreError(
            f"{path}:{number}: a validation line needs stage, step, lm_loss and accuracy by question type "
            f"({type(error).__name__}: {error}); delete the run's folder to train it again"
        ) from error
    return accuracy | values


def question_types(frame: pd.DataFrame) -> list[str]:
    """Return the columns of `curves` that are question types."""
    return [name for name in frame.columns if name not in KEYS]


def plateau(frame: pd.DataFrame, variant: str) -> Estimate | None:
    """Return the relative change of a variant's validation lm_loss over the last quarter of its instruct steps.

    (end - start) / start, start interpolated at three quarters of the last validated step; None without a validation
    before that step.
    """
    mine = frame[(frame["variant"] == variant) & (frame["stage"] == INSTRUCT)]
    changes = []
    for _, run in mine.groupby("seed", sort=True):
        steps, losses = run["step"].to_numpy(dtype=float), run["lm_loss"].to_numpy(dtype=float)
        quarter = 0.75 * steps.max()
        if steps.min() <= quarter and steps.size > 1:
            start = float(np.interp(quarter, steps, losses))
            changes.append((float(losses[-1]) - start) / start)
    return degradation.estimate(changes)


def matched(frame: pd.DataFrame, a: str, b: str) -> Matched | None:
    """Compare two variants' accuracy at equal validation lm_loss, seed by seed; None where no seed allows it.

    A seed allows it where both curves pass the level: a variant whose first validation already lies below it was
    never seen there, and nothing is extrapolated.
    """
    instruct = frame[frame["stage"] == INSTRUCT]
    found = []
    for seed in sorted(set(instruct["seed"])):
        pair = [instruct[(instruct["variant"] == name) & (instruct["seed"] == seed)] for name in (a, b)]
        if any(run.empty for run in pair):
            continue
        kinds = [name for name in question_types(frame) if all(run[name].notna().all() for run in pair)]
        level = max(float(run["lm_loss"].min()) for run in pair)
        accuracies = [accuracy_at(run["lm_loss"], run[kinds].mean(axis=1), level) for run in pair] if kinds else []
        left, right = accuracies or (None, None)
        if left is not None and right is not None:
            found.append((level, left, right))
    difference = degradation.estimate(right - left for _, left, right in found)
    if difference is None:
        return None
    level, left, right = (float(value) for value in np.mean(found, axis=0))
    return Matched(level, left, right, difference)


def accuracy_at(lm_loss: pd.Series, accuracy: pd.Series, level: float) -> float | None:
    """Return the accuracy at a level of lm_loss, linear between the records of a falling loss.

    Args:
        lm_loss: of one run by step, [N].
        accuracy: at the same steps, [N]. Only steps at which the loss was lower than ever before count.
        level: of lm_loss.

    Returns:
        None where the level lies above the first loss or below the lowest one.
    """
    losses = lm_loss.to_numpy(dtype=float)
    before = np.minimum.accumulate(np.concatenate([[np.inf], losses[:-1]]))
    record = losses < before
    falling, values = losses[record], accuracy.to_numpy(dtype=float)[record]
    if not falling.size or not falling[-1] <= level <= falling[0]:
        return None
    return float(np.interp(level, falling[::-1], values[::-1]))


def matched_table(study: Study, frame: pd.DataFrame) -> tuple[pd.DataFrame, pd.DataFrame, str]:
    """Return variants by accuracy at the baseline's lm_loss and change over the last quarter: numbers, print, caption.

    Args:
        study: the study.
        frame: its `curves`.
    """
    rows = []
    for variant in study.variants:
        row: dict[str, Any] = {"variant": variant}
        change = plateau(frame, variant)
        row |= {"change_last_quarter": change.mean if change else None}
        row |= {"plateau": None if change is None else abs(change.mean) < PLATEAU}
        base = study.baseline
        found = None if base in (None, variant) else matched(frame, str(base), variant)
        if found is not None:
            bounds = found.difference.interval
            row |= {"n_seeds": found.difference.n_seeds, "level": found.level}
            row |= {"accuracy_baseline": found.accuracy_a, "accuracy": found.accuracy_b}
            row |= {"difference": found.difference.mean}
            row |= {"low": bounds.low if bounds else None, "high": bounds.high if bounds else None}
        rows.append(row)
    columns = ["variant", "change_last_quarter", "plateau", "n_seeds", "level"]
    columns += ["accuracy_baseline", "accuracy", "difference", "low", "high"]
    numbers = pd.DataFrame(rows, columns=columns)
    caption = (
        f"Study {study.name}: validation during training. Change: of lm_loss over the last quarter of the instruct "
        f"steps, in % (below {percent(PLATEAU, digits=0)}: plateau). The rest compares with the baseline at equal "
        "validation lm_loss (level, mean over seeds): accuracy in %, meaned over question types; difference in points "
        "with a t interval over seeds."
    )
    return numbers, _printed(numbers), caption


def _printed(numbers: pd.DataFrame) -> pd.DataFrame:
    printed = pd.DataFrame({"Variant": numbers["variant"]})
    printed["Change"] = [percent(value, signed=True) for value in numbers["change_last_quarter"]]
    printed["Seeds"] = [NOT_DEFINED if pd.isna(value) else f"{value:.0f}" for value in numbers["n_seeds"]]
    printed["Level"] = [NOT_DEFINED if pd.isna(value) else f"{value:.3f}" for value in numbers["level"]]
    for name, title in (("accuracy_baseline", "Baseline"), ("accuracy", "Accuracy")):
        printed[title] = [percent(value) for value in numbers[name]]
    printed["Difference"] = [percent(value, signed=True) for value in numbers["difference"]]
    bounds = zip(numbers["low"], numbers["high"], strict=True)
    printed["95% interval"] = [interval(low, high) for low, high in bounds]
    return printed
