"""Accuracy by question type beside what guessing from the question's text scores, on the same documents.

A mean over a benchmark hides that some kinds of question are answered from the text alone. Formulae and the rule of
the mark: docs/statistics.md, 8.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from prebench.analysis import statistics
from prebench.analysis.join import Run, Study
from prebench.analysis.render import NOT_DEFINED, marked, percent, text_table
from prebench.analysis.statistics import Interval
from prebench.schema import TaskConfig

SCENES = "scenes"
APART = ("pope", "mmbench_en_dev_static")
"""Generated tasks that ask in a form of their own; the other generated tasks are pooled as `SCENES`."""
ABOVE = "*"


@dataclass(frozen=True)
class Accuracy:
    """One variant's score on one type of question, as a fraction."""

    mean: float
    """Over the seeds."""
    spread: float | None
    """SD over seeds; with one seed, half the 95% interval over images."""
    interval: Interval | None
    """Over seeds (t); with one seed, or where all seeds score the same, over images."""
    above_blind: bool | None
    """The lower limit of the interval lies above the upper limit of blind; None where one of them is not defined."""
    n_seeds: int


@dataclass(frozen=True)
class QuestionType:
    """One row: a type of question in one task, or in the tasks pooled as `SCENES`."""

    group: str
    data_source: str
    question_type: str
    n_documents: int
    """Scored in every run."""
    n_images: int
    n_failed: int
    """Left out: failed in at least one run."""
    blind: float | None
    """Mean over the documents of the score of the most frequent training answer to the same text."""
    blind_interval: Interval | None
    """95% over images."""
    variants: dict[str, Accuracy]
    """By name; a variant without a run that has all the group's tasks is absent."""


def of_study(study: Study) -> list[QuestionType]:
    """Return a row per group of tasks and type of question: pooled scenes first, then each task apart, types sorted.

    A run counts where it has results of all tasks of a group, made on the data that most runs were evaluated on. A
    document that failed in any of these runs is left out of all. Tasks whose questions have no type have no row.

    Raises:
        StoreError: a record is damaged.
    """
    pooled = [task for task in study.tasks if task.data_source == "generated" and task.task not in APART]
    groups = [(SCENES, pooled)] if pooled else []
    groups += [(task.label, [task]) for task in study.tasks if task not in pooled]
    return [row for name, tasks in groups for row in _rows(study, name, tasks)]


def _rows(study: Study, group: str, tasks: list[TaskConfig]) -> list[QuestionType]:
    runs = _comparable_runs(study, [task.task for task in tasks])
    if not runs:
        return []
    frames = {(run.variant, run.seed): _documents(run, tasks) for run in runs}
    first = next(iter(frames.values()))
    scores = pd.DataFrame({key: frame["score"] for key, frame in frames.items()}).reindex(first.index)
    scored = scores.notna().all(axis=1)
    rows = []
    for name in sorted(set(first["question_type"]) - {""}):
        mine = first["question_type"] == name
        kept = mine & scored
        values = {key: scores.loc[kept, key].to_numpy(dtype=float) for key in frames}
        images = first.loc[kept, "image"].to_numpy(dtype=str)
        blind = first.loc[kept, "blind_score"].to_numpy(dtype=float)
        known = blind.size > 0 and not np.isnan(blind).any()
        bounds = _over_images(blind, images) if known else None
        variants = {
            variant: _accuracy([values[key] for key in frames if key[0] == variant], images, bounds)
            for variant in study.variants
            if images.size and any(key[0] == variant for key in frames)
        }
        rows.append(
            QuestionType(
                group=group,
                data_source=tasks[0].data_source,
                question_type=name,
                n_documents=int(kept.sum()),
                n_images=len(set(images)),
                n_failed=int((mine & ~scored).sum()),
                blind=float(blind.mean()) if known else None,
                blind_interval=bounds,
                variants=variants,
            )
        )
    return rows


def _comparable_runs(study: Study, tasks: list[str]) -> list[Run]:
    """Return the runs with results of all tasks on the same data, the most frequent one, seed by seed per variant."""
    runs = [run for variant in study.variants for run in study.of_variant(variant) if set(tasks) <= run.tasks.keys()]
    data = {(run.variant, run.seed): tuple(run.tasks[task].hashes.get("data", "") for task in tasks) for run in runs}
    if not runs:
        return []
    ((most, _),) = Counter(data.values()).most_common(1)
    return [run for run in runs if data[run.variant, run.seed] == most]


def _documents(run: Run, tasks: list[TaskConfig]) -> pd.DataFrame:
    """Return a run's documents of all the tasks: index (task, doc_id); image (unique over tasks), score, the rest."""
    parts = {task.task: run.samples(task.task) for task in tasks}
    parts = {name: part.assign(image=f"{name}/" + part["image_id"].astype(str)) for name, part in parts.items()}
    return pd.concat(parts, names=["task"])


