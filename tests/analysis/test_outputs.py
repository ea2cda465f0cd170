"""Comparison, tables, figure and summary of a synthetic study with known numbers."""

from __future__ import annotations

import io
import json
import re
import shutil
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from prebench.analysis.compare import ESTIMAND_MODELS, ESTIMAND_PROCEDURE, compare, render
from prebench.analysis.join import load_study
from prebench.analysis.plots import layer_curves, write_figures
from prebench.analysis.render import escape_latex, p_value, percent
from prebench.analysis.summary import summary_text
from prebench.analysis.tables import trained_models, write_tables
from prebench.errors import ComparisonError
from prebench.store import read_jsonl

from .conftest import LAYERS, StudyMaker, random_scores, sample, write_curve, write_probe, write_run, write_task


def files_of(folder: Path) -> dict[str, bytes]:
    found = [*folder.glob("scores.csv"), *folder.glob("tables/*"), *folder.glob("figures/*")]
    return {path.name: path.read_bytes() for path in found}


def raw_mean(folder: Path, run: str, task: str = "gqa") -> float:
    records = list(read_jsonl(folder / "runs" / run / "eval" / f"{task}.samples.jsonl"))
    return float(np.mean([record["score"] for record in records]))


def test_difference_is_the_mean_of_per_seed_differences(make_study: StudyMaker) -> None:
    folder = make_study({"baseline": 0.3, "pre": 0.8}, images=60)
    found = compare(load_study(folder), "baseline", "pre")
    by_seed = [raw_mean(folder, f"pre-s{s}") - raw_mean(folder, f"baseline-s{s}") for s in (0, 1, 2)]
    row = found.tasks[0]
    assert row.difference == pytest.approx(np.mean(by_seed))
    half = 4.302653 * np.std(by_seed, ddof=1) / np.sqrt(3)
    assert (row.low, row.high) == pytest.approx((np.mean(by_seed) - half, np.mean(by_seed) + half))
    assert (row.n_documents, row.n_images, row.n_seeds, row.n_dropped) == (240, 60, 3, 0)
    assert (row.majority, row.blind, row.estimand) == (0.25, 0.4, ESTIMAND_PROCEDURE)
    assert row.verdict == "higher"
    assert row.p is not None and row.p_holm is not None and row.p <= row.p_holm < 0.05
    assert row.p_seeds_exact == pytest.approx(0.25)


def test_the_other_direction_mirrors(make_study: StudyMaker) -> None:
    study = load_study(make_study({"baseline": 0.3, "pre": 0.8}, images=60))
    left, right = compare(study, "baseline", "pre"), compare(study, "pre", "baseline")
    for a, b in zip(left.tasks, right.tasks, strict=True):
        assert a.low is not None and b.high is not None
        assert (a.difference, a.low, a.p) == pytest.approx((-b.difference, -b.high, b.p))
    assert right.tasks[0].verdict == "lower"
    assert left.degradation[0].reduction == pytest.approx(-right.degradation[0].reduction)


def test_one_seed_speaks_about_two_models_only(make_study: StudyMaker) -> None:
    study = load_study(make_study({"baseline": 0.2, "pre": 0.9}, seeds=(0,), images=60))
    found = compare(study, "baseline", "pre")
    row = found.tasks[0]
    assert row.estimand == ESTIMAND_MODELS
    assert row.verdict == "too few seeds to conclude for the procedure"
    assert row.low == row.low_images and row.low is not None and row.low > 0
    assert row.p is not None and row.p < 0.01 and row.p_seeds_exact is None
    assert found.degradation[0].low is None
    text = summary_text(study)
    flat = " ".join(text.split())
    assert "With one seed per variant nothing can be concluded about the training procedure" in flat
    # No verdict, and no number that looks like one: every difference is followed by what is known of its error.
    assert "too few seeds to conclude on 2 of 2 tasks" in flat and "higher" not in flat
    assert "pre: reduction +10.0 (no interval) over 1 seed" in flat


def test_equal_variants_show_no_difference(make_study: StudyMaker) -> None:
    folder = make_study()
    for seed in (0, 1, 2):
        for variant in ("baseline", "pre"):
            write_run(folder, variant, seed, random_scores(seed, 30, 0.5))
    row = compare(load_study(folder), "baseline", "pre").tasks[0]
    assert (row.difference, row.low, row.high, row.p, row.verdict) == (0, 0, 0, 1, "no difference shown")


