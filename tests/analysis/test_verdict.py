"""The verdict in words: directions, intervals, controls, too few seeds, nothing to preserve."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest

from prebench.analysis import degradation, verdict
from prebench.analysis.join import load_study
from prebench.analysis.tables import write_tables

from .conftest import ENCODER, StudyMaker, random_scores, write_curve, write_probe, write_run

EVERYTHING = ("baseline", "pre", "pre-shuffled", "pre-frozen-copy", "norm-penalty", "baseline-again")


def probe(folder: Path, variant: str, lost: Sequence[float]) -> None:
    """Give a variant's runs the degradation `lost`, one value per seed, in every layer."""
    for seed, value in enumerate(lost):
        write_probe(folder / "runs" / f"{variant}-s{seed}", [ENCODER - value] * 5)


def said(folder: Path) -> str:
    return " ".join(verdict.sentences(load_study(folder)))


@pytest.fixture
def study(make_study: StudyMaker) -> Path:
    """Return baseline and pre over three seeds, with equal answers."""
    folder = make_study()
    for seed in (0, 1, 2):
        for variant in ("baseline", "pre"):
            write_run(folder, variant, seed, random_scores(seed, 30, 0.5))
    return folder


def test_a_gain_and_a_loss_are_told_in_the_same_words(study: Path) -> None:
    probe(study, "baseline", (0.20, 0.21, 0.22))
    probe(study, "pre", (0.10, 0.10, 0.10))
    text = said(study)
    assert "Degradation of background over layers 1-3: baseline 21.0 [18.5, 23.5] points over 3 seeds;" in text
    assert "pre reduces it by 11.0 [8.5, 13.5] over 3 seeds" in text
    assert "without layer 2, which is regularised: +11.0 [+8.5, +13.5]" in text
    probe(study, "pre", (0.31, 0.32, 0.34))
    assert "pre increases it by 11.3 [9.9, 12.8] over 3 seeds" in said(study)


def test_no_change_and_no_degradation_are_said(study: Path) -> None:
    probe(study, "baseline", (-0.02, 0.00, 0.03))
    probe(study, "pre", (0.01, -0.02, 0.00))
    text = said(study)
    assert "no degradation of baseline is shown: 0.3 [−5.9, 6.6] over 3 seeds" in text
    assert "pre: no change shown, reduction +0.7 [" in text and "reduces" not in text
    probe(study, "baseline", (-0.02, -0.03, -0.04))
    assert "baseline does not degrade, its layers know more than the vision encoder: −3.0 [−5.5, −0.5]" in said(study)


def test_a_probe_at_its_ceiling_is_named(study: Path) -> None:
    assert "ceiling" not in said(study)
    probe(study, "pre", (ENCODER - 1,) * 3)
    assert "at its ceiling over these layers (pre 100.0%): a larger reduction could not show" in said(study)
    probe(study, "baseline", (ENCODER - 0.995,) * 3)
    assert "(baseline 99.5%, pre 100.0%): there is nothing to preserve" in said(study)


def test_benchmarks_say_what_could_have_been_found(study: Path) -> None:
    assert "no difference shown on 2 of 2 tasks" in said(study)
    for seed in (0, 1, 2):
        write_run(study, "baseline", seed, random_scores(10 * seed, 60, 0.9))
        write_run(study, "pre", seed, random_scores(10 * seed + 1, 60, 0.2))
    text = said(study)
    assert "Benchmarks, pre against baseline: lower on GQA on scenes (generated) −" in text
    assert "(3 seeds, Holm's correction over 2 tasks at 5%)" in text
    for seed in (0, 1, 2):
        write_run(study, "pre", seed, random_scores(10 * seed + 1, 60, 0.9))
    assert "points would be found with 80% power" in said(study)


def test_two_seeds_have_intervals_and_conclude_nothing(make_study: StudyMaker) -> None:
    folder = make_study({"baseline": 0.2, "pre": 0.9, "norm-penalty": 0.5}, seeds=(0, 1), images=60)
    probe(folder, "norm-penalty", (0.25, 0.2501))
    text = said(folder)
    assert text.startswith("With 2 seeds per variant nothing can be concluded about the training procedure")
    assert "reduces" not in text and "higher" not in text and "larger" not in text
    assert "too few seeds to conclude on 2 of 2 tasks" in text
    assert "Reductions of the controls, which allow no conclusion: norm-penalty " in text


def test_controls_are_known_by_what_they_do(make_study: StudyMaker) -> None:
    study = load_study(make_study(dict.fromkeys(EVERYTHING, 0.5), seeds=(0,)))
    assert [name for name in EVERYTHING if verdict.is_control(study, name)] == list(EVERYTHING[2:])
    assert [name for name in EVERYTHING if verdict.is_baseline_again(study, name)] == ["baseline-again"]


def test_the_reduction_is_set_against_every_control(make_study: StudyMaker) -> None:
    folder = make_study(dict.fromkeys(EVERYTHING, 0.5))
    probe(folder, "baseline", (0.20, 0.21, 0.22))
    probe(folder, "pre", (0.10, 0.10, 0.11))
    probe(folder, "pre-shuffled", (0.20, 0.20, 0.20))
    probe(folder, "pre-frozen-copy", (0.11, 0.09, 0.11))
    probe(folder, "norm-penalty", (0.01, 0.02, 0.02))
    probe(folder, "baseline-again", (0.21, 0.20, 0.22))
    text = said(folder)
    # baseline-again - pre: .11, .10, .11; pre-shuffled - pre: .10, .10, .09.
    assert "A/A: baseline-again, the baseline with other randomness, has the reduction 0.0 [−2.5, +2.5]" in text
    assert "that of pre is larger by 10.7 [9.2, 12.1]: more than the noise between trainings" in text
    assert "larger than that of pre-shuffled by 9.7 [8.2, 11.1]" in text
    assert "not shown to differ from that of pre-frozen-copy: 0.0 [−2.5, +2.5]" in text
    assert "smaller than that of norm-penalty by 8.7 [7.2, 10.1]" in text
    excess = degradation.reduction(load_study(folder), "pre-shuffled", "pre")
    frames = [degradation.reductions(load_study(folder), "baseline", name) for name in ("pre", "pre-shuffled")]
    by_hand = (frames[0]["reduction"] - frames[1]["reduction"]).mean()
    assert excess is not None and excess.mean == pytest.approx(by_hand)
    probe(folder, "pre", (0.20, 0.22, 0.21))
    assert "that of pre is not shown to differ by more than the noise between trainings: 0.0 [" in said(folder)


def test_the_stored_verdict_is_the_printed_one(study: Path) -> None:
    for run in (study / "runs").iterdir():
        write_curve(run, [1.5, 1.0, 0.7, 0.7])
    paths = write_tables(load_study(study))
    assert paths[-1] == study / "tables" / "verdict.txt"
    assert paths[-1].read_text().splitlines() == verdict.sentences(load_study(study))
    assert "At equal validation lm_loss (0.700)" in paths[-1].read_text()


def test_a_baseline_alone_has_no_verdict(make_study: StudyMaker) -> None:
    assert said(make_study({"baseline": 0.5})) == "No baseline and variant to compare yet."
