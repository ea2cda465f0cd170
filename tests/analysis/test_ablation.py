"""The ablation table and dose-responses: by hand on studies with known numbers."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from prebench.analysis import ablation, dose
from prebench.analysis.join import load_study
from prebench.analysis.plots import write_figures
from prebench.analysis.report import write_page
from prebench.analysis.tables import write_tables
from prebench.config import dump_yaml, load_variant
from prebench.store import write_json, write_text
from tests.analysis.conftest import random_scores, study_config, write_probe, write_run

GRID = ("baseline", "pre", "pre-weight-0.1", "pre-weight-1", "pre-weight-2", "pre-layer-quarter", "pre-layer-last")
GRID += ("pre-layers-several", "pre-anchor-encoder", "pre-level-global", "norm-penalty")
LAYERS = {"quarter": 1, "half": 2, "three_quarters": 3, "last": 4}
FALLING = np.array([0.9, 0.8, 0.7, 0.6, 0.5])


def make_grid(folder: Path, seeds: int, slope: float = 0.05, variants: tuple[str, ...] = GRID) -> Path:
    """Write a study of shipped variants whose probes gain `slope` per unit of the weight in every layer."""
    config = study_config(["baseline"], range(seeds))
    config = config.model_copy(update={"variants": tuple(load_variant(name) for name in variants)})
    study = folder / "results" / "tiny-p"
    write_text(study / "study.yaml", dump_yaml(config))
    for i, variant in enumerate(config.variants):
        block = variant.regularizer
        names = block.layer if isinstance(block.layer, tuple) else (block.layer,)
        layers = [LAYERS[name] for name in names]
        for seed in range(seeds):
            run = write_run(study, variant.name, seed, random_scores(100 * seed + i, 30, 0.5))
            manifest = {"regularizer_layer": layers if len(layers) > 1 else layers[0], "lm_loss": 0.5}
            write_json(run / "model" / "prebench.json", {"variant": variant.name, "seed": seed, **manifest})
            write_probe(run, list(FALLING + slope * block.weight + 0.01 * (seed - 1)))
    return study


def test_every_row_has_its_block_its_gain_and_the_papers_row(tmp_path: Path) -> None:
    study = load_study(make_grid(tmp_path, 3))
    numbers, printed, caption = ablation.table(study)
    assert list(numbers["variant"]) == list(GRID)
    row = numbers.set_index("variant").loc["pre-weight-2"]
    # The weight's 0.1 is the same at every layer and seed: without spread there is no interval.
    assert row["reduction"] == pytest.approx(0.1) and pd.isna(row["reduction low"])
    scores = {n: [study.runs[n, s].tasks["gqa"].score for s in range(3)] for n in ("baseline", "pre-weight-2")}
    gains = np.subtract(scores["pre-weight-2"], scores["baseline"])
    title = "GQA on scenes (generated)"
    assert row[f"{title} gain"] == pytest.approx(gains.mean())
    half = 4.302653 * gains.std(ddof=1) / np.sqrt(3)
    assert row[f"{title} gain high"] - row[f"{title} gain"] == pytest.approx(half, rel=1e-5)
    cells = printed.set_index("Variant")
    assert cells.loc["pre-layer-last", "paper: GQA"] == "62.4 (+0.4)"
    assert cells.loc["pre-anchor-encoder", "paper: MMVP"] == "32.7 (+12.7)"
    assert cells.loc["baseline", "paper: MMMU"] == "35.7"
    assert all(cells.loc[name, "paper: GQA"] == "" for name in ("pre-weight-1", "pre-level-global", "norm-penalty"))
    assert cells.loc["pre-layers-several", "Block"] == "predictive, λ 0.5, layer 1/4 1/2 3/4, pre-llm, patch"
    assert "another model and other data" in caption
    text = " ".join(ablation.text(study, 100).split())
    assert "62.7 (+0.7)" in text and "another model and other data" in text and "GQA on scenes*" in text


def test_a_study_of_one_variant_and_controls_is_no_ablation(tmp_path: Path) -> None:
    folder = make_grid(tmp_path, 1, variants=("baseline", "pre", "pre-shuffled", "norm-penalty", "baseline-again"))
    assert ablation.text(load_study(folder), 100) == ""
    assert dose.text(load_study(folder), 100) == ""


def test_families_differ_in_one_field_alone(tmp_path: Path) -> None:
    study = load_study(make_grid(tmp_path, 1))
    weights, layers = (dose.families(study, field) for field in dose.FIELDS)
    assert [dict(family.doses) for family in weights] == [
        {"pre-weight-0.1": 0.1, "pre": 0.5, "pre-weight-1": 1.0, "pre-weight-2": 2.0}
    ]
    # Several layers at once are no point of a scale.
    assert [dict(family.doses) for family in layers] == [{"pre-layer-quarter": 1, "pre": 2, "pre-layer-last": 4}]


def test_the_response_is_the_paired_difference_at_every_dose(tmp_path: Path) -> None:
    numbers, _, caption = dose.table(load_study(make_grid(tmp_path, 3)))
    mine = numbers[(numbers["field"] == "weight") & (numbers["outcome"] == dose.REDUCTION)]
    assert list(mine["dose"]) == [0.1, 0.5, 1.0, 2.0]
    assert list(mine["mean"]) == pytest.approx([0.005, 0.025, 0.05, 0.1])
    assert "weight: n = 12 trained models" in caption and "layer: n = 9 trained models" in caption


@pytest.mark.parametrize(("slope", "verdict"), [(0.05, dose.RISES), (-0.05, dose.FALLS), (0.0, dose.NO_CLAIM)])
def test_a_planted_trend_is_found(tmp_path: Path, slope: float, verdict: str) -> None:
    numbers, _, _ = dose.trends(load_study(make_grid(tmp_path, 3, slope)))
    row = numbers[(numbers["field"] == "weight") & (numbers["outcome"] == dose.REDUCTION)].iloc[0]
    assert row["verdict"] == verdict
    assert (row["n_models"], row["n_seeds"], row["n_doses"]) == (15, 3, 5)
    others = numbers[numbers["outcome"] != dose.REDUCTION]
    assert dose.RISES not in set(others["verdict"]) and dose.FALLS not in set(others["verdict"]), "scores are random"


@pytest.mark.parametrize("seeds", [1, 2])
def test_few_seeds_give_no_claim(tmp_path: Path, seeds: int) -> None:
    numbers, printed, _ = dose.trends(load_study(make_grid(tmp_path, seeds)))
    assert set(numbers["verdict"]) == {dose.NO_CLAIM}
    assert set(printed["Verdict"]) == {"no claim: n too small"}


@pytest.mark.slow
def test_the_report_and_the_figures_show_them_with_n(tmp_path: Path) -> None:
    study = load_study(make_grid(tmp_path, 3))
    write_tables(study)
    names = {path.name for path in write_figures(study)}
    assert {"dose_response.svg", "dose_response.pdf", "correlation.svg", "correlation.pdf"} <= names
    words = (study.folder / "figures" / "dose_response.svg").read_text()
    assert "rises (n = 15)" in words and "regularised decoder layer" in words
    assert "n = 30 models" in (study.folder / "figures" / "correlation.svg").read_text()
    html = write_page(study).read_text()
    assert "Ablation and dose-response" in html and "reduction of degradation, points (n = 12 trained models)" in html
    for name in ("ablation", "dose_trend", "dose_response"):
        assert f"tables/{name}.csv" in html
    assert "tables/ablation.csv, line 3: " in html and "reduction = 0.025000" in html


def test_a_scatter_of_few_models_claims_nothing(tmp_path: Path) -> None:
    study = load_study(make_grid(tmp_path, 3, variants=("baseline", "pre")))
    assert "dose_response.svg" not in {path.name for path in write_figures(study)}
    assert "n = 3: n too small; no claim" in (study.folder / "figures" / "correlation.svg").read_text()
