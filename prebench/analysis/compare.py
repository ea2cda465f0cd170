"""Set two variants of a study side by side: paired differences with intervals, tests and honest verdicts.

Formulae and their sources: docs/statistics.md. Scores and accuracies are fractions here; renderers print per cent.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass

import numpy as np
import pandas as pd

from prebench.analysis import degradation, statistics
from prebench.analysis.join import PairedSamples, Study, paired_samples
from prebench.analysis.render import render
from prebench.errors import ComparisonError
from prebench.runtime import derive_seed
from prebench.schema import TaskConfig

__all__ = ["Comparison", "DegradationComparison", "TaskComparison", "compare", "render"]

ALPHA = 0.05
MIN_SEEDS = 3
"""With fewer seeds no verdict about the training procedure is given, whatever the documents say."""

MARGIN = 0.01
"""Equivalence margin: the paper's gains are about a point, so less than one either way is called no change."""

ESTIMAND_MODELS = "these two trained models, over images like these"
ESTIMAND_PROCEDURE = "the training procedure (population of seeds), on this test set"

HIGHER = "higher"
LOWER = "lower"
NO_DIFFERENCE = "no difference shown"
EQUIVALENT = "equivalent within"
"""Followed by the margin."""
TOO_FEW_SEEDS = "too few seeds to conclude for the procedure"

T_TEST = "t over seeds"
SIGN_FLIPS = "sign flips of images"
MCNEMAR = "McNemar, exact"


_TESTS = {
    T_TEST: "a t test over the differences of the seeds",
    SIGN_FLIPS: "sign flips of whole images",
    MCNEMAR: "McNemar's exact test (one question per image)",
}


@dataclass(frozen=True)
class TaskComparison:
    """One task: b against a, over the documents that both answered with every common seed."""

    task: str
    label: str
    data_source: str
    metric: str
    score_a: float
    """Mean per-document score over the paired documents and the common seeds."""
    score_b: float
    majority: float | None
    blind: float | None
    difference: float
    """score_b - score_a."""
    low: float | None
    """95% interval of the difference for the estimand; None where it is not defined."""
    high: float | None
    estimand: str
    low_images: float | None
    """95% cluster-bootstrap interval over images, for these trained models (equals low with one seed)."""
    high_images: float | None
    p: float | None
    """Unadjusted, of `test`."""
    p_holm: float | None
    """Adjusted over the tasks of this comparison."""
    p_seeds_exact: float | None
    """Exact sign-flip p over seeds; never below 2 / 2^S. None with one seed."""
    n_documents: int
    n_images: int
    n_seeds: int
    n_dropped: int
    mdd: float | None
    """Minimum detectable difference (80% power, 5% level) at the level of the estimand."""
    mdd_images: float | None
    """The same from the documents alone: what more seeds can't improve on."""
    verdict: str
    test: str
    """Which test p is of: t over seeds; with one seed sign flips of whole images, or McNemar's where each image has one
    question and every score is 0 or 1."""
    margin: float
    """Equivalence margin."""
    p_equivalence: float | None
    """Two one-sided tests of a difference of the margin or more, at the level of the estimand."""
    p_equivalence_holm: float | None
    """Adjusted over the tasks of this comparison."""


@dataclass(frozen=True)
class DegradationComparison:
    """Degradation of visual representations (prebench.analysis.degradation), meaned over the common seeds."""

    layers: str
    attribute: str
    reference: float
    degradation_a: float
    degradation_b: float
    reduction: float
    """Degradation of a minus that of b: positive where b keeps more."""
    low: float | None
    """95% t interval over seeds; None with one seed."""
    high: float | None
    n_seeds: int


@dataclass(frozen=True)
class Comparison:
    """All of what `prebench compare A B` states."""

    study: str
    a: str
    b: str
    seeds: tuple[int, ...]
    tasks: tuple[TaskComparison, ...]
    degradation: tuple[DegradationComparison, ...]
    notes: tuple[str, ...]


def compare(study: Study, a: str, b: str, margin: float = MARGIN) -> Comparison:
    """Compare variant b with variant a (the baseline) on every task and on degradation.

    Only common seeds are compared. Holm's correction runs over the tasks of this comparison.

    Args:
        study: the study.
        a: the baseline.
        b: the other variant.
        margin: a difference smaller than this either way counts as none, as a fraction.

    Raises:
        ComparisonError: a variant was not run, both are one, they share no seed, or neither a task nor the probe
            for one, or their documents differ.
    """
    if a == b:
        raise ComparisonError(f"compare two different variants; both are {a!r}")
    seeds = study.common_seeds(a, b)
    if not seeds:
        left, right = ([run.seed for run in study.of_variant(name)] for name in (a, b))
        raise ComparisonError(
            f"study {study.name!r}: no seed was run for both variants ({a!r}: {left}, {b!r}: {right})"
        )
    shared = [task for task in study.tasks if study.common_seeds(a, b, task.task)]
    degraded = tuple(_compare_degradation(study, a, b))
    if not shared and not degraded:
        raise ComparisonError(f"study {study.name!r}: no task has results of both {a!r} and {b!r} for one seed")
    tasks = _adjusted([_compare_task(study, task, a, b, margin) for task in shared])
    return Comparison(
        study=study.name,
        a=a,
        b=b,
        seeds=tuple(seeds),
        tasks=tasks,
        degradation=degraded,
        notes=tuple(_notes(study, a, b, tasks, degraded)),
    )


