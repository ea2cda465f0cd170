"""Dynamics: vision and language at snapshots of the training, by hand on studies with known numbers."""

from __future__ import annotations

import json

import pandas as pd
import pyarrow.parquet as pq
import pytest

from prebench.analysis import dynamics
from prebench.analysis.join import load_study
from prebench.analysis.plots import write_figures
from prebench.analysis.tables import write_tables
from prebench.records import PROBE_HASHES
from prebench.store import read_json, write_json

from .conftest import StudyMaker, write_snapshots
from .test_report import built

GQA = "GQA on scenes (generated)"
BACKGROUND = "background, middle layers"


def test_every_point_names_its_record_and_weights(make_study: StudyMaker) -> None:
    folder = make_study()
    write_snapshots(folder)
    failed = folder / "runs" / "pre-s1" / "snapshots" / "step-20" / "eval" / "gqa.json"
    write_json(failed, read_json(failed) | {"n_errors": 2})
    found = dynamics.points(load_study(folder))
    assert sorted(set(found["step"])) == [10, 20, 40]
    assert all((folder / path).is_file() for path in found["file"])
    keys = ["variant", "seed", "step", "kind", "outcome", "layer"]
    assert not found.duplicated(keys).any()
    at = found.set_index(keys)
    row = at.loc[("pre", 1, 20, "benchmark", "gqa", "")]
    assert row["file"] == "runs/pre-s1/snapshots/step-20/eval/gqa.json" and row["weights_hash"] == "w-pre-s1-20"
    assert row["value"] == read_json(failed)["score"] and row["n"] == read_json(failed)["n"] - 2
    assert at.loc[("pre", 1, 40, "benchmark", "gqa", ""), "file"] == "runs/pre-s1/eval/gqa.json"
    # Layers 1 to 3 of 4 are the middle: (.85 + .80 + .75) / 3, and .1 more at the snapshot before.
    assert at.loc[("pre", 1, 40, "probe", "background", "middle"), "value"] == pytest.approx(0.8)
    assert at.loc[("pre", 1, 20, "probe", "background", "middle"), "value"] == pytest.approx(0.9)
    assert at.loc[("pre", 1, 20, "probe", "background", "2"), "value"] == pytest.approx(0.9)
    assert at.loc[("pre", 1, 20, "probe", "background", "encoder"), "value"] == 0.95
    assert at.loc[("pre", 1, 20, "probe", "background", "2"), "n"] == 100


def test_the_change_is_paired_by_run(make_study: StudyMaker) -> None:
    folder = make_study()
    write_snapshots(folder)
    task = folder / "runs" / "pre-s0" / "snapshots" / "step-10" / "eval" / "gqa.json"
    write_json(task, read_json(task) | {"score": read_json(task)["score"] - 0.03})
    study = load_study(folder)
    numbers, printed, caption = dynamics.table(study, dynamics.points(study))
    assert list(numbers["step"]) == [10, 20, 40, "change"] * 2
    assert set(numbers["n_seeds"]) == {3}
    row = numbers.set_index(["variant", "step"]).loc[("pre", "change")]
    assert row[GQA] == pytest.approx(0.41)  # .43, .40 and .40
    half = 4.302653 * 0.03 / 3**0.5 / 3**0.5
    assert row[f"{GQA} high"] - row[GQA] == pytest.approx(half, rel=1e-5)
    assert row[BACKGROUND] == pytest.approx(-0.2)
    last = numbers.set_index(["variant", "step"]).loc[("baseline", 40)]
    assert last[BACKGROUND] == pytest.approx(0.69) and last[f"{BACKGROUND} ±"] == pytest.approx(0.01)
    cells = printed.set_index(["Variant", "Step"])
    assert cells.loc[("baseline", "40"), BACKGROUND] == "69.0 ± 1.0"
    assert cells.loc[("pre", "change"), GQA].startswith("+41.0 [+36.")
    assert "SD over seeds" in caption


def test_what_other_data_made_is_left_out(make_study: StudyMaker) -> None:
    folder = make_study()
    write_snapshots(folder)
    task = folder / "runs" / "pre-s0" / "snapshots" / "step-10" / "eval" / "gqa.json"
    write_json(task, read_json(task) | {"hashes": {"weights": "w-pre-s0-10", "data": "other"}})
    found = dynamics.points(load_study(folder))
    mine = found[(found["variant"] == "pre") & (found["seed"] == 0) & (found["outcome"] == "gqa")]
    assert list(mine["step"]) == [20, 40]


def test_a_probe_with_other_settings_is_left_out(make_study: StudyMaker) -> None:
    folder = make_study()
    write_snapshots(folder)
    for place, config in (("", "same"), ("snapshots/step-10", "other"), ("snapshots/step-20", "same")):
        run = folder / "runs" / "pre-s0" / place
        weights = read_json(run / "eval" / "gqa.json")["hashes"]["weights"]
        known = {PROBE_HASHES: json.dumps({"weights": weights, "config": config})}
        pq.write_table(pq.read_table(run / "probe.parquet").replace_schema_metadata(known), run / "probe.parquet")
    found = dynamics.points(load_study(folder))
    mine = found[(found["variant"] == "pre") & (found["seed"] == 0) & (found["layer"] == "middle")]
    assert set(mine["step"]) == {20, 40}


@pytest.mark.slow
def test_tables_figures_and_page_have_it_only_where_there_are_snapshots(make_study: StudyMaker) -> None:
    folder = make_study()
    names = {path.name for path in (*write_tables(load_study(folder)), *write_figures(load_study(folder)))}
    assert not any("dynamics" in name for name in names)
    assert "No snapshots were kept during training" in built(folder)[1].text
    write_snapshots(folder)
    study = load_study(folder)
    names = {path.name for path in (*write_tables(study), *write_figures(study))}
    made = {"dynamics.csv", "dynamics.tex", "dynamics_points.csv", "dynamics.svg", "dynamics.pdf"}
    assert made <= names
    drawing = (folder / "figures" / "dynamics.svg").read_text(encoding="utf-8")
    assert BACKGROUND in drawing and GQA in drawing and "instruct step" in drawing
    assert len(pd.read_csv(folder / "tables" / "dynamics.csv")) == 8
    html, page = built(folder)
    assert "Probes and benchmarks over the instruct steps" in page.text
    assert "background, step 10: accuracy, %" in page.text
    assert "tables/dynamics.csv, line 2: " in html and "tables/dynamics_points.csv: pre, step 10: " in html
    assert "layer 2, regularised" in html
