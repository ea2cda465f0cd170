"""Equivalence and McNemar's test: by enumeration, against scipy, and as `prebench compare` states them."""

from __future__ import annotations

import math

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from prebench.analysis import statistics
from prebench.analysis.compare import MCNEMAR, SIGN_FLIPS, T_TEST, TOO_FEW_SEEDS, compare, compare_pairs
from prebench.analysis.join import PairedSamples, load_study
from prebench.schema import TaskConfig
from tests.analysis.conftest import StudyMaker, write_run
from tests.tiny_study import call, command

TASK = TaskConfig(task="gqa", label="t", data_source="generated", primary_metric="exact_match", num_images=1)


@given(st.integers(0, 40), st.integers(0, 40))
def test_mcnemar_is_the_two_sided_binomial_test(only_a: int, only_b: int) -> None:
    total, fewer = only_a + only_b, min(only_a, only_b)
    tail = sum(math.comb(total, k) for k in range(fewer + 1)) / 2**total
    assert statistics.mcnemar_p(only_a, only_b) == pytest.approx(min(1.0, 2 * tail), rel=1e-9)


VALUES = st.lists(st.floats(-0.2, 0.2), min_size=3, max_size=8).filter(lambda values: np.std(values) > 1e-3)


@given(VALUES, st.floats(0.001, 0.2))
def test_equivalence_is_two_one_sided_t_tests(values: list[float], margin: float) -> None:
    vector = np.array(values)
    p = statistics.equivalence_p(vector.mean(), stats.sem(vector), len(vector) - 1, margin)
    sides = [
        stats.ttest_1samp(vector, -margin, alternative="greater").pvalue,
        stats.ttest_1samp(vector, margin, alternative="less").pvalue,
    ]
    assert p == pytest.approx(max(sides), rel=1e-9)
    low, high = stats.t.interval(0.90, len(vector) - 1, vector.mean(), stats.sem(vector))
    assert (p < 0.05) == (-margin < low and high < margin)


def test_at_the_margin_equivalence_is_stated_in_one_study_of_twenty() -> None:
    generator = np.random.default_rng(0)
    draws = generator.normal(0.01, 0.003, (4000, 5))
    found = [statistics.equivalence_p(row.mean(), stats.sem(row), 4, 0.01) for row in draws]
    assert np.mean(np.array(found) < 0.05) == pytest.approx(0.05, abs=0.012)


def test_without_a_spread_or_a_margin_there_is_no_equivalence() -> None:
    assert statistics.equivalence_p(0.0, 0.0, 4, 0.01) is None
    assert statistics.equivalence_p(0.0, None, 4, 0.01) is None
    with pytest.raises(ValueError, match="above 0, not 0"):
        statistics.equivalence_p(0.0, 0.1, 4, 0.0)


def pairs(images: list[str], a: list[float], b: list[float]) -> PairedSamples:
    frame = pd.DataFrame({"seed": 0, "doc_id": range(len(images)), "image_id": images, "score_a": a, "score_b": b})
    return PairedSamples(frame, (0,), 0)


def test_mcnemar_is_made_where_every_image_has_one_question() -> None:
    a, b = [1.0] * 3 + [0.0] * 9 + [1.0] * 8, [0.0] * 3 + [1.0] * 9 + [1.0] * 8
    alone = compare_pairs(TASK, pairs([str(i) for i in range(20)], a, b))
    assert (alone.test, alone.p) == (MCNEMAR, pytest.approx(statistics.mcnemar_p(3, 9)))
    shared = compare_pairs(TASK, pairs([str(i // 2) for i in range(20)], a, b))
    assert shared.test == SIGN_FLIPS and shared.p != alone.p
    credits = compare_pairs(TASK, pairs([str(i) for i in range(20)], [0.3, *a[1:]], b))
    assert credits.test == SIGN_FLIPS


def noisy(seed: int, wrong: int) -> list[float]:
    """Return 2,000 scores of which `wrong`, spread over the images, are 0."""
    scores = np.ones(2000)
    scores[np.random.default_rng(seed).permutation(2000)[:wrong]] = 0.0
    return [float(score) for score in scores]


def test_equal_variants_are_equivalent_within_a_margin_and_not_within_a_smaller_one(make_study: StudyMaker) -> None:
    folder = make_study({"baseline": 0.5, "pre": 0.5}, seeds=(0, 1, 2))
    for variant, counts in (("baseline", (200, 202, 199)), ("pre", (201, 200, 200))):
        for seed, wrong in enumerate(counts):
            write_run(folder, variant, seed, noisy(10 * seed, wrong))
    study = load_study(folder)
    wide = compare(study, "baseline", "pre", margin=0.01).tasks[0]
    assert (wide.verdict, wide.test) == ("equivalent within 1 point", T_TEST)
    narrow = compare(study, "baseline", "pre", margin=0.001).tasks[0]
    assert narrow.verdict == "no difference shown"
    assert wide.p_equivalence_holm >= wide.p_equivalence and narrow.p_equivalence > wide.p_equivalence


def test_two_seeds_are_never_equivalent(make_study: StudyMaker) -> None:
    folder = make_study({"baseline": 0.5, "pre": 0.5}, seeds=(0, 1))
    for variant in ("baseline", "pre"):
        for seed in (0, 1):
            write_run(folder, variant, seed, noisy(seed, 200 + seed))
    assert {row.verdict for row in compare(load_study(folder), "baseline", "pre", 0.5).tasks} == {TOO_FEW_SEEDS}


def test_the_command_takes_a_margin(make_study: StudyMaker) -> None:
    folder = make_study()
    done = call(command("compare", "baseline", "pre", "--results", folder.parent, "--margin", "90"))
    assert done.returncode == 0, done.stderr
    assert "smaller than 90 points either way" in " ".join(done.stdout.split()) and "p equiv." in done.stdout
    assert call(command("compare", "baseline", "pre", "--results", folder.parent, "--margin", "0")).returncode == 2
