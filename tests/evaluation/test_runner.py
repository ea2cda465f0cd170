"""The whole evaluation on a tiny mirror: records, idempotence, failures."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from prebench.errors import EvaluationError, ModelError
from prebench.evaluation.request import EvaluationRequest, RunRequest, Work, WorkItem, find_task, plan
from prebench.evaluation.runner import run_in_subprocesses, split
from prebench.records import SampleRecord, TaskRecord
from prebench.runtime import data_dir
from prebench.schema import ProbeConfig, TaskConfig
from prebench.store import read_jsonl, read_record
from tests.evaluation.mirror import NUM_IMAGES, QUESTIONS, write_mirror

TASKS = tuple(
    TaskConfig(task=name, label=name, data_source=source, primary_metric="exact_match", num_images=NUM_IMAGES)
    for name, source in (("gqa", "generated"), ("prebench_easy_vqa", "real"))
)
PROBE = ProbeConfig.model_validate(
    {
        "num_train": 30,
        "num_val": 10,
        "num_test": 20,
        "attributes": [{"name": "background", "kind": "unasked"}, {"name": "fill", "kind": "unasked"}],
        "reference_attribute": "background",
    }
)


@pytest.fixture(scope="module")
def mirror(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_mirror(tmp_path_factory.mktemp("mirror"))


def _request(export: Path, folder: Path, **changes) -> EvaluationRequest:
    runs = tuple(
        RunRequest(variant="pre", seed=seed, model_dir=export, run_dir=folder / f"pre-s{seed}") for seed in (0, 1)
    )
    values = {"runs": runs, "tasks": TASKS, "probe": PROBE, "dtype": "float32", "device": "cpu"}
    return EvaluationRequest.model_validate(values | {"references": {"gqa": {"majority": 0.5}}} | changes)


@pytest.fixture(scope="module")
def evaluated(tiny_export: Path, mirror: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs")
    run_in_subprocesses(_request(tiny_export, folder), mirror, folder / "cache")
    return folder


def _samples(folder: Path, task: str) -> list[dict]:
    return list(read_jsonl(folder / "pre-s0" / "eval" / f"{task}.samples.jsonl"))


def test_tasks_are_found_without_importing_lmms_eval(mirror: Path) -> None:
    assert find_task("gqa").dataset_path == "lmms-lab-encoder/GQA"
    assert find_task("vqav2_val").dataset_path == "lmms-lab-encoder/VQAv2"
    assert find_task("prebench_visual_probe").yaml_path.is_relative_to(data_dir("tasks"))
    assert find_task("mmbench_en_dev_static").dataset_path == "lmms-lab-encoder/MMBench"
    with pytest.raises(EvaluationError, match="unknown task 'gqaa'"):
        find_task("gqaa")


def test_missing_data_or_model_is_named_before_anything_runs(tiny_export: Path, tmp_path: Path, mirror: Path) -> None:
    request = _request(tiny_export, tmp_path)
    with pytest.raises(EvaluationError, match=r"task 'gqa': no data set lmms-lab-encoder/GQA .*prebench evaluate"):
        plan(request, tmp_path)
    with pytest.raises(ModelError, match="no exported model"):
        plan(_request(tmp_path / "nothing", tmp_path), mirror)


@pytest.mark.slow
@pytest.mark.parametrize("task", ["gqa", "prebench_easy_vqa"])
def test_records_hold_every_document_and_upstreams_aggregate(evaluated: Path, task: str) -> None:
    record = read_record(evaluated / "pre-s0" / "eval" / f"{task}.json", TaskRecord)
    samples = _samples(evaluated, task)
    assert record.n == len(samples) == NUM_IMAGES * len(QUESTIONS) and record.n_errors == 0
    assert [sample["doc_id"] for sample in samples] == list(range(len(samples)))
    assert record.score == pytest.approx(sum(sample["score"] for sample in samples) / len(samples), abs=1e-12)
    assert record.score == pytest.approx(record.metrics["exact_match"], abs=1e-12)
    assert set(record.hashes) == {"weights", "data", "prompts", "config"}
    assert record.references == ({"majority": 0.5} if task == "gqa" else {})
    assert len({sample["image_id"] for sample in samples}) == NUM_IMAGES
    assert len({sample["image_hash"] for sample in samples}) == NUM_IMAGES
    assert all(sample["question"].endswith("single word or phrase.") for sample in samples)
    assert samples[0]["target"] in ("yes", "no") and samples[0]["category"]


@pytest.mark.slow
def test_equal_weights_give_equal_samples(evaluated: Path) -> None:
    for task in ("gqa", "prebench_easy_vqa"):
        first, second = (evaluated / f"pre-s{s}" / "eval" / f"{task}.samples.jsonl" for s in (0, 1))
        assert first.read_bytes() == second.read_bytes()


@pytest.mark.slow
def test_more_processes_than_runs_share_the_tasks_and_write_the_same(evaluated, tiny_export, mirror, tmp_path) -> None:
    request = _request(tiny_export, tmp_path)
    request = request.model_copy(update={"runs": request.runs[:1]})
    run_in_subprocesses(request, mirror, tmp_path / "cache", jobs=2)
    assert (tmp_path / "cache" / "evaluate-1.log").is_file()
    for task in ("gqa", "prebench_easy_vqa"):
        name = f"pre-s0/eval/{task}.samples.jsonl"
        assert (tmp_path / name).read_bytes() == (evaluated / name).read_bytes()
    pd.testing.assert_frame_equal(*(pd.read_parquet(f / "pre-s0" / "probe.parquet") for f in (tmp_path, evaluated)))


@pytest.mark.parametrize(
    ("jobs", "shares"),
    [
        (1, ["a1 a2 a3 b1 b2 b3"]),
        (2, ["a1 a2 a3", "b1 b2 b3"]),
        (3, ["a1 a3", "a2", "b1 b2 b3"]),
        (5, ["a1", "a2", "a3", "b1 b3", "b2"]),
        (9, ["a1", "a2", "a3", "b1", "b2", "b3"]),
    ],
)
def test_processes_share_runs_and_then_tasks(tmp_path: Path, jobs: int, shares: list[str]) -> None:
    runs = [RunRequest(variant=name, seed=0, model_dir=tmp_path, run_dir=tmp_path) for name in "ab"]
    items = tuple(WorkItem(run=run, task=f"{run.variant}{number}", hashes={}) for run in runs for number in (1, 2, 3))
    work = Work(request=EvaluationRequest(runs=tuple(runs)), items=items, data="")
    assert [" ".join(item.task for item in part.items) for part in split(work, jobs)] == shares


@pytest.mark.slow
def test_the_probe_writes_one_row_per_value(evaluated: Path) -> None:
    rows = pd.read_parquet(evaluated / "pre-s0" / "probe.parquet")
    accuracy = rows[(rows.level == "global") & (rows.metric == "accuracy") & (rows.attribute == "background")]
    assert sorted(accuracy.layer) == [-1, 0, 1, 2, 3, 4] and set(rows.num_layers) == {4}
    assert float(accuracy[accuracy.layer == -1].value.iloc[0]) == 1.0  # brightness is linear in the pixels
    assert {"cohesion", "coupling", "auc"} <= set(rows[rows.level == "patch"].metric)
    assert not list((evaluated / "pre-s0").glob(".probe-*"))


@pytest.mark.slow
def test_a_second_call_computes_nothing(evaluated: Path, tiny_export: Path, mirror: Path, monkeypatch) -> None:
    files = {path: path.stat().st_mtime_ns for path in (evaluated / "pre-s0").rglob("*") if path.is_file()}
    monkeypatch.setattr(subprocess, "Popen", lambda *a, **k: pytest.fail("a subprocess was started"))
    run_in_subprocesses(_request(tiny_export, evaluated), mirror, evaluated / "cache")
    assert files == {path: path.stat().st_mtime_ns for path in (evaluated / "pre-s0").rglob("*") if path.is_file()}


@pytest.mark.slow
def test_other_weights_data_or_settings_are_pending_again(evaluated, tiny_export, mirror, tmp_path) -> None:
    def names(request: EvaluationRequest, folder: Path) -> set[str]:
        return {item.task for item in plan(request, folder).items}

    assert names(_request(tiny_export, evaluated), mirror) == set()
    model = shutil.copytree(tiny_export, tmp_path / "model")
    assert names(_request(model, evaluated), mirror) == set()  # the path is no part of the key
    weights = bytearray((model / "model.safetensors").read_bytes())
    weights[-1] ^= 1
    (model / "model.safetensors").write_bytes(weights)
    assert names(_request(model, evaluated), mirror) == {"gqa", "prebench_easy_vqa", "prebench_visual_probe"}
    other = shutil.copytree(mirror, tmp_path / "mirror")
    (other / "prebench" / "easy_vqa" / "README.md").write_text("other", encoding="utf-8")
    assert names(_request(tiny_export, evaluated), other) == {"prebench_easy_vqa"}
    relabelled = (TASKS[0].model_copy(update={"label": "x"}), TASKS[1])
    assert names(_request(tiny_export, evaluated, tasks=relabelled), mirror) == {"gqa"}
    assert names(_request(tiny_export, evaluated, references={"gqa": {"majority": 0.6}}), mirror) == {"gqa"}


def _broken_mirror(mirror: Path, folder: Path) -> Path:
    """Copy a mirror and break two of the 24 images of easy-VQA (documents 5 and 17)."""
    broken = Path(shutil.copytree(mirror, folder / "mirror"))
    path = broken / "prebench" / "easy_vqa" / "default.parquet"
    table = pq.read_table(path)
    rows = table.to_pylist()
    for index in (5, 17):
        rows[index]["image"]["bytes"] = b"no image"
    pq.write_table(pa.Table.from_pylist(rows, schema=table.schema), path)
    return broken


@pytest.mark.slow
def test_broken_documents_are_recorded_as_errors_and_tried_again_where_there_is_no_result(
    evaluated, tiny_export, mirror, tmp_path, capsys
) -> None:
    request = _request(tiny_export, tmp_path, probe=None, max_error_share=0.1, tasks=TASKS[1:])
    request = request.model_copy(update={"runs": request.runs[:1], "answers": tmp_path / "answers"})
    broken = _broken_mirror(mirror, tmp_path)
    run_in_subprocesses(request, broken, tmp_path / "cache")
    assert "pre-s0 prebench_easy_vqa: 22 documents scored, 2 failed (document 5: " in capsys.readouterr().err
    evaluation = tmp_path / "pre-s0" / "eval"
    record = read_record(evaluation / "prebench_easy_vqa.json", TaskRecord)
    samples = [SampleRecord(**s) for s in read_jsonl(evaluation / "prebench_easy_vqa.samples.jsonl")]
    assert record.n == 24 and record.n_errors == 2
    assert [s.doc_id for s in samples if s.error] == [5, 17]
    assert all((s.score is None) == (s.error is not None) == (s.response is None) for s in samples)
    assert record.score == pytest.approx(record.metrics["exact_match"])

    # Few failures are part of a result, which stands; where fewer are allowed there is none.
    assert not plan(request, broken).items
    assert len(plan(request.model_copy(update={"max_error_share": 0.05}), broken).items) == 1
    # With the images mended, the log gives the answers to all others, but for the one that somebody edited.
    (path,) = (tmp_path / "answers").rglob("prebench_easy_vqa.jsonl")
    lines = path.read_text().split("\n")
    path.write_text("\n".join([*lines[:3], lines[3].replace('"text": "', '"text": "un'), *lines[4:]]))
    run_in_subprocesses(request, mirror, tmp_path / "cache")
    shown = capsys.readouterr().err
    assert f"{path}: 1 damaged or unfinished line ignored and computed again" in shown
    assert "pre-s0 prebench_easy_vqa: 21 of 24 answers were in the answer log\n" in shown
    name = "pre-s0/eval/prebench_easy_vqa.samples.jsonl"
    assert (tmp_path / name).read_bytes() == (evaluated / name).read_bytes()


@pytest.mark.slow
def test_too_many_failures_fail_the_task_alone(evaluated, tiny_export, mirror, tmp_path) -> None:
    """gqa, which is intact, is written all the same. The cache knows the intact mirror and must not answer with it."""
    request = _request(tiny_export, tmp_path, probe=None, tasks=TASKS[::-1])
    request = request.model_copy(update={"runs": request.runs[:1]})
    with pytest.raises(EvaluationError, match=r"2 of 24 documents failed, more than 1.0% \(document 5: ") as raised:
        run_in_subprocesses(request, _broken_mirror(mirror, tmp_path), evaluated / "cache")
    (log,) = re.findall(r"\(more in (.*)\)$", str(raised.value))
    assert "Traceback" in Path(log).read_text() and "in evaluate_task" in Path(log).read_text()
    assert sorted(p.name for p in (tmp_path / "pre-s0" / "eval").iterdir()) == ["gqa.json", "gqa.samples.jsonl"]


@pytest.mark.slow
def test_a_dead_subprocess_is_one_clear_line(tiny_export, mirror, tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("PYTHONHOME", str(tmp_path / "nowhere"))
    with pytest.raises(EvaluationError, match=r"the evaluation process ended with code 1: .*more in .*evaluate-0.log"):
        run_in_subprocesses(_request(tiny_export, tmp_path), mirror, tmp_path / "cache")