def _accuracy(seeds: list[statistics.Floats], images: Any, blind: Interval | None) -> Accuracy:
    """Return one variant's cell from its scores: per seed one array over the documents, [N]."""
    means = [float(values.mean()) for values in seeds]
    over_images = _over_images(np.mean(seeds, axis=0), images)
    # Seeds that all score the same are an accident of a coarse score: then the images say how far it can be trusted.
    interval = (statistics.t_interval(means) if len(set(means)) > 1 else None) or over_images
    if len(means) > 1:
        spread: float | None = float(np.std(means, ddof=1))
    else:
        spread = None if over_images is None else (over_images.high - over_images.low) / 2
    above = None if interval is None or blind is None else bool(interval.low > blind.high)
    return Accuracy(float(np.mean(means)), spread, interval, above, len(means))


def _over_images(values: statistics.Floats, images: Any) -> Interval | None:
    half = statistics.half_interval(values, images) if len(values) else None
    return None if half is None else Interval(float(values.mean()) - half, float(values.mean()) + half)


def table(study: Study) -> tuple[pd.DataFrame, pd.DataFrame, str]:
    """Return the table in fractions, the one to print in per cent, and its caption.

    Raises:
        StoreError: a record is damaged.
    """
    rows = of_study(study)
    numbers = pd.DataFrame([_number_cells(row) for row in rows], columns=_columns(study))
    header = ["Benchmark", "Question type", "n", "Images", "Failed", "Blind", *study.variants]
    printed = pd.DataFrame([_printed_cells(row, study.variants) for row in rows], columns=header)
    caption = (
        f"Study {study.name}: scores in % by type of question. n: documents scored in every run; Failed: documents "
        "left out. Blind: the most frequent training answer to the same question text, on the same documents, with "
        "its 95% interval over images. ±: SD over seeds, or half the 95% interval over images where there is one "
        f"seed. {ABOVE}: the lower 95% limit lies above the upper limit of blind (per row, not corrected for the "
        f"number of rows). {SCENES}: all tasks on scenes except those listed apart. (generated): data made by a "
        "generator in the benchmark's format, not the benchmark."
    )
    return numbers, printed, caption


def _columns(study: Study) -> list[str]:
    columns = ["group", "data_source", "question_type", "n_documents", "n_images", "n_failed"]
    columns += ["blind", "blind_low", "blind_high"]
    for variant in study.variants:
        ends = ("", " ±", " low", " high", " above_blind")
        columns += [f"n_seeds {variant}", *(f"{variant}{end}" for end in ends)]
    return columns


def _number_cells(row: QuestionType) -> dict[str, Any]:
    cells: dict[str, Any] = {
        "group": row.group,
        "data_source": row.data_source,
        "question_type": row.question_type,
        "n_documents": row.n_documents,
        "n_images": row.n_images,
        "n_failed": row.n_failed,
        "blind": row.blind,
        "blind_low": row.blind_interval.low if row.blind_interval else None,
        "blind_high": row.blind_interval.high if row.blind_interval else None,
    }
    for variant, cell in row.variants.items():
        cells |= {
            f"n_seeds {variant}": cell.n_seeds,
            variant: cell.mean,
            f"{variant} ±": cell.spread,
            f"{variant} low": cell.interval.low if cell.interval else None,
            f"{variant} high": cell.interval.high if cell.interval else None,
            f"{variant} above_blind": cell.above_blind,
        }
    return cells


def _printed_cells(row: QuestionType, variants: list[str]) -> list[str]:
    bounds = row.blind_interval
    blind = percent(row.blind) + (f" [{percent(bounds.low)}, {percent(bounds.high)}]" if bounds else "")
    counts = [str(number) for number in (row.n_documents, row.n_images, row.n_failed)]
    cells = [_printed_accuracy(row.variants.get(variant)) for variant in variants]
    return [marked(row.group, row.data_source), row.question_type.replace("_", " "), *counts, blind, *cells]


def _printed_accuracy(cell: Accuracy | None) -> str:
    if cell is None:
        return NOT_DEFINED
    spread = f" ± {percent(cell.spread)}" if cell.spread is not None else ""
    return f"{percent(cell.mean)}{spread}{ABOVE if cell.above_blind else ''}"


def text(study: Study, width: int = 100) -> str:
    """Return the table as plain text for the summary; "" where no document has a known type.

    Raises:
        StoreError: a record is damaged.
    """
    rows = of_study(study)
    if not rows:
        return ""
    title = (
        f"{study.name}: scores in % by type of question; blind with its 95% interval over images. {ABOVE}: the lower "
        "95% limit lies above blind's upper limit"
    )
    cells = [_printed_cells(row, study.variants) for row in rows]
    body = [[f"{group}: {kind}", n, blind, *rest] for group, kind, n, _, _, blind, *rest in cells]
    return text_table(title, ["questions", "n", "blind", *study.variants], body, width)