def _compare_task(study: Study, task: TaskConfig, a: str, b: str, margin: float) -> TaskComparison:
    return compare_pairs(task, paired_samples(study, task.task, a, b), *references(study, task.task), margin)


def _adjusted(rows: list[TaskComparison]) -> tuple[TaskComparison, ...]:
    """Correct for the number of tasks, then give the verdicts."""
    differ, equal = (statistics.holm([getattr(row, p) for row in rows]) for p in ("p", "p_equivalence"))
    found = []
    for row, p, same in zip(rows, differ, equal, strict=True):
        known = dataclasses.replace(row, p_holm=p, p_equivalence_holm=same)
        found.append(dataclasses.replace(known, verdict=_verdict(known)))
    return tuple(found)


def compare_pairs(
    task: TaskConfig,
    pairs: PairedSamples,
    majority: float | None = None,
    blind: float | None = None,
    margin: float = MARGIN,
) -> TaskComparison:
    """Compare paired documents of one task; `p_holm` and `verdict` are left to `compare`, which knows all tasks.

    Args:
        task: whose documents they are.
        pairs: both variants' scores per seed and document.
        majority: the task's score of the most frequent answer, to be shown beside.
        blind: its score without pictures, likewise.
        margin: of equivalence, as a fraction.
    """
    frame = pairs.frame.assign(difference=pairs.frame["score_b"] - pairs.frame["score_a"])
    by_seed = frame.groupby("seed")["difference"].mean().to_numpy()
    documents = frame.groupby("doc_id").agg(difference=("difference", "mean"), image_id=("image_id", "first"))
    differences, images = documents["difference"].to_numpy(), documents["image_id"].to_numpy(dtype=str)
    n_images = len(set(images))
    # The resampling stream depends on the study's data alone, so that both directions of a pair use the same one.
    stream = derive_seed("compare", task.task) % 2**32
    over_images = statistics.cluster_bootstrap(differences, images, seed=stream)
    error = statistics.cluster_standard_error(differences, images)
    mdd_images = statistics.minimum_detectable_difference(error, max(1, n_images - 1))
    n_seeds, degrees = len(pairs.seeds), n_images - 1
    if n_seeds == 1:
        interval, estimand, mdd = over_images, ESTIMAND_MODELS, mdd_images
        test, p = _one_seed_p(frame, images, differences, stream)
    else:
        interval, estimand, p, test = (
            statistics.t_interval(by_seed),
            ESTIMAND_PROCEDURE,
            statistics.t_p(by_seed),
            T_TEST,
        )
        error, degrees = float(np.std(by_seed, ddof=1)) / math.sqrt(n_seeds), n_seeds - 1
        mdd = statistics.minimum_detectable_difference(error, degrees) if interval else None
    difference = float(by_seed.mean())
    return TaskComparison(
        task=task.task,
        label=task.label,
        data_source=task.data_source,
        metric=task.primary_metric,
        score_a=float(frame["score_a"].mean()),
        score_b=float(frame["score_b"].mean()),
        majority=majority,
        blind=blind,
        difference=difference,
        low=interval.low if interval else None,
        high=interval.high if interval else None,
        estimand=estimand,
        low_images=over_images.low if over_images else None,
        high_images=over_images.high if over_images else None,
        p=p,
        p_holm=None,
        p_seeds_exact=statistics.sign_flip_p(by_seed) if n_seeds > 1 else None,
        n_documents=len(documents),
        n_images=n_images,
        n_seeds=n_seeds,
        n_dropped=pairs.n_dropped,
        mdd=mdd,
        mdd_images=mdd_images,
        verdict="",
        test=test,
        margin=margin,
        p_equivalence=statistics.equivalence_p(difference, error if interval else None, degrees, margin),
        p_equivalence_holm=None,
    )