def test_only_common_seeds_are_compared_and_said(make_study: StudyMaker) -> None:
    folder = make_study()
    shutil.rmtree(folder / "runs" / "pre-s1")
    found = compare(load_study(folder), "baseline", "pre")
    assert found.seeds == (0, 2)
    assert any("both variants have: 0, 2" in note for note in found.notes)
    assert any("Left out, run for one of the two only: seed 1" in note for note in found.notes)
    assert found.tasks[0].verdict.startswith("too few seeds")


def test_variants_that_share_nothing_are_refused(make_study: StudyMaker) -> None:
    folder = make_study(seeds=(0, 1))
    shutil.rmtree(folder / "runs" / "pre-s1")
    shutil.rmtree(folder / "runs" / "baseline-s0")
    with pytest.raises(ComparisonError, match=r"no seed was run for both variants \('baseline': \[1\], 'pre': \[0\]\)"):
        compare(load_study(folder), "baseline", "pre")
    with pytest.raises(ComparisonError, match="two different variants"):
        compare(load_study(folder), "pre", "pre")


def test_every_format_states_the_same_numbers(make_study: StudyMaker) -> None:
    found = compare(load_study(make_study(images=40)), "baseline", "pre")
    row = found.tasks[0]
    values = json.loads(render(found, "json"))
    assert values["tasks"][0]["difference"] == row.difference
    frame = pd.read_csv(io.StringIO(render(found, "csv")))
    assert frame["difference"].iloc[0] == pytest.approx(row.difference, abs=1e-6)
    degraded = frame[frame["kind"] == "degradation"].iloc[0]
    assert degraded["difference"] == pytest.approx(-found.degradation[0].reduction, abs=1e-6)
    assert degraded["low"] < degraded["difference"] < degraded["high"]
    shown = f"{100 * row.difference:+.1f}"
    assert shown in render(found, "text")
    assert shown in render(found, "latex")
    with pytest.raises(ComparisonError, match="did you mean 'latex'"):
        render(found, "latx")


@pytest.mark.parametrize("width", [40, 60, 80, 100, 200])
def test_text_fits_any_width_and_never_breaks_a_number(make_study: StudyMaker, width: int) -> None:
    found = compare(load_study(make_study(seeds=(0,))), "baseline", "pre")
    text = render(found, "text", width)
    assert max(len(line) for line in text.splitlines()) <= width
    row = found.tasks[0]
    for number in (f"{100 * row.score_a:.1f}", f"{100 * row.difference:+.1f}", str(row.n_documents)):
        assert re.search(rf"(?<![\d.]){re.escape(number)}(?![\d.])", text)


def test_number_formats() -> None:
    assert [percent(v, signed=True) for v in (0.0123, -0.5, 0.0001, -0.0001, None)] == [
        "+1.2",
        "−50.0",
        "0.0",
        "0.0",
        "n/a",
    ]
    assert [p_value(p) for p in (0.0001, 0.0312, 0.25, 1.0, None)] == ["<.001", ".031", ".250", "1", "n/a"]


def test_latex_is_complete_and_needs_booktabs_only(make_study: StudyMaker) -> None:
    folder = make_study({"baseline": 0.5, "pre_x": 0.6})
    study = load_study(folder)
    write_tables(study)
    sources = [path.read_text() for path in sorted((folder / "tables").glob("*.tex"))]
    sources.append(render(compare(study, "baseline", "pre_x"), "latex"))
    assert len(sources) == 7
    for text in sources:
        for name in (r"\begin", r"\end"):
            assert text.count(name) == 2
        assert all(text.count(rule) == 1 for rule in (r"\toprule", r"\midrule", r"\bottomrule"))
        body = text[text.index(r"\toprule") : text.index(r"\bottomrule")]
        widths = {len(re.findall(r"(?<!\\)&", line)) for line in body.splitlines() if line.endswith(r"\\")}
        assert len(widths) == 1
        assert not re.search(r"(?<!\\)[_%#]", body), "an unescaped special character"
        assert text.isascii()
        commands = set(re.findall(r"\\([a-zA-Z]+)", text))
        known = "begin end centering caption label toprule midrule bottomrule pm rho usepackage"
        known += " providecommand resizebox ifdim width linewidth else fi"
        assert commands <= set(known.split())
    assert r"pre\_x" in sources[0] + sources[2]
    assert r"easy\_VQA \& more" in "".join(sources)


