"""Health of the regularizer's loss on the page: its curves, and where it saturates."""

from __future__ import annotations

import re

import numpy as np

from prebench.analysis.report.loss_health import saturation_step
from prebench.store import write_jsonl

from .conftest import StudyMaker
from .test_report import built, small

HEADING = "Health of the regularizer's loss"


def test_the_loss_saturates_where_95_percent_of_its_fall_lie_behind() -> None:
    steps = list(range(0, 1000, 10))
    falling = [-1 + float(np.exp(-step / 100)) for step in steps]
    assert 280 <= saturation_step(steps, falling) <= 320  # e^-3 is 5%
    sudden = [0.0] * 50 + [-1.0] * 50
    assert 490 <= saturation_step(steps, sudden) <= 530
    outlier = [*falling[:60], -0.5, *falling[61:]]
    assert saturation_step(steps, outlier) > 580  # it rose again


def test_a_loss_that_does_not_fall_never_saturates() -> None:
    assert saturation_step([0, 10, 20], [0.0, 0.5, 1.0]) is None
    assert saturation_step([0], [0.0]) is None


def test_the_page_draws_what_the_logs_hold(make_study: StudyMaker) -> None:
    folder = small(make_study, seeds=(0, 1))
    assert HEADING not in built(folder)[1].text
    for run in (folder / "runs").iterdir():
        regularised = run.name.startswith("pre")
        lines = [
            {
                "stage": "instruct",
                "step": step,
                "lm_loss": 1.0,
                "pre_loss": -1 + 0.9 ** (step / 10) if regularised else None,
                "constant_cosine": 0.65,
                "anchor_rank": None,
                "anchor_drift": 1 - step / 1000,
            }
            for step in range(0, 600, 10)
        ]
        write_jsonl(run / "train.jsonl", lines)
    html, page = built(folder)
    assert HEADING in page.text and "cosine that a constant predictor reaches" in page.text
    assert "effective rank of the anchor" not in page.text
    assert "pre: the regularizer's loss has made 95% of its fall at seed 0 step" in page.text
    assert "baseline: the regularizer's loss" not in page.text
    told = r"pre, step 300: 0\.70* \(seed 0: 0\.70*, seed 1: 0\.70*; runs/pre-s.{1,4}seed.{1,4}/train\.jsonl\)"
    assert re.search(told, html)