def _one_seed_p(
    frame: pd.DataFrame, images: np.ndarray, differences: np.ndarray, stream: int
) -> tuple[str, float | None]:
    """Return which test is made of two single models, and its p: McNemar's where no two documents share an image."""
    scores = frame[["score_a", "score_b"]].to_numpy()
    if len(set(images)) == len(images) and np.isin(scores, (0.0, 1.0)).all():
        return MCNEMAR, statistics.mcnemar_p(int((differences < 0).sum()), int((differences > 0).sum()))
    sums, _ = statistics.cluster_totals(differences, images)
    return SIGN_FLIPS, statistics.sign_flip_p(sums, seed=stream) if len(sums) > 1 else None


def references(study: Study, task: str) -> tuple[float | None, float | None]:
    """Return a task's majority and blind scores: they need no image and no model, so any run's record has them."""
    records = [run.tasks[task] for run in study.runs.values() if task in run.tasks]
    known = records[0].references if records else {}
    return known.get("majority"), known.get("blind")


def _verdict(row: TaskComparison) -> str:
    if row.n_seeds < MIN_SEEDS:
        return TOO_FEW_SEEDS
    if row.p_holm is not None and row.p_holm < ALPHA:
        return HIGHER if row.difference > 0 else LOWER
    if row.p_equivalence_holm is not None and row.p_equivalence_holm < ALPHA:
        return f"{EQUIVALENT} {points(row.margin)}"
    return NO_DIFFERENCE


def points(margin: float) -> str:
    """Return a margin in words."""
    return f"{100 * margin:g} point{'' if margin == 0.01 else 's'}"


def _compare_degradation(study: Study, a: str, b: str) -> list[DegradationComparison]:
    probe = study.config.suite.probe
    frame = degradation.reductions(study, a, b)
    if probe is None or frame.empty:
        return []
    first, last = frame["first_layer"].iloc[0], frame["last_layer"].iloc[0]
    rows = [_degradation_row(frame, "", f"{first}-{last}", probe.reference_attribute)]
    excluded = frame["excluded_layers"].iloc[0]
    what = "the regularised one" if len(excluded) == 1 else "the regularised ones"
    without = f"{first}-{last} without {' and '.join(map(str, excluded))}, {what}"
    rows.append(_degradation_row(frame, "_excluded", without, probe.reference_attribute))
    return [row for row in rows if row is not None]


def _degradation_row(frame: pd.DataFrame, end: str, layers: str, attribute: str) -> DegradationComparison | None:
    known = frame.dropna(subset=[f"reduction{end}"])
    if known.empty:
        return None
    values = known[f"reduction{end}"].to_numpy()
    interval = statistics.t_interval(values)
    return DegradationComparison(
        layers=layers,
        attribute=attribute,
        reference=float(known["reference"].mean()),
        degradation_a=float(known[f"d_baseline{end}"].mean()),
        degradation_b=float(known[f"d_variant{end}"].mean()),
        reduction=float(values.mean()),
        low=interval.low if interval else None,
        high=interval.high if interval else None,
        n_seeds=len(known),
    )


def _notes(
    study: Study, a: str, b: str, tasks: tuple[TaskComparison, ...], degraded: tuple[DegradationComparison, ...]
) -> list[str]:
    seeds = study.common_seeds(a, b)
    notes = [f"Compared over the seeds that both variants have: {', '.join(map(str, seeds))}."]
    left = sorted({run.seed for name in (a, b) for run in study.of_variant(name)} - set(seeds))
    if left:
        notes.append(f"Left out, run for one of the two only: seed {', '.join(map(str, left))}.")
    missing = [task.label for task in study.tasks if task.task not in {row.task for row in tasks}]
    if missing:
        notes.append(f"Left out, without results of both for one seed: {', '.join(missing)}.")
    for estimand in dict.fromkeys(row.estimand for row in tasks):
        notes.append(f"The interval is about {estimand}.")
    n_seeds = [row.n_seeds for row in tasks] + [row.n_seeds for row in degraded]
    if min(n_seeds) < MIN_SEEDS:
        notes.append(
            f"With fewer than {MIN_SEEDS} seeds per variant nothing can be concluded about the training procedure."
        )
    for test in dict.fromkeys(row.test for row in tasks):
        notes.append(f"p is of {_TESTS[test]}; p (Holm) is corrected for {len(tasks)} tasks.")
    if tasks:
        notes.append(
            f"Equivalence (p equiv., two one-sided tests, Holm's correction): is the difference smaller than "
            f"{points(tasks[0].margin)} either way?"
        )
    dropped = [row for row in tasks if row.n_dropped]
    if dropped:
        counts = ", ".join(f"{row.label} {row.n_dropped}" for row in dropped)
        notes.append(f"Documents that failed in a run were left out of all runs: {counts}.")
    if any(row.data_source == "generated" for row in tasks):
        notes.append("(generated): the data is generated in the benchmark's format; it is not the benchmark.")
    notes.append("Runs of a study share their pretrained parts; seeds vary the rest.")
    return notes