def test_latex_escapes_every_special_character() -> None:
    escaped = escape_latex("a_b & 5% $x$ {y} #1 ~^ \\")
    assert escaped == r"a\_b \& 5\% \$x\$ \{y\} \#1 \textasciitilde{}\textasciicircum{} \textbackslash{}"


def test_tables_hold_the_numbers_of_the_records(make_study: StudyMaker) -> None:
    folder = make_study()
    paths = write_tables(load_study(folder))
    assert all(path.is_file() for path in paths) and len(paths) == 14
    main = pd.read_csv(folder / "tables" / "main.csv", index_col="variant")
    values = [raw_mean(folder, f"pre-s{seed}") for seed in (0, 1, 2)]
    assert main.loc["pre", "GQA on scenes (generated)"] == pytest.approx(np.mean(values), abs=1e-6)
    assert main.loc["pre", "GQA on scenes (generated) ±"] == pytest.approx(np.std(values, ddof=1), abs=1e-6)
    assert main.loc["majority (no image)", "easy_VQA & more"] == 0.25
    assert main.loc["blind (question text alone)", "easy_VQA & more"] == 0.4
    probes = pd.read_csv(folder / "tables" / "probes.csv", index_col=["variant", "layer"])
    assert probes.loc[("baseline", 2), "accuracy_background"] == pytest.approx(0.69)
    assert probes.loc[("pre", 2), "reduction"] == pytest.approx(0.11)
    assert probes["regularised"].sum() == 1 and probes.loc[("pre", 2), "regularised"]
    degraded = pd.read_csv(folder / "tables" / "degradation.csv", index_col=["attribute", "variant"])
    assert degraded["claim"].tolist() == [True, True, False, False]
    base, pre = degraded.loc[("background", "baseline")], degraded.loc[("background", "pre")]
    # D is .25, .26, .27 over the seeds, the reductions .10, .11, .12: t intervals -/+ 4.3027 * .01 / sqrt(3).
    half = 4.302653 * 0.01 / np.sqrt(3)
    found = [base["degradation"], base["low_degradation"], base["high_degradation"]]
    assert found == pytest.approx([0.26, 0.26 - half, 0.26 + half], abs=1e-6)
    assert [pre["reduction"], pre["low"], pre["high"]] == pytest.approx([0.11, 0.11 - half, 0.11 + half], abs=1e-6)
    assert degraded.loc[("fill", "pre"), ["reference", "degradation", "reduction"]].tolist() == pytest.approx(
        [1.0, 0.01, 0.0], abs=1e-6
    )


def test_every_trained_model_has_a_row(make_study: StudyMaker) -> None:
    folder = make_study()
    write_tables(load_study(folder))
    seeds = pd.read_csv(folder / "tables" / "seeds.csv", index_col=["variant", "seed"])
    assert all(seeds["weights_hash"] == [f"w-{variant}-s{seed}" for variant, seed in seeds.index])
    assert len(seeds) == 6
    assert seeds.loc[("baseline", 1), ["degradation", "degradation_excluded", "lm_loss"]].tolist() == pytest.approx(
        [0.26, 0.95 - (0.79 + 0.59) / 2, 0.6]
    )
    assert seeds.loc[("pre", 1), ["degradation", "reduction"]].tolist() == pytest.approx([0.15, 0.11])
    assert seeds.loc["baseline", ["reduction", "easy_VQA & more gain"]].isna().all().all()
    title = "GQA on scenes (generated)"
    assert seeds.loc[("pre", 2), title] == pytest.approx(raw_mean(folder, "pre-s2"), abs=1e-6)
    gain = raw_mean(folder, "pre-s2") - raw_mean(folder, "baseline-s2")
    assert seeds.loc[("pre", 2), f"{title} gain"] == pytest.approx(gain, abs=1e-6)
    degraded = pd.read_csv(folder / "tables" / "degradation.csv", index_col=["attribute", "variant"])
    reductions = seeds.loc["baseline", "degradation_excluded"] - seeds.loc["pre", "degradation_excluded"]
    assert degraded.loc[("background", "pre"), "reduction_excluded"] == pytest.approx(reductions.mean(), abs=1e-6)


