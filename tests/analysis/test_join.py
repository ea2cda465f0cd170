"""Reading a study: pairing, refusals, and one clear line for each kind of bad input."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pyarrow.parquet as pq
import pytest

from prebench.analysis import degradation
from prebench.analysis.join import find_study, load_study, paired_samples, scores_frame
from prebench.errors import ComparisonError, ConfigError, StoreError
from prebench.records import PROBE_HASHES, middle_layers
from prebench.store import read_json, write_json

from .conftest import StudyMaker, sample, write_task


def replace_gqa(folder: Path, run: str, samples: list) -> None:
    write_task(folder / "runs" / run, "gqa", "GQA on scenes", "generated", samples)


def test_scores_are_tidy_and_carry_provenance(make_study: StudyMaker) -> None:
    frame = scores_frame(load_study(make_study()))
    assert len(frame) == 2 * 3 * 2 * 2  # variants x seeds x tasks x metrics
    assert frame.groupby(["variant", "seed", "task"])["primary"].sum().eq(1).all()
    row = frame[(frame["variant"] == "pre") & (frame["seed"] == 1) & (frame["task"] == "gqa") & frame["primary"]]
    assert row[["majority", "blind", "weights_hash", "data_source"]].iloc[0].tolist() == [
        0.25,
        0.4,
        "w-pre-s1",
        "generated",
    ]


def test_documents_are_paired_by_id_whatever_their_order(make_study: StudyMaker) -> None:
    folder = make_study(seeds=(0,))
    replace_gqa(folder, "baseline-s0", [sample(i, float(i % 2)) for i in range(8)])
    replace_gqa(folder, "pre-s0", [sample(i, float(i < 2)) for i in reversed(range(8))])
    pairs = paired_samples(load_study(folder), "gqa", "baseline", "pre")
    assert pairs.frame["doc_id"].tolist() == list(range(8))
    assert pairs.frame["score_a"].tolist() == [0, 1, 0, 1, 0, 1, 0, 1]
    assert pairs.frame["score_b"].tolist() == [1, 1, 0, 0, 0, 0, 0, 0]
    assert pairs.frame["image_id"].nunique() == 2


def test_a_failed_document_is_dropped_from_every_run_and_counted(make_study: StudyMaker) -> None:
    folder = make_study(seeds=(0, 1))
    for run in ("baseline-s0", "baseline-s1", "pre-s1"):
        replace_gqa(folder, run, [sample(i, 1.0) for i in range(8)])
    replace_gqa(folder, "pre-s0", [sample(i, None if i == 3 else 1.0) for i in range(8)])
    pairs = paired_samples(load_study(folder), "gqa", "baseline", "pre")
    assert pairs.n_dropped == 1
    assert pairs.frame.groupby("seed").size().tolist() == [7, 7]
    assert 3 not in set(pairs.frame["doc_id"])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"prompt_hash": "other"}, r"pre-s0 .*1 of 8 documents have another prompt \(first: 2\)"),
        ({"image_hash": "other"}, r"1 of 8 documents have another image \(first: 2\)"),
        ({"doc_id": 999}, r"8 and 8 documents, 2 of them in one run only \(first: 2, in baseline-s0\)"),
    ],
)
def test_documents_that_differ_are_refused(make_study: StudyMaker, change: dict[str, object], message: str) -> None:
    folder = make_study(seeds=(0,))
    replace_gqa(folder, "baseline-s0", [sample(i, 1.0) for i in range(8)])
    replace_gqa(folder, "pre-s0", [sample(i, 1.0, **(change if i == 2 else {})) for i in range(8)])
    with pytest.raises(ComparisonError, match=message):
        paired_samples(load_study(folder), "gqa", "baseline", "pre")


def test_a_document_that_failed_before_it_had_a_prompt_is_dropped(make_study: StudyMaker) -> None:
    folder = make_study(seeds=(0,))
    failed = sample(2, None, prompt_hash="", image_hash="")
    replace_gqa(folder, "baseline-s0", [sample(i, 1.0) if i != 2 else failed for i in range(8)])
    replace_gqa(folder, "pre-s0", [sample(i, 1.0) for i in range(8)])
    pairs = paired_samples(load_study(folder), "gqa", "baseline", "pre")
    assert pairs.n_dropped == 1 and 2 not in set(pairs.frame["doc_id"])
    replace_gqa(folder, "pre-s0", [sample(i, 1.0, **({"prompt_hash": "other"} if i == 3 else {})) for i in range(8)])
    with pytest.raises(ComparisonError, match=r"1 of 7 documents have another prompt \(first: 3\)"):
        paired_samples(load_study(folder), "gqa", "baseline", "pre")


def test_documents_without_an_image_are_clusters_of_their_own(make_study: StudyMaker) -> None:
    folder = make_study(seeds=(0,))
    for run in ("baseline-s0", "pre-s0"):
        replace_gqa(folder, run, [sample(i, 1.0, image_id="", image_hash="") for i in range(8)])
    pairs = paired_samples(load_study(folder), "gqa", "baseline", "pre")
    assert pairs.frame["image_id"].nunique() == 8


def test_unknown_study_and_empty_results_folder(make_study: StudyMaker, tmp_path: Path) -> None:
    folder = make_study(seeds=(0,))
    with pytest.raises(StoreError, match=r"unknown study 'tiny-q'.*did you mean 'tiny-p'"):
        load_study(folder.parent / "tiny-q")
    with pytest.raises(StoreError, match="no study in the results folder"):
        load_study(tmp_path / "nowhere" / "tiny-p")
    assert find_study(folder.parent) == folder


def test_the_latest_study_is_the_default(make_study: StudyMaker) -> None:
    import os

    old, new = make_study(seeds=(0,), name="old"), make_study(seeds=(0,), name="new")
    os.utime(new / "study.yaml", (2e9, 2e9))
    assert find_study(new.parent) == new
    os.utime(old / "study.yaml", (3e9, 3e9))
    assert find_study(new.parent) == old
    # A stored reference study has tables and no runs: nothing can be compared in it.
    shutil.rmtree(old / "runs")
    assert find_study(new.parent) == new


def test_variant_that_was_not_run_names_those_that_were(make_study: StudyMaker) -> None:
    study = load_study(make_study(seeds=(0,)))
    with pytest.raises(ComparisonError, match=r"'per' was not run \(did you mean 'pre'\? run so far: baseline, pre\)"):
        study.of_variant("per")


def test_study_without_results(make_study: StudyMaker) -> None:
    folder = make_study(seeds=(0,))
    shutil.rmtree(folder / "runs")
    with pytest.raises(StoreError, match="has no results yet"):
        load_study(folder)


def test_damaged_files_are_named(make_study: StudyMaker) -> None:
    folder = make_study(seeds=(0,))
    run = folder / "runs" / "pre-s0"
    probe = (run / "probe.parquet").read_bytes()
    (run / "probe.parquet").write_bytes(b"not parquet")
    with pytest.raises(StoreError, match=r"pre-s0/probe\.parquet: can't be read as Parquet"):
        load_study(folder)
    (run / "probe.parquet").write_bytes(probe)
    manifest = (run / "model" / "prebench.json").read_bytes()
    (run / "model" / "prebench.json").write_text("[]")
    with pytest.raises(StoreError, match=r"prebench\.json: the whole number 'regularizer_layer' is missing"):
        load_study(folder)
    (run / "model" / "prebench.json").write_bytes(manifest)
    path = run / "eval" / "gqa.samples.jsonl"
    path.write_text(path.read_text() * 2)
    with pytest.raises(StoreError, match="occurs twice"):
        load_study(folder).runs["pre", 0].samples("gqa")
    path.write_text('{"doc_id": 0}\n')
    with pytest.raises(StoreError, match=r"gqa\.samples\.jsonl.*'image_id' is missing"):
        load_study(folder).runs["pre", 0].samples("gqa")
    (run / "eval" / "gqa.json").write_text("{")
    with pytest.raises(StoreError, match=r"gqa\.json"):
        load_study(folder)
    (folder / "study.yaml").write_text("name: [")
    with pytest.raises(ConfigError, match="malformed YAML"):
        load_study(folder)


def test_results_in_the_wrong_folder_are_refused(make_study: StudyMaker) -> None:
    folder = make_study(seeds=(0,))
    source = folder / "runs" / "baseline-s0" / "eval" / "gqa.json"
    (folder / "runs" / "pre-s0" / "eval" / "gqa.json").write_bytes(source.read_bytes())
    with pytest.raises(StoreError, match="variant and seed are 'baseline' and 0"):
        load_study(folder)


def test_degradation_by_hand(make_study: StudyMaker) -> None:
    study = load_study(make_study(seeds=(0, 1)))
    found = degradation.of_study(study)["baseline", 0]
    assert list(middle_layers(4)) == [1, 2, 3]
    assert list(middle_layers(6)) == [2, 3, 4]
    assert found.over_middle() == pytest.approx(0.95 - (0.8 + 0.7 + 0.6) / 3)
    assert found.over_middle(excluded={2}) == pytest.approx(0.95 - (0.8 + 0.6) / 2)
    assert found.per_layer[4] == pytest.approx(0.45)
    frame = degradation.reductions(study, "baseline", "pre")
    assert frame["reduction"].tolist() == pytest.approx([0.10, 0.11])
    assert frame["reduction_excluded"].tolist() == pytest.approx([(0.85 + 0.75 - 0.8 - 0.6) / 2, 0.11])
    assert frame["excluded_layers"].tolist() == [(2,), (2,)]


def test_the_regularised_layers_of_both_variants_are_left_out(make_study: StudyMaker) -> None:
    # The baseline logs at layer 2 with weight 0; `early` regularises layer 1 and `pre` layer 2.
    folder = make_study({"baseline": 0.5, "early": 0.6, "pre": 0.8}, seeds=(0,))
    study = load_study(folder)
    for a, b in (("early", "pre"), ("pre", "early")):
        frame = degradation.reductions(study, a, b)
        assert frame["excluded_layers"].tolist() == [(1, 2)]
        assert frame["d_baseline_excluded"].tolist() == pytest.approx([0.95 - 0.75])
    for a, b in (("baseline", "early"), ("early", "baseline")):
        assert degradation.reductions(study, a, b)["excluded_layers"].tolist() == [(1,)]
    manifest = folder / "runs" / "early-s0" / "model" / "prebench.json"
    write_json(manifest, {"regularizer_layer": 4})
    frame = degradation.reductions(load_study(folder), "baseline", "early")
    assert frame["excluded_layers"].tolist() == [()] and frame["reduction_excluded"].isna().all()


def set_hashes(run: Path, task: str, **hashes: str) -> None:
    path = run / "eval" / f"{task}.json"
    write_json(path, read_json(path) | {"hashes": hashes})


def set_probe_hashes(run: Path, hashes: str) -> None:
    table = pq.read_table(run / "probe.parquet")
    pq.write_table(table.replace_schema_metadata({PROBE_HASHES: hashes}), run / "probe.parquet")


def test_records_of_different_weights_are_refused(make_study: StudyMaker) -> None:
    folder = make_study(seeds=(0,))
    run = folder / "runs" / "pre-s0"
    set_hashes(run, "gqa", weights="new", data="data")
    match = r"pre-s0: records of different weights \(gqa: new, prebench_easy_vqa: w-pre-s0\); `prebench evaluate`"
    with pytest.raises(StoreError, match=match):
        load_study(folder)
    set_hashes(run, "gqa")
    with pytest.raises(StoreError, match=r"records of different weights \(gqa: no hash"):
        load_study(folder)


def test_a_probe_of_other_weights_is_refused(make_study: StudyMaker) -> None:
    folder = make_study(seeds=(0,))
    run = folder / "runs" / "pre-s0"
    set_probe_hashes(run, '{"weights": "w-pre-s0"}')
    assert ("pre", 0) in load_study(folder).runs
    set_probe_hashes(run, '{"weights": "old"}')
    with pytest.raises(StoreError, match=r"pre-s0: records of different weights .*probe\.parquet: old"):
        load_study(folder)
    for damaged in ("{", "[]"):
        set_probe_hashes(run, damaged)
        with pytest.raises(StoreError, match=r"probe\.parquet: .*delete it to probe the run again"):
            load_study(folder)


@pytest.mark.parametrize(
    ("hashes", "differs"),
    [
        ({"weights": "w", "data": "other"}, "data"),
        ({"weights": "w", "data": "data", "prompts": "p", "config": "c"}, "config, prompts"),
        ({}, "data, weights"),
    ],
)
def test_runs_evaluated_differently_are_not_paired(
    make_study: StudyMaker, hashes: dict[str, str], differs: str
) -> None:
    folder = make_study(seeds=(0, 1))
    for task in ("gqa", "prebench_easy_vqa"):
        set_hashes(folder / "runs" / "pre-s1", task, **hashes)
    match = f"gqa: baseline-s0 and pre-s1 can't be paired: the hashes of {differs} differ; `prebench evaluate`"
    with pytest.raises(ComparisonError, match=match):
        paired_samples(load_study(folder), "gqa", "baseline", "pre")


def test_records_that_all_lack_hashes_are_paired(make_study: StudyMaker) -> None:
    folder = make_study(seeds=(0,))
    for run in ("baseline-s0", "pre-s0"):
        for task in ("gqa", "prebench_easy_vqa"):
            set_hashes(folder / "runs" / run, task)
    assert paired_samples(load_study(folder), "gqa", "baseline", "pre").seeds == (0,)


def test_a_run_with_a_probe_alone_counts(make_study: StudyMaker) -> None:
    folder = make_study(seeds=(0, 1))
    shutil.rmtree(folder / "runs" / "pre-s1" / "eval")
    study = load_study(folder)
    assert study.runs["pre", 1].tasks == {}
    assert study.common_seeds("baseline", "pre") == [0, 1]
    assert study.common_seeds("baseline", "pre", "gqa") == [0]
    assert degradation.reductions(study, "baseline", "pre")["seed"].tolist() == [0, 1]


def test_probe_without_the_reference_is_refused(make_study: StudyMaker) -> None:
    folder = make_study(seeds=(0,))
    path = folder / "runs" / "pre-s0" / "probe.parquet"
    frame = pd.read_parquet(path)
    frame[frame["layer"] >= 0].to_parquet(path)
    with pytest.raises(StoreError, match="no accuracy of 'background' at layer -1"):
        degradation.of_study(load_study(folder))


def test_analysis_never_imports_torch() -> None:
    code = (
        "import sys, prebench.analysis.compare, prebench.analysis.tables, prebench.analysis.plots, "
        "prebench.analysis.summary; sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
