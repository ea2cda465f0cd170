"""How many seeds and images a difference needs: against simulation, and through the command."""

from __future__ import annotations

import numpy as np
import pytest
from click.testing import CliRunner
from scipy import stats

from prebench.analysis import power
from prebench.analysis.compare import compare
from prebench.analysis.join import load_study
from prebench.cli import main
from prebench.errors import ComparisonError


@pytest.mark.parametrize(("sd", "difference"), [(1.0, 1.0), (0.8, 0.5), (2.0, 1.5)])
def test_the_planned_number_of_seeds_has_the_planned_power(sd, difference):
    seeds = power.seeds_needed(sd, difference)
    generator = np.random.default_rng(0)

    def found(number: int) -> float:
        drawn = generator.normal(difference, sd, size=(20_000, number))
        return float(np.mean(stats.ttest_1samp(drawn, 0, axis=1).pvalue < 0.05))

    assert found(seeds) == pytest.approx(0.8, abs=0.05) and found(seeds) > 0.79
    assert found(seeds - 1) < 0.81


def test_more_power_and_smaller_differences_need_more():
    assert power.seeds_needed(1, 0.5) > power.seeds_needed(1, 1)
    assert power.seeds_needed(1, 1, power=0.95) > power.seeds_needed(1, 1)
    assert power.seeds_needed(0.0, 1) == 2  # no spread: the smallest number that has an interval
    assert power.seeds_needed(1000, 0.001) is None


def test_images_fall_with_the_square_of_the_difference():
    error = power.design_error(100, 8, 0.1, 0.05)
    once, twice = (power.images_needed(error, 100, difference) for difference in (0.01, 0.02))
    assert once == pytest.approx(4 * twice, rel=0.02)
    assert power.images_needed(power.design_error(400, 8, 0.1, 0.05), 400, 0.01) == once


def test_design_error_is_that_of_simulated_clusters():
    generator = np.random.default_rng(1)
    images, per_image, variance, icc = 200, 8, 0.3, 0.4
    shared = generator.normal(0, np.sqrt(variance * icc), (5000, images, 1))
    own = generator.normal(0, np.sqrt(variance * (1 - icc)), (5000, images, per_image))
    seen = (shared + own).mean(axis=(1, 2)).std()
    assert power.design_error(images, per_image, variance, icc) == pytest.approx(seen, rel=0.04)


@pytest.mark.parametrize("difference", [0.0, -1.0, float("nan")])
def test_a_difference_must_be_above_zero(difference):
    with pytest.raises(ComparisonError, match="above 0"):
        power.seeds_needed(1.0, difference)


def test_the_spread_of_a_study_is_used(make_study):
    folder = make_study(images=40)
    comparison = compare(load_study(folder), "baseline", "pre")
    row = comparison.tasks[0]
    plan = power.of_comparison(comparison, row.mdd)[0]
    assert plan.seeds == 3  # what can be detected now needs what is there now
    assert plan.seeds_range[0] <= 3 <= plan.seeds_range[1]
    assert plan.images is not None
    same = power.of_comparison(comparison, row.mdd_images)[0]
    assert same.images == row.n_images
    result = CliRunner().invoke(main, ["plan", "baseline", "pre", "--results", str(folder.parent)])
    assert result.exit_code == 0, result.output
    narrow = power.text(comparison, 0.01, 0.8, width=80)
    assert "GQA" in narrow and max(map(len, narrow.splitlines())) <= 82
    assert "the training procedure" in result.output


def test_before_any_study_the_assumptions_are_printed():
    result = CliRunner().invoke(
        main, ["plan", "--seed-sd", "0.8", "--difference", "0.5", "--questions-per-image", "30"]
    )
    assert result.exit_code == 0
    assert f"{power.seeds_needed(0.008, 0.005)} seeds" in result.output
    assert "assumptions" in result.output


def test_one_variant_is_no_comparison(make_study):
    folder = make_study({"baseline": 0.5}, seeds=(0,))
    result = CliRunner().invoke(main, ["plan", "--results", str(folder.parent)])
    assert result.exit_code == 2
    assert "two variants" in result.output
