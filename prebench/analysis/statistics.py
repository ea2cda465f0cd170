"""Intervals, tests and correlations that know what the unit of a claim is. Formulae: docs/statistics.md.

Two levels of uncertainty are kept apart. *Documents*: questions about one image share it, so images (clusters) are
resampled, never questions. *Seeds*: a claim about a training procedure rests on independently trained models, so it
uses one number per seed. Nothing here draws from a global random generator.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from scipy import optimize, stats

Floats = npt.NDArray[np.float64]

LEVEL = 0.95
MIN_CORRELATION_N = 5
_EXACT_SIGNS = 14  # 2^14 sign patterns or 7! orders are enumerated; beyond that they are sampled
_EXACT_ORDERS = 7
_CHUNK = 4_000_000  # numbers per block of resamples: 32 MB


@dataclass(frozen=True)
class Interval:
    """A two-sided 95% interval, in the unit of what it is about."""

    low: float
    high: float


@dataclass(frozen=True)
class Correlation:
    """Association of two quantities over independently trained models; None where `note` says why."""

    n: int
    pearson: float | None = None
    interval: Interval | None = None
    """Fisher's z interval of the Pearson correlation."""
    spearman: float | None = None
    p: float | None = None
    """Two-sided permutation p of the Pearson correlation."""
    without_one: Interval | None = None
    """Smallest and largest Pearson correlation with one of the models left out."""
    note: str = ""


def _vector(values: Sequence[float] | Floats) -> Floats:
    vector = np.asarray(values, dtype=np.float64)
    if vector.ndim != 1 or vector.size == 0:
        raise ValueError(f"a non-empty vector is expected, got the shape {vector.shape}")
    if not np.isfinite(vector).all():
        raise ValueError("all values must be finite; drop failed documents first")
    return vector


def cluster_totals(
    values: Sequence[float] | Floats, clusters: Sequence[Hashable] | npt.NDArray[np.generic]
) -> tuple[Floats, Floats]:
    """Return the sum and the count of the values in each cluster, in the sorted order of the clusters.

    Args:
        values: one finite value per document, [N].
        clusters: the cluster (image) of each document, [N].

    Returns:
        sums [C] and counts [C].

    Raises:
        ValueError: empty or non-finite values, or lengths that differ.
    """
    vector = _vector(values)
    names, index = np.unique(np.asarray(clusters), return_inverse=True)
    if index.size != vector.size:
        raise ValueError(f"{vector.size} values but {index.size} cluster names")
    sums = np.bincount(index, weights=vector, minlength=names.size)
    counts = np.bincount(index, minlength=names.size)
    return np.asarray(sums, np.float64), np.asarray(counts, np.float64)