def test_a_seed_without_its_baseline_has_no_gain(make_study: StudyMaker) -> None:
    folder = make_study()
    shutil.rmtree(folder / "runs" / "baseline-s1")
    (folder / "runs" / "pre-s0" / "model" / "prebench.json").write_text('{"regularizer_layer": 2, "lm_loss": null}')
    write_tables(load_study(folder))
    seeds = pd.read_csv(folder / "tables" / "seeds.csv", index_col=["variant", "seed"])
    assert seeds.loc["pre", "reduction"].isna().tolist() == [False, True, False]
    assert seeds.loc["pre", "easy_VQA & more gain"].isna().tolist() == [False, True, False]
    assert seeds.loc["pre", "lm_loss"].isna().tolist() == [True, False, False]


def test_correlation_counts_trained_models(make_study: StudyMaker) -> None:
    few = make_study(seeds=(0, 1, 2), name="few")
    write_tables(load_study(few))
    table = pd.read_csv(few / "tables" / "correlation.csv")
    assert table["n_models"].tolist() == [3, 3]
    assert table["note"].tolist() == ["n too small"] * 2 and table["r"].isna().all()
    many = make_study({"baseline": 0.5, "pre": 0.6, "pre_x": 0.7, "pre_y": 0.8}, name="many")
    for seed in (0, 1, 2):
        write_probe(many / "runs" / f"pre_x-s{seed}", [0.8 - 0.02 * seed] * (LAYERS + 1))
        write_probe(many / "runs" / f"pre_y-s{seed}", [0.7 + 0.01 * seed] * (LAYERS + 1))
    write_tables(load_study(many))
    points = trained_models(load_study(many), "gqa")
    assert points["variant"].unique().tolist() == ["pre", "pre_x", "pre_y"] and len(points) == 9
    row = pd.read_csv(many / "tables" / "correlation.csv").iloc[0]
    centred = points[["reduction", "gain"]] - points.groupby("seed")[["reduction", "gain"]].transform("mean")
    assert row["r"] == pytest.approx(np.corrcoef(centred["reduction"], centred["gain"])[0, 1], abs=1e-6)
    assert row["low"] < row["r"] < row["high"] and 0 < row["p"] <= 1
    assert row["without_low"] <= row["r"] <= row["without_high"]


@pytest.mark.slow
def test_repetition_gives_equal_bytes(make_study: StudyMaker) -> None:
    folder = make_study()
    for run in (folder / "runs").iterdir():
        write_curve(run, [1.5, 1.0, 0.7])
    texts = []
    contents = []
    for _ in range(2):
        study = load_study(folder)
        write_tables(study)
        write_figures(study)
        contents.append(files_of(folder))
        texts.append([summary_text(study), *(render(compare(study, "baseline", "pre"), f) for f in ("text", "csv"))])
    assert contents[0] == contents[1] and len(contents[0]) == 23
    assert texts[0] == texts[1]


def test_figure_is_labelled_svg(make_study: StudyMaker) -> None:
    folder = make_study()
    path, pdf = layer_curves(load_study(folder), folder / "figures" / "layer_curves.svg")
    assert pdf == path.with_suffix(".pdf") and pdf.read_bytes().startswith(b"%PDF")
    root = ElementTree.fromstring(path.read_text())  # noqa: S314
    words = " ".join(root.itertext())
    shown = ("background (unasked): accuracy, %", "fill (asked): accuracy, %", "min to max over seeds")
    for word in (*shown, "baseline", "pre", "encoder", "AUC", "centred difference", "decoder layer"):
        assert word in words
    assert path.stat().st_size < 200_000


def test_study_without_a_probe_still_has_every_table(make_study: StudyMaker) -> None:
    folder = make_study(probe=False)
    study = load_study(folder)
    assert all(path.is_file() for path in write_tables(study))
    assert "no probe results yet" in layer_curves(study, folder / "figures" / "a.svg")[0].read_text()
    assert compare(study, "baseline", "pre").degradation == ()
    assert "degradation" not in summary_text(study)


def test_summary_puts_scores_beside_what_needs_no_image(make_study: StudyMaker) -> None:
    folder = make_study({"baseline": 0.3, "pre": 0.8}, images=60)
    text = summary_text(load_study(folder))
    header = next(line for line in text.splitlines() if line.startswith("task"))
    assert header.split() == ["task", "majority", "blind", "baseline", "pre"]
    line = next(line for line in text.splitlines() if line.startswith("GQA on scenes (generated)"))
    assert "25.0" in line and "40.0" in line
    assert f"{100 * np.mean([raw_mean(folder, f'pre-s{s}') for s in (0, 1, 2)]):.1f} ±" in line
    flat = " ".join(text.split())
    assert "pre reduces it by 11.0 [8.5, 13.5] over 3 seeds" in flat
    assert "higher on GQA on scenes (generated) +" in flat and "Holm's correction over 2 tasks at 5%" in flat


