"""Statistics against independent computations, invariances (hypothesis), and planted effects (coverage)."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from prebench.analysis import statistics

SCORES = st.lists(st.sampled_from([-1.0, 0.0, 0.5, 1.0]), min_size=4, max_size=60)
REAL = st.floats(-5, 5, allow_nan=False).map(lambda x: round(x, 3))


def clusters(n: int, size: int = 3) -> np.ndarray:
    return np.array([f"i{i // size}" for i in range(n)])


def clustered(generator: np.random.Generator, images: int, questions: int, mean: float) -> np.ndarray:
    """Draw differences of which the image explains half the variance."""
    image = np.repeat(generator.normal(0, 0.5, images), questions)
    return mean + image + generator.normal(0, 0.5, images * questions)


# --- bootstrap and standard error over images ----------------------------------------------------------------


def test_bootstrap_agrees_with_resampling_documents_by_hand() -> None:
    generator = np.random.default_rng(0)
    values = clustered(generator, 40, 3, 0.2)
    names = clusters(120)
    found = statistics.cluster_bootstrap(values, names, n_resamples=4000, seed=1)
    by_image = values.reshape(40, 3)
    means = [by_image[generator.integers(0, 40, 40)].mean() for _ in range(4000)]
    low, high = np.quantile(means, [0.025, 0.975])
    assert found is not None
    # Expanded percentiles are 1 to 2% of the width further out with 40 clusters.
    assert found.low == pytest.approx(low, abs=0.02)
    assert found.high == pytest.approx(high, abs=0.02)


@given(SCORES, st.sampled_from([-1.0, 0.25, 2.0]))
@settings(max_examples=40, deadline=None)
def test_bootstrap_moves_with_a_shift_and_holds_the_mean(values: list[float], shift: float) -> None:
    names = clusters(len(values))
    plain = statistics.cluster_bootstrap(values, names, 300, seed=3)
    moved = statistics.cluster_bootstrap(np.array(values) + shift, names, 300, seed=3)
    assert plain is not None and moved is not None
    assert moved.low == pytest.approx(plain.low + shift)
    assert moved.high == pytest.approx(plain.high + shift)
    assert min(values) - 1e-9 <= plain.low <= plain.high <= max(values) + 1e-9


@given(SCORES, st.integers(0, 10_000))
@settings(max_examples=40, deadline=None)
def test_order_of_documents_does_not_matter(values: list[float], seed: int) -> None:
    names = clusters(len(values))
    order = np.random.default_rng(seed).permutation(len(values))
    left = statistics.cluster_bootstrap(values, names, 200, seed=5)
    right = statistics.cluster_bootstrap(np.array(values)[order], names[order], 200, seed=5)
    assert left is not None and right is not None
    assert (left.low, left.high) == pytest.approx((right.low, right.high))
    errors = [
        statistics.cluster_standard_error(v, n) for v, n in ((values, names), (np.array(values)[order], names[order]))
    ]
    assert errors[0] == pytest.approx(errors[1])


def test_one_cluster_has_no_interval() -> None:
    assert statistics.cluster_bootstrap([0.0, 1.0], ["a", "a"]) is None
    assert statistics.cluster_standard_error([0.0, 1.0], ["a", "a"]) is None


@given(st.lists(REAL, min_size=2, max_size=30))
def test_single_document_clusters_give_the_usual_standard_error(values: list[float]) -> None:
    found = statistics.cluster_standard_error(values, list(range(len(values))))
    assert found == pytest.approx(float(stats.sem(values)), abs=1e-9)


def test_repeated_documents_add_no_information() -> None:
    once = statistics.cluster_standard_error([0.0, 1.0, 1.0, 0.0, 1.0], list(range(5)))
    tenfold = statistics.cluster_standard_error(np.repeat([0.0, 1.0, 1.0, 0.0, 1.0], 10), np.repeat(np.arange(5), 10))
    assert tenfold == pytest.approx(once)


def test_non_finite_and_unpaired_values_are_refused() -> None:
    with pytest.raises(ValueError, match="finite"):
        statistics.cluster_bootstrap([0.0, float("nan")], ["a", "b"])
    with pytest.raises(ValueError, match="cluster names"):
        statistics.cluster_bootstrap([0.0, 1.0], ["a"])


def test_planted_effect_is_covered_and_ignoring_clusters_is_not() -> None:
    generator = np.random.default_rng(7)
    truth, images, questions, runs = 0.1, 25, 8, 300
    names = clusters(images * questions, questions)
    hits = naive = 0
    for seed in range(runs):
        values = clustered(generator, images, questions, truth)
        found = statistics.cluster_bootstrap(values, names, 800, seed)
        documents = statistics.cluster_bootstrap(values, np.arange(values.size), 800, seed)
        assert found is not None and documents is not None
        hits += found.low <= truth <= found.high
        naive += documents.low <= truth <= documents.high
    assert 0.92 <= hits / runs <= 0.985
    assert naive / runs < 0.8


# --- seeds ---------------------------------------------------------------------------------------------------


@given(st.lists(REAL, min_size=2, max_size=8, unique=True))
def test_t_statement_agrees_with_scipy(values: list[float]) -> None:
    expected = stats.ttest_1samp(values, 0.0)
    found = statistics.t_interval(values)
    bounds = expected.confidence_interval(0.95)
    assert found is not None
    assert (found.low, found.high) == pytest.approx((bounds.low, bounds.high), abs=1e-9)
    assert statistics.t_p(values) == pytest.approx(expected.pvalue, abs=1e-9)


def test_one_seed_and_no_spread_over_seeds_give_no_interval() -> None:
    assert statistics.t_interval([0.1]) is None
    assert statistics.t_p([0.1]) is None
    assert statistics.t_interval([0.1, 0.1, 0.1]) is None
    assert statistics.t_p([0.1, 0.1, 0.1]) == pytest.approx(0.25)
    assert statistics.t_interval([0.0, 0.0]) == statistics.Interval(0.0, 0.0)
    assert statistics.t_p([0.0, 0.0]) == 1.0


def test_t_interval_of_three_seeds_covers() -> None:
    generator = np.random.default_rng(11)
    found = [statistics.t_interval(generator.normal(0.3, 0.2, 3)) for _ in range(2000)]
    share = np.mean([interval is not None and interval.low <= 0.3 <= interval.high for interval in found])
    assert 0.935 <= share <= 0.965


@pytest.mark.parametrize(("n_seeds", "smallest"), [(1, 1.0), (3, 0.25), (5, 0.0625), (6, 0.03125)])
def test_smallest_permutation_p(n_seeds: int, smallest: float) -> None:
    assert statistics.sign_flip_p(np.linspace(0.1, 0.5, n_seeds)) == pytest.approx(smallest)


@given(st.lists(REAL, min_size=1, max_size=8))
def test_sign_flip_p_agrees_with_enumeration(values: list[float]) -> None:
    observed = abs(sum(values))
    sums = [
        abs(sum(s * v for s, v in zip(signs, values, strict=True)))
        for signs in itertools.product((-1, 1), repeat=len(values))
    ]
    expected = np.mean([total >= observed - 1e-9 for total in sums])
    assert statistics.sign_flip_p(values) == pytest.approx(expected)
    assert statistics.sign_flip_p([-v for v in values]) == pytest.approx(expected)


def test_sampled_sign_flips_agree_with_the_t_test() -> None:
    values = np.random.default_rng(2).normal(0.12, 0.5, 80)
    assert statistics.sign_flip_p(values) == pytest.approx(stats.ttest_1samp(values, 0).pvalue, abs=0.01)


# --- several tasks, power ------------------------------------------------------------------------------------


def test_holm_on_a_worked_example() -> None:
    assert statistics.holm([0.01, 0.04, None, 0.03]) == pytest.approx([0.03, 0.06, None, 0.06])


@given(st.lists(st.floats(0, 1), min_size=1, max_size=8))
def test_holm_lies_between_p_and_bonferroni_and_keeps_the_order(p_values: list[float]) -> None:
    adjusted = statistics.holm(p_values)
    for p, q in zip(p_values, adjusted, strict=True):
        assert q is not None
        assert p <= q <= min(1.0, len(p_values) * p) + 1e-12
    ordered = [adjusted[i] for i in np.argsort(p_values, kind="stable")]
    assert ordered == sorted(ordered)  # type: ignore[type-var]


def test_minimum_detectable_difference() -> None:
    many = statistics.minimum_detectable_difference(0.01, 100_000)
    assert many == pytest.approx(0.01 * (stats.norm.ppf(0.975) + stats.norm.ppf(0.8)), rel=1e-3)
    assert statistics.minimum_detectable_difference(None, 3) is None
    assert statistics.minimum_detectable_difference(0.0, 3) == 0


@pytest.mark.parametrize("n_seeds", [2, 3, 5])
def test_detectable_difference_is_found_in_four_of_five_studies(n_seeds: int) -> None:
    spread = 0.2
    effect = statistics.minimum_detectable_difference(spread / np.sqrt(n_seeds), n_seeds - 1)
    assert effect is not None
    draws = np.random.default_rng(4).normal(effect, spread, (20_000, n_seeds))
    assert np.mean(stats.ttest_1samp(draws, 0, axis=1).pvalue < 0.05) == pytest.approx(0.8, abs=0.015)


# --- correlation ---------------------------------------------------------------------------------------------


def test_correlation_needs_five_models_and_two_quantities_that_vary() -> None:
    small = statistics.correlation([1, 2, 3, 4], [1, 2, 3, 4])
    assert (small.n, small.pearson, small.p, small.note) == (4, None, None, "n too small")
    assert statistics.correlation([1, 1, 1, 1, 1], [1, 2, 3, 4, 5]).note == "one side is constant"
    with pytest.raises(ValueError, match="paired"):
        statistics.correlation([1, 2], [1])


def test_correlation_interval_is_the_published_one() -> None:
    """r = .8 has the 95% interval .34 to .95 at n = 10."""
    x = stats.zscore(np.arange(10.0))
    noise = stats.zscore(np.array([1, -1, 1, -1, 1, 1, -1, 1, -1, -1.0]))
    noise = stats.zscore(noise - x * (x @ noise) / (x @ x))
    found = statistics.correlation(x, 0.8 * x + 0.6 * noise)
    assert found.pearson == pytest.approx(0.8)
    assert found.interval is not None
    assert (found.interval.low, found.interval.high) == pytest.approx((0.34, 0.95), abs=0.01)


@pytest.mark.parametrize("n", [6, 12])
def test_permutation_p_agrees_with_scipy(n: int) -> None:
    generator = np.random.default_rng(n)
    x = generator.normal(size=n)
    y = x + generator.normal(size=n)
    expected = stats.permutation_test(
        (y,),
        lambda order: abs(np.corrcoef(x, order)[0, 1]),
        permutation_type="pairings",
        alternative="greater",
        n_resamples=3000,
        random_state=0,
    )
    found = statistics.correlation(x, y)
    assert found.p == pytest.approx(expected.pvalue, abs=0.012)
    assert found.spearman == pytest.approx(stats.spearmanr(x, y).statistic)


@given(st.lists(st.tuples(REAL, REAL), min_size=5, max_size=7, unique_by=(lambda p: p[0], lambda p: p[1])))
@settings(max_examples=25, deadline=None)
def test_correlation_is_symmetric_and_scale_free(points: list[tuple[float, float]]) -> None:
    x, y = np.array(points).T
    left, right = statistics.correlation(x, y), statistics.correlation(-3 * y + 1, x)
    assert left.pearson is not None and right.pearson is not None and left.p is not None
    assert right.pearson == pytest.approx(-left.pearson, abs=1e-9)
    assert right.p == pytest.approx(left.p)
    assert 0 < left.p <= 1


def _shared_baselines(generator: np.random.Generator, seeds: int, variants: int, effect: float = 0.0):
    """Return reductions and gains of independent models against the baseline of their seed, and the seeds."""
    kept = generator.normal(size=(seeds, variants + 1))
    score = effect * kept + generator.normal(size=kept.shape)
    x, y = (side[:, 1:] - side[:, :1] for side in (kept, score))
    return x.ravel(), y.ravel(), np.repeat(np.arange(seeds), variants).tolist()


def test_models_that_share_a_baseline_do_not_correlate_by_it() -> None:
    generator = np.random.default_rng(0)
    naive = blocked = 0
    for _ in range(400):
        x, y, seeds = _shared_baselines(generator, 5, 4)
        naive += stats.pearsonr(x, y).pvalue < 0.05
        p = statistics.correlation(x, y, seeds, n_resamples=199).p
        assert p is not None
        blocked += p < 0.05
    assert naive / 400 > 0.09 and blocked / 400 < 0.08


def test_correlation_within_blocks_is_the_partial_one() -> None:
    x, y, seeds = _shared_baselines(np.random.default_rng(3), 4, 3, effect=1.0)
    found = statistics.correlation([*x, 9.0], [*y, -9.0], [*seeds, 77])  # a seed of one model says nothing
    dummies = (np.array(seeds)[:, None] == np.unique(seeds)).astype(float)
    left, right = (side - dummies @ np.linalg.lstsq(dummies, side, rcond=None)[0] for side in (x, y))
    assert found.n == 12
    assert found.pearson == pytest.approx(np.corrcoef(left, right)[0, 1])
    assert found.interval is not None and found.without_one is not None
    half = 1.959964 / np.sqrt(12 - 4 - 2)
    assert found.interval.high == pytest.approx(np.tanh(np.arctanh(found.pearson) + half))
    assert found.without_one.low <= found.pearson <= found.without_one.high
    assert statistics.correlation(x[:6], y[:6], seeds[:6]).n == 6
    assert statistics.correlation(x[:4], y[:4], [0, 0, 1, 1]).note == "n too small"


def test_one_extreme_model_shows_when_it_is_left_out() -> None:
    generator = np.random.default_rng(1)
    x, y = generator.normal(size=(2, 8))
    x[0] = y[0] = 30.0
    found = statistics.correlation(x, y)
    assert found.pearson is not None and found.pearson > 0.95
    assert found.without_one is not None
    assert found.without_one.low == pytest.approx(np.corrcoef(x[1:], y[1:])[0, 1])