def cluster_bootstrap(
    differences: Sequence[float] | Floats,
    clusters: Sequence[Hashable] | npt.NDArray[np.generic],
    n_resamples: int = 2000,
    seed: int = 0,
) -> Interval | None:
    """Return the 95% bootstrap interval of a mean over documents, resampling whole clusters.

    A resample draws C of the C clusters with replacement; its value is (sum of the drawn sums) / (sum of the drawn
    counts). The percentiles are Hesterberg's expanded ones (The American Statistician 69, 2015, 371-386): the
    nominal tail alpha/2 becomes Phi(-sqrt(C / (C - 1)) * t_{1 - alpha/2, C - 1}), because a plain percentile
    interval of few clusters is too narrow.

    Args:
        differences: one value per document, [N].
        clusters: the image of each document, [N].
        n_resamples: number of resamples.
        seed: of this call's own generator.

    Returns:
        The interval, or None with fewer than two clusters.

    Raises:
        ValueError: empty or non-finite values, or lengths that differ.
    """
    sums, counts = cluster_totals(differences, clusters)
    size = sums.size
    if size < 2:
        return None
    generator = np.random.default_rng(seed)
    means = np.empty(n_resamples)
    step = max(1, _CHUNK // size)
    for start in range(0, n_resamples, step):
        rows = min(step, n_resamples - start)
        drawn = generator.multinomial(size, np.full(size, 1 / size), size=rows)
        means[start : start + rows] = (drawn @ sums) / (drawn @ counts)
    critical = stats.t.ppf((1 + LEVEL) / 2, size - 1)
    tail = float(stats.norm.cdf(-math.sqrt(size / (size - 1)) * critical))
    low, high = np.quantile(means, [tail, 1 - tail])
    return Interval(float(low), float(high))


def cluster_standard_error(
    values: Sequence[float] | Floats, clusters: Sequence[Hashable] | npt.NDArray[np.generic]
) -> float | None:
    """Return the cluster-robust standard error of a mean: sqrt(C/(C-1) * sum_c (sum_{i in c} (x_i - m))^2) / N.

    Liang and Zeger's sandwich (Biometrika 73, 1986, 13-22; Miller, arXiv 2411.00640) with the C/(C-1) correction;
    with one document per cluster it is the usual s / sqrt(N). None with fewer than two clusters.
    """
    sums, counts = cluster_totals(values, clusters)
    if sums.size < 2:
        return None
    total = counts.sum()
    residuals = sums - counts * (sums.sum() / total)
    return float(np.sqrt(sums.size / (sums.size - 1) * np.square(residuals).sum()) / total)


def half_interval(
    values: Sequence[float] | Floats, clusters: Sequence[Hashable] | npt.NDArray[np.generic]
) -> float | None:
    """Return half the 95% interval of a mean over documents: t_{.975, C-1} * cluster-robust standard error."""
    error = cluster_standard_error(values, clusters)
    if error is None:
        return None
    return float(stats.t.ppf((1 + LEVEL) / 2, len(set(clusters)) - 1)) * error


def t_interval(differences: Sequence[float] | Floats) -> Interval | None:
    """Return the 95% t interval of the mean of per-seed values: m -/+ t_{.975, S-1} * s / sqrt(S).

    None with one seed, and where several seeds give one and the same non-zero value: a spread of exactly zero is an
    accident of a coarse score, not certainty.
    """
    vector = _vector(differences)
    if vector.size < 2:
        return None
    error = float(stats.sem(vector))
    mean = float(vector.mean())
    if _no_spread(vector):
        return Interval(0.0, 0.0) if mean == 0 else None
    half = float(stats.t.ppf((1 + LEVEL) / 2, vector.size - 1)) * error
    return Interval(mean - half, mean + half)


def t_p(differences: Sequence[float] | Floats) -> float | None:
    """Return the two-sided p of a one-sample t test on per-seed values; None with one seed.

    Without any spread over the seeds the exact permutation p takes its place.
    """
    vector = _vector(differences)
    if vector.size < 2:
        return None
    if _no_spread(vector):
        return sign_flip_p(vector)
    return float(2 * stats.t.sf(abs(vector.mean() / stats.sem(vector)), vector.size - 1))


def _no_spread(vector: Floats) -> bool:
    return bool(np.ptp(vector) <= 1e-12 * max(1.0, float(np.abs(vector).max())))


def sign_flip_p(differences: Sequence[float] | Floats, n_resamples: int = 9999, seed: int = 0) -> float:
    """Return the two-sided p of the sign-flip permutation test of "the differences are symmetric about zero".

    Up to 14 differences all 2^S sign patterns are enumerated (Fisher's exact test): p is the share with
    |sum of signed differences| >= the observed one, never below 2 / 2^S. Beyond, p = (1 + hits) / (1 + n_resamples).

    Args:
        differences: one per seed, or one sum per cluster (then whole clusters are flipped).
        n_resamples: sampled patterns where enumeration is out of reach.
        seed: of this call's own generator.
    """
    vector = _vector(differences)
    threshold = abs(vector.sum()) - 1e-12 * np.abs(vector).sum()
    if vector.size <= _EXACT_SIGNS:
        patterns = (np.arange(2**vector.size)[:, None] >> np.arange(vector.size)) & 1
        return float(np.mean(np.abs((1 - 2 * patterns) @ vector) >= threshold))
    generator = np.random.default_rng(seed)
    hits, step = 0, max(1, _CHUNK // vector.size)
    for start in range(0, n_resamples, step):
        bits = generator.integers(0, 2, size=(min(step, n_resamples - start), vector.size), dtype=np.int8)
        hits += int(np.count_nonzero(np.abs((1 - 2 * bits) @ vector) >= threshold))
    return (1 + hits) / (1 + n_resamples)


def holm(p_values: Sequence[float | None]) -> list[float | None]:
    """Return Holm's adjusted p: max_{j <= i} min(1, (m - j + 1) * p_(j)), in the order given.

    Holm, Scandinavian Journal of Statistics 6 (1979) 65-70. A None (not defined) is no member of the family.
    """
    family = sorted((p, i) for i, p in enumerate(p_values) if p is not None)
    adjusted: list[float | None] = [None] * len(p_values)
    running = 0.0
    for rank, (p, index) in enumerate(family):
        running = max(running, min(1.0, (len(family) - rank) * p))
        adjusted[index] = running
    return adjusted


def mcnemar_p(only_a: int, only_b: int) -> float:
    """Return McNemar's exact two-sided p: of the documents that one of two models alone answers right, half by each.

    2 P(X <= min) of a binomial with n = only_a + only_b and 1/2, at most 1 (Q. McNemar, Psychometrika 12, 1947,
    153-157; exact form). It takes documents as independent: one question per image.

    Args:
        only_a: documents that a alone answers right.
        only_b: documents that b alone answers right.
    """
    total = only_a + only_b
    return min(1.0, 2 * float(stats.binom.cdf(min(only_a, only_b), total, 0.5)))


def equivalence_p(
    difference: float, standard_error: float | None, degrees_of_freedom: int, margin: float
) -> float | None:
    """Return the p of two one-sided t tests of "the true difference is the margin or more, either way".

    max(P(T > (d + M) / SE), P(T < (d - M) / SE)) with T of df degrees of freedom: below .05 exactly where the 90%
    interval d -/+ t_{.95, df} SE lies inside -M .. M (D. Schuirmann, Journal of Pharmacokinetics and Biopharmaceutics
    15, 1987, 657-680).

    Args:
        difference: the observed one.
        standard_error: of it: s / sqrt(S) over seeds (df = S - 1), or cluster-robust over documents (df = images - 1).
        degrees_of_freedom: at least 1.
        margin: M, above 0.

    Returns:
        None where there is no standard error, or one of 0: a spread of exactly zero is an accident of a coarse score.

    Raises:
        ValueError: the margin is not above 0.
    """
    if not margin > 0:
        raise ValueError(f"an equivalence margin is above 0, not {margin:g}")
    if not standard_error or degrees_of_freedom < 1:
        return None
    sides = ((margin + difference) / standard_error, (margin - difference) / standard_error)
    return float(max(stats.t.sf(side, degrees_of_freedom) for side in sides))


def minimum_detectable_difference(
    standard_error: float | None, degrees_of_freedom: int, power: float = 0.8, alpha: float = 0.05
) -> float | None:
    """Return the smallest true difference that a two-sided t test finds with the given power.

    Solves P(|T| > t_{1 - alpha/2, df}) = power for the non-centrality d of T = (Z + d) / sqrt(V / df), V being
    chi-squared, and returns d * SE; for many degrees of freedom that is (1.96 + 0.84) * SE.

    Args:
        standard_error: of the difference: cluster-robust over documents (df = clusters - 1), or s / sqrt(S) over
            seeds (df = S - 1). None gives None.
        degrees_of_freedom: at least 1.
        power: probability of finding it.
        alpha: two-sided level of the test.
    """
    if standard_error is None:
        return None
    critical = float(stats.t.ppf(1 - alpha / 2, degrees_of_freedom))

    # P(T > c) is the mean over the estimated SD of Phi(d - c * SD); scipy's nct.sf gives NaN for large d.
    grid = (np.arange(4000) + 0.5) / 4000
    bounds = critical * np.sqrt(stats.chi2.ppf(grid, degrees_of_freedom) / degrees_of_freedom)

    def missing_power(noncentrality: float) -> float:
        found = stats.norm.cdf(noncentrality - bounds) + stats.norm.cdf(-noncentrality - bounds)
        return float(found.mean() - power)

    # At the upper bound the power is above .99 even with one degree of freedom.
    noncentrality = optimize.brentq(missing_power, 0.0, 4 * critical + 4)
    return float(noncentrality * standard_error)


def correlation(
    x: Sequence[float] | Floats,
    y: Sequence[float] | Floats,
    blocks: Sequence[Hashable] | None = None,
    n_resamples: int = 9999,
    seed: int = 0,
) -> Correlation:
    """Return Pearson's r with Fisher's interval, Spearman's rho, a permutation p and r without each model in turn.

    Models of one block (seed) share its baseline: a lucky baseline shifts all of their x and y. Where a block holds
    several models, x and y are therefore centred in each block, blocks of one model are left out, and p permutes y
    within blocks only.

    Interval: tanh(atanh(r) -/+ 1.96 / sqrt(n - B - 2)) with B blocks (B = 1 without centring). p: the share of the
    orders of y with |r| >= the observed one, all n! of them up to n = 7 in one block, else
    (1 + hits) / (1 + n_resamples).

    Args:
        x: one value per trained model, [n].
        y: the other value of the same models, [n].
        blocks: the seed of each model; None where no two models share a baseline.
        n_resamples: sampled orders where enumeration is out of reach.
        seed: of this call's own generator.

    Returns:
        Values of None and a note where fewer than 5 models are left over the number of blocks but one ("n too
        small") or one side is constant.

    Raises:
        ValueError: lengths that differ.
    """
    names: list[Hashable] = list(blocks) if blocks is not None else [0] * len(x)
    if not len(x) == len(y) == len(names):
        raise ValueError(f"{len(x)} and {len(y)} values of {len(names)} models can't be paired")
    if len(set(names)) == len(names):
        names = [0] * len(names)  # each model has a baseline of its own
    shared = [name for name in names if names.count(name) > 1]
    kept = [index for index, name in enumerate(names) if name in shared]
    n, n_blocks = len(kept), len(set(shared))
    if n - n_blocks + 1 < MIN_CORRELATION_N:
        return Correlation(n, note="n too small")
    groups = [np.array([i for i, k in enumerate(kept) if names[k] == name]) for name in dict.fromkeys(shared)]
    first, second = (_centred(_vector(np.asarray(side, np.float64)[kept]), groups) for side in (x, y))
    if _no_spread(first) or _no_spread(second):
        return Correlation(n, note="one side is constant")
    pearson = _pearson(first, second)
    without = [r for i in range(n) if not math.isnan(r := _without(first, second, groups, i))]
    return Correlation(
        n,
        pearson,
        _fisher(pearson, n - n_blocks - 2),
        float(stats.spearmanr(first, second).statistic),
        _order_p(first, second, groups, n_resamples, seed),
        Interval(min(without), max(without)) if without else None,
    )


def _centred(vector: Floats, groups: Sequence[npt.NDArray[np.int_]]) -> Floats:
    centred = vector.copy()
    for group in groups:
        centred[group] -= vector[group].mean()
    return centred


def _without(x: Floats, y: Floats, groups: Sequence[npt.NDArray[np.int_]], left_out: int) -> float:
    rest = [group[group != left_out] for group in groups]
    kept = np.concatenate([group for group in rest if group.size > 1 or len(groups) == 1])
    return _pearson(*(_centred(side, [group for group in rest if group.size])[kept] for side in (x, y)))


def _pearson(x: Floats, y: Floats) -> float:
    if _no_spread(x) or _no_spread(y):
        return math.nan
    return float(np.clip(stats.pearsonr(x, y).statistic, -1.0, 1.0))


def _fisher(pearson: float, degrees_of_freedom: int) -> Interval:
    if abs(pearson) >= 1:
        return Interval(pearson, pearson)
    half = float(stats.norm.ppf((1 + LEVEL) / 2)) / math.sqrt(degrees_of_freedom)
    centre = math.atanh(pearson)
    return Interval(math.tanh(centre - half), math.tanh(centre + half))


def _order_p(left: Floats, right: Floats, groups: Sequence[npt.NDArray[np.int_]], n_resamples: int, seed: int) -> float:
    """Return the permutation p of |r|, orders within groups alone; both sides are centred in each group.

    Such orders keep both sides' sums of squares, so that |r| grows with the absolute dot product.
    """
    threshold = abs(left @ right) * (1 - 1e-9)
    if len(groups) == 1 and left.size <= _EXACT_ORDERS:
        orders = np.array(list(itertools.permutations(range(left.size))))
        return float(np.mean(np.abs(right[orders] @ left) >= threshold))
    generator = np.random.default_rng(seed)
    dots = np.zeros(n_resamples)
    for group in groups:
        dots += generator.permuted(np.tile(right[group], (n_resamples, 1)), axis=1) @ left[group]
    hits = int(np.count_nonzero(np.abs(dots) >= threshold))
    return (1 + hits) / (1 + n_resamples)