def test_summary_counts_failed_documents(make_study: StudyMaker) -> None:
    folder = make_study(seeds=(0,))
    assert "failed" not in summary_text(load_study(folder))
    run = folder / "runs" / "pre-s0"
    samples = [sample(i, None if i in (3, 8) else 1.0) for i in range(40)]
    write_task(run, "gqa", "GQA on scenes", "generated", samples)
    flat = " ".join(summary_text(load_study(folder)).split())
    assert "GQA on scenes (generated): documents failed and are in no score: 2 of 40 in pre-s0 (reasons:" in flat
    assert "easy_VQA & more" not in flat.split("documents failed")[1].split("degradation")[0].split("difference")[0]


def test_summary_says_what_could_not_be_compared(make_study: StudyMaker) -> None:
    folder = make_study(seeds=(0,))
    path = folder / "runs" / "pre-s0" / "eval" / "gqa.samples.jsonl"
    path.write_text(path.read_text().replace('"prompt_hash": "p3"', '"prompt_hash": "other"'))
    flat = " ".join(summary_text(load_study(folder)).split())
    assert "pre: not compared with baseline: gqa: baseline-s0 and pre-s0 can't be paired" in flat


def test_only_what_is_regularised_is_called_so(make_study: StudyMaker) -> None:
    folder = make_study({"baseline": 0.5, "early": 0.6, "pre": 0.8})
    study = load_study(folder)
    layers = {
        (a, b): [row.layers for row in compare(study, a, b).degradation]
        for a, b in (("pre", "baseline"), ("baseline", "pre"), ("early", "pre"))
    }
    assert layers["pre", "baseline"] == layers["baseline", "pre"] == ["1-3", "1-3 without 2, the regularised one"]
    assert layers["early", "pre"] == ["1-3", "1-3 without 1 and 2, the regularised ones"]
    write_tables(study)
    degraded = pd.read_csv(folder / "tables" / "degradation.csv", index_col=["attribute", "variant"])
    assert degraded.loc["background"].loc[["early", "pre"], "excluded_layers"].tolist() == [1, 2]
    probes = pd.read_csv(folder / "tables" / "probes.csv")
    rows = probes[probes["regularised"]]
    assert list(zip(rows["variant"], rows["layer"], strict=True)) == [("early", 1), ("pre", 2)]


def test_two_variants_that_only_log_have_no_regularised_layer(make_study: StudyMaker) -> None:
    folder = make_study({"baseline": 0.5, "pre": 0.8})
    path = folder / "study.yaml"
    path.write_text(path.read_text().replace("weight: 0.5", "weight: 0.0"))
    study = load_study(folder)
    found = compare(study, "baseline", "pre")
    assert [row.layers for row in found.degradation] == ["1-3"]
    write_tables(study)
    assert not pd.read_csv(folder / "tables" / "probes.csv")["regularised"].any()


@pytest.mark.parametrize("seeds", [(0,), (0, 1, 2)])
def test_a_study_with_probes_alone_has_every_output(make_study: StudyMaker, seeds: tuple[int, ...]) -> None:
    folder = make_study(seeds=seeds)
    for path in folder.glob("runs/*/eval"):
        shutil.rmtree(path)
    study = load_study(folder)
    assert all(path.is_file() for path in write_tables(study))
    layer_curves(study, folder / "figures" / "layer_curves.svg")
    flat = " ".join(summary_text(study).split())
    assert "no task was evaluated yet" in flat and "Degradation of background over layers 1-3: baseline 2" in flat
    assert "Benchmarks, pre against baseline: no task was evaluated for both" in flat
    found = compare(study, "baseline", "pre")
    assert found.tasks == () and found.degradation[0].n_seeds == len(seeds)
    assert any("With fewer than 3 seeds" in note for note in found.notes) == (len(seeds) < 3)
    texts = {form: render(found, form) for form in ("text", "csv", "latex", "json")}
    assert texts["text"].startswith("Degradation of 'background'")
    assert pd.read_csv(io.StringIO(texts["csv"]))["kind"].unique().tolist() == ["degradation"]
