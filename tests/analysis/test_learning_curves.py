"""Learning curves, the plateau and accuracy at equal lm_loss, against numbers worked out by hand."""

from __future__ import annotations

from pathlib import Path

import pandas as pd
import pytest

from prebench.analysis import learning_curves, verdict
from prebench.analysis.join import load_study
from prebench.analysis.plots import write_figures
from prebench.analysis.tables import write_tables
from prebench.errors import StoreError
from prebench.store import write_jsonl

from .conftest import StudyMaker, validation, write_curve


@pytest.fixture
def study(make_study: StudyMaker) -> Path:
    """Return two variants that reach the same accuracy at the same loss, pre the lower loss."""
    folder = make_study()
    for seed in (0, 1, 2):
        write_curve(folder / "runs" / f"baseline-s{seed}", [1.6, 1.2, 1.3, 1.0 + 0.1 * seed, 1.1 + 0.1 * seed])
        write_curve(folder / "runs" / f"pre-s{seed}", [1.5, 1.0, 0.8, 0.6, 0.6])
    return folder


def matched(folder: Path, a: str = "baseline", b: str = "pre") -> learning_curves.Matched | None:
    return learning_curves.matched(learning_curves.curves(load_study(folder)), a, b)


def test_curves_hold_every_validation_and_no_training_line(study: Path) -> None:
    frame = learning_curves.curves(load_study(study))
    assert frame.columns.tolist() == ["variant", "seed", "stage", "step", "lm_loss", "color", "count"]
    assert len(frame) == 2 * 3 * 5
    first = frame.iloc[0].to_dict()
    assert first == pytest.approx(
        {"variant": "baseline", "seed": 0, "stage": "instruct", "step": 9, "lm_loss": 1.6, "color": 0.2, "count": 0.1}
    )


def test_equal_accuracy_at_equal_loss_is_no_difference(study: Path) -> None:
    # At the last step pre is 15 points better, all of it because its loss is lower.
    found = matched(study)
    assert found is not None
    # The levels are the baseline's lowest losses 1.0, 1.1, 1.2; accuracy there is (2 - loss) / 2 * (1 + .5) / 2.
    assert found.level == pytest.approx(1.1)
    assert (found.accuracy_a, found.accuracy_b) == pytest.approx((0.3375, 0.3375))
    assert found.difference.mean == pytest.approx(0) and found.difference.n_seeds == 3


def test_a_difference_at_equal_loss_is_found_in_both_directions(study: Path) -> None:
    for seed in (0, 1, 2):
        write_curve(study / "runs" / f"pre-s{seed}", [1.5, 1.0, 0.8, 0.6], shift=0.1 + 0.01 * seed)
    found = matched(study)
    assert found is not None and found.difference.mean == pytest.approx(0.11)
    half = 4.302653 * 0.01 / 3**0.5
    assert found.difference.interval is not None
    assert found.difference.interval.low == pytest.approx(0.11 - half)
    other = matched(study, "pre", "baseline")
    assert other is not None and other.difference.mean == pytest.approx(-0.11)
    text = " ".join(verdict.sentences(load_study(study)))
    assert "At equal validation lm_loss (1.100), mean accuracy over question types: higher; pre 44." in text
    assert "baseline 33.8%, difference +11.0 [+8.5, +13.5] (3 seeds)" in text


def test_only_steps_of_a_new_lowest_loss_count() -> None:
    losses, accuracy = pd.Series([2.0, 1.0, 1.5, 0.5]), pd.Series([0.0, 0.4, 0.9, 0.8])
    values = [learning_curves.accuracy_at(losses, accuracy, level) for level in (2.0, 1.5, 1.0, 0.75, 0.5)]
    assert values == pytest.approx([0.0, 0.2, 0.4, 0.6, 0.8])
    assert learning_curves.accuracy_at(losses, accuracy, 2.1) is None
    assert learning_curves.accuracy_at(losses, accuracy, 0.4) is None


def test_nothing_is_extrapolated(study: Path) -> None:
    # The first validation of pre lies below all that the baseline ever reached.
    for seed in (0, 1, 2):
        write_curve(study / "runs" / f"pre-s{seed}", [0.5, 0.4])
    assert matched(study) is None
    assert "equal validation lm_loss" not in " ".join(verdict.sentences(load_study(study)))


def test_the_plateau_is_the_change_over_the_last_quarter(study: Path) -> None:
    frame = learning_curves.curves(load_study(study))
    # Steps 9 .. 49; three quarters of 49 lie at 36.75, between the losses .8 (29) and .6 (39).
    start = 0.8 - 0.2 * 7.75 / 10
    found = learning_curves.plateau(frame, "pre")
    assert found is not None and found.mean == pytest.approx((0.6 - start) / start)
    assert "no plateau yet in baseline, pre" in " ".join(verdict.sentences(load_study(study)))
    for run in (study / "runs").iterdir():
        write_curve(run, [1.5, 1.0, 0.7, 0.700, 0.699])
    assert "baseline −0.1%, pre −0.1% (a plateau)" in " ".join(verdict.sentences(load_study(study)))
    short = frame[frame["step"] == 49]
    assert learning_curves.plateau(short, "pre") is None


@pytest.mark.slow
def test_tables_and_figures_appear_with_the_curves_alone(study: Path) -> None:
    tables, figures = write_tables(load_study(study)), write_figures(load_study(study))
    assert [path.name for path in figures] == [
        "layer_curves.svg",
        "layer_curves.pdf",
        "learning_curves.svg",
        "learning_curves.pdf",
        "correlation.svg",
        "correlation.pdf",
    ]
    words = (study / "figures" / "learning_curves.svg").read_text()
    assert all(word in words for word in ("lm_loss, nats per token", "color: accuracy, %", "instruct step"))
    assert {"learning_curves.csv", "matched.csv", "matched.tex"} <= {path.name for path in tables}
    assert len(pd.read_csv(study / "tables" / "learning_curves.csv")) == 30
    row = pd.read_csv(study / "tables" / "matched.csv", index_col="variant").loc["pre"]
    assert (row["level"], row["difference"], row["n_seeds"]) == pytest.approx((1.1, 0, 3))
    for path in study.glob("runs/*/train.jsonl"):
        lines = [line for line in path.read_text().splitlines() if "validation" not in line]
        path.write_text("\n".join(lines))
    bare = load_study(study)
    names = {path.name for path in [*write_tables(bare), *write_figures(bare)]}
    assert not names & {"learning_curves.csv", "matched.csv", "learning_curves.svg"}
    assert "lm_loss" not in " ".join(verdict.sentences(bare))


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ({"kind": "validation", "stage": "instruct", "step": 1, "lm_loss": 1.0}, "KeyError: 'accuracy'"),
        (validation(1, float("nan"), {"color": 0.5}), "not finite"),
        (validation(1, 1.0, {"color": "x"}), "ValueError"),  # type: ignore[dict-item]
    ],
)
def test_a_damaged_validation_line_is_named(study: Path, line: dict, reason: str) -> None:
    write_jsonl(study / "runs" / "pre-s1" / "train.jsonl", [validation(0, 1.0, {"color": 0.1}), line])
    with pytest.raises(StoreError, match=rf"pre-s1/train\.jsonl:2: a validation line needs .*{reason}"):
        learning_curves.curves(load_study(study))
