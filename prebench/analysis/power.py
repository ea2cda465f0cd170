"""How many seeds and images a difference needs: `prebench plan`. Formulae: docs/statistics.md, 11.

Two numbers answer two questions. Seeds: would another set of trainings show it, on this very test set? Images: would
other images show it, for the very models that were trained? A claim about the procedure on any test set needs both.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from scipy import stats

from prebench.analysis import statistics
from prebench.analysis.compare import Comparison, TaskComparison
from prebench.analysis.render import NOT_DEFINED, marked, percent, text_table
from prebench.errors import ComparisonError

POWER = 0.8
MAX_SEEDS = 10_000
MAX_IMAGES = 100_000_000


@dataclass(frozen=True)
class TaskPlan:
    """What one task needs to show a difference; the spreads are fractions of 1."""

    label: str
    n_seeds: int
    n_images: int
    seed_sd: float | None
    """Standard deviation of the paired difference over seeds; None with one seed."""
    seeds: int | None
    """Seeds per variant; None where the spread is not known, or more than `MAX_SEEDS`."""
    seeds_range: tuple[int | None, int | None] | None
    """The same at the ends of the 95% interval of `seed_sd`: few seeds know their own spread poorly."""
    images: int | None


def seeds_needed(seed_sd: float, difference: float, power: float = POWER) -> int | None:
    """Return the smallest number of paired seeds whose t test finds a difference with the given power.

    Args:
        seed_sd: standard deviation of the paired difference over seeds.
        difference: the true one, in the same unit, above 0.
        power: probability of finding it at the two-sided 5% level.

    Returns:
        At least 2; None where more than `MAX_SEEDS` would be needed.

    Raises:
        ComparisonError: the difference is not above 0.
    """

    def detectable(seeds: int) -> float:
        return _detectable(seed_sd / math.sqrt(seeds), seeds - 1, power)

    return _smallest(detectable, difference, MAX_SEEDS)


def images_needed(standard_error: float, images: int, difference: float, power: float = POWER) -> int | None:
    """Return the smallest number of images for which two fixed models' difference is found with the given power.

    Args:
        standard_error: cluster-robust, of the difference over `images` images; it falls with the root of their number.
        images: the number that it was computed from.
        difference: the true one, in the same unit, above 0.
        power: probability of finding it at the two-sided 5% level.

    Returns:
        At least 2; None where more than `MAX_IMAGES` would be needed.

    Raises:
        ComparisonError: the difference is not above 0.
    """

    def detectable(number: int) -> float:
        return _detectable(standard_error * math.sqrt(images / number), number - 1, power)

    return _smallest(detectable, difference, MAX_IMAGES)


def design_error(images: int, per_image: float, discordant: float, icc: float) -> float:
    """Return the standard error of a difference of two accuracies that a data set's design implies.

    sqrt(discordant * (1 + (m - 1) icc) / (images * m)) with m questions per image (Kish's design effect).

    Args:
        images: number of images.
        per_image: questions per image, m.
        discordant: share of the questions that exactly one of two models answers right.
        icc: intraclass correlation of the differences of one image's questions.
    """
    return math.sqrt(discordant * (1 + (per_image - 1) * icc) / (images * per_image))


def of_comparison(comparison: Comparison, difference: float, power: float = POWER) -> list[TaskPlan]:
    """Return what each task of a comparison needs, from the spread that the comparison observed.

    Args:
        comparison: of two variants.
        difference: to be found, as a fraction of 1, above 0.
        power: probability of finding it.
    """
    return [_of_task(row, difference, power) for row in comparison.tasks]


def text(comparison: Comparison, difference: float, power: float, width: int) -> str:
    """Return the plan of a study's tasks as a table for people, with what the numbers mean."""
    rows = [_cells(plan) for plan in of_comparison(comparison, difference, power)]
    title = (
        f"{comparison.study}: what a difference of {100 * difference:g} points between {comparison.a} and "
        f"{comparison.b} needs ({power:.0%} power, two-sided 5% level)"
    )
    header = ["task", "SD", "seeds", "needed", "range", "images", "needed"]
    notes = (
        "Seeds there are and needed: for a statement about the training procedure, on this\n"
        "test set. Images: for one about these trained models, over images like these.\n"
        "SD: of the difference over seeds, in points. Range: seeds needed at the ends of\n"
        "the SD's 95% interval; few seeds know their SD poorly. No correction for several\n"
        "tasks is planned in."
    )
    return text_table(title, header, rows, width) + "\n\n" + notes


def text_before(
    difference: float, power: float, seed_sd: float, discordant: float, icc: float, per_image: float
) -> str:
    """Return the plan of a study that was not run, from assumed spreads (fractions of 1)."""
    seeds = seeds_needed(seed_sd, difference, power)
    images = images_needed(design_error(1, per_image, discordant, icc), 1, difference, power)
    documents = None if images is None else math.ceil(images * per_image)
    return (
        f"A difference of {100 * difference:g} points, found with {power:.0%} power at the two-sided 5% level, needs\n"
        f"  {_count(seeds, MAX_SEEDS)} seeds per variant, if the paired difference has an SD of {100 * seed_sd:g} "
        "points over seeds;\n"
        f"  {_count(images, MAX_IMAGES)} images ({_count(documents, MAX_IMAGES)} questions), if two models disagree on "
        f"{discordant:.0%} of the questions\n"
        f"  and the {per_image:g} questions about one image have an intraclass correlation of {icc:g}.\n"
        "These are assumptions: `prebench plan --study NAME` takes the spreads of a study that was run."
    )


def _cells(plan: TaskPlan) -> list[str]:
    known = plan.seed_sd is not None
    return [
        plan.label,
        percent(plan.seed_sd, digits=2),
        f"{plan.n_seeds}",
        _count(plan.seeds, MAX_SEEDS) if known else NOT_DEFINED,
        " to ".join(_count(end, MAX_SEEDS) for end in plan.seeds_range) if plan.seeds_range else NOT_DEFINED,
        f"{plan.n_images:,}",
        _count(plan.images, MAX_IMAGES),
    ]


def _count(number: int | None, limit: int) -> str:
    return f"over {limit:,}" if number is None else f"{number:,}"


def _of_task(row: TaskComparison, difference: float, power: float) -> TaskPlan:
    images_error = _error(row.mdd_images, row.n_images - 1)
    images = None if images_error is None else images_needed(images_error, row.n_images, difference, power)
    label = marked(row.label, row.data_source)
    seeds_error = _error(row.mdd, row.n_seeds - 1) if row.n_seeds > 1 else None
    if seeds_error is None:
        return TaskPlan(label, row.n_seeds, row.n_images, None, None, None, images)
    sd = seeds_error * math.sqrt(row.n_seeds)
    low, high = (seeds_needed(limit, difference, power) for limit in sd_interval(sd, row.n_seeds))
    return TaskPlan(label, row.n_seeds, row.n_images, sd, seeds_needed(sd, difference, power), (low, high), images)


def sd_interval(sd: float, n: int) -> tuple[float, float]:
    """Return the 95% interval of a normal's standard deviation from n values: sd * sqrt(df / chi2 quantile)."""
    df = n - 1
    tail = (1 - statistics.LEVEL) / 2
    return sd * math.sqrt(df / stats.chi2.ppf(1 - tail, df)), sd * math.sqrt(df / stats.chi2.ppf(tail, df))


def _error(mdd: float | None, degrees_of_freedom: int) -> float | None:
    """Return the standard error behind a minimum detectable difference, which is proportional to it."""
    unit = statistics.minimum_detectable_difference(1.0, degrees_of_freedom) if degrees_of_freedom > 0 else None
    return None if mdd is None or unit is None else mdd / unit


def _detectable(standard_error: float, degrees_of_freedom: int, power: float) -> float:
    found = statistics.minimum_detectable_difference(standard_error, degrees_of_freedom, power)
    assert found is not None
    return found


def _smallest(detectable: Callable[[int], float], difference: float, limit: int) -> int | None:
    """Return the smallest number, at least 2, whose detectable difference (falling in it) is small enough."""
    if not difference > 0:
        raise ComparisonError(f"a difference of {difference:g}: give one above 0")
    high = 2
    while detectable(high) > difference:
        if high >= limit:
            return None
        high = min(2 * high, limit)
    low = high // 2 if high > 2 else 1
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if detectable(middle) <= difference else (middle, high)
    return high
