"""The whole chain through the real command line: train, export, lmms-eval, probe, tables, and going on."""

from __future__ import annotations

import csv
import hashlib
import os
import subprocess
import sys
from pathlib import Path

import pytest

from prebench.records import TaskRecord
from prebench.store import read_json, read_jsonl, read_record
from tests.evaluation.command import lmms_eval_command, run_lmms_eval

pytestmark = pytest.mark.slow

RUNS = ("baseline-s0", "pre-s0")
TASKS = ("gqa", "prebench_easy_vqa")
NUM_COMPARED = 200
LOAD_WITHOUT_PREBENCH = """
import sys
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor

model = AutoModelForImageTextToText.from_pretrained(sys.argv[1])
processor = AutoProcessor.from_pretrained(sys.argv[1])
turn = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "what color is the circle?"}]}
text = processor.apply_chat_template([turn], add_generation_prompt=True)
inputs = processor(images=[Image.new("RGB", (64, 64), "red")], text=text, return_tensors="pt")
assert model.generate(**inputs, max_new_tokens=3).shape[1] > inputs["input_ids"].shape[1]
assert not [name for name in sys.modules if name.split(".")[0] == "prebench"]
assert not [name for name, _ in model.named_parameters() if "predictor" in name]
"""


def prebench(*arguments: object, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "prebench.cli", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False, cwd=cwd, timeout=900)


def contents(folder: Path) -> dict[str, str]:
    files = (p for p in sorted(folder.rglob("*")) if p.is_file() and p.name != ".lock" and "cache" not in p.parts)
    return {str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest() for p in files}


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("results")
    done = prebench("run", "--suite", "smoke", "--results", folder)
    assert done.returncode == 0, done.stderr[-3000:]
    (folder / "printed.txt").write_text(done.stdout)
    return folder


@pytest.fixture(scope="module")
def study(results: Path) -> Path:
    return results / "smoke-smoke"


def test_the_run_prints_tables_and_paths(results, study):
    printed = (results / "printed.txt").read_text()
    for part in ("majority", "blind", "baseline", "pre", "easy-VQA", "GQA on scenes", "degradation", "scores.csv"):
        assert part in printed
    assert "With one seed per variant nothing can be concluded" in " ".join(printed.split())
    listed = [line.strip() for line in printed.partition("written:")[2].splitlines() if line.strip()]
    assert len(listed) >= 8
    assert all(Path(path).is_file() for path in listed)


def test_scores_agree_with_the_records(study):
    with (study / "scores.csv").open() as file:
        rows = [row for row in csv.DictReader(file) if row["primary"] == "True"]
    assert {(row["variant"], row["task"]) for row in rows} == {(v, t) for v in ("baseline", "pre") for t in TASKS}
    for row in rows:
        record = read_record(study / "runs" / f"{row['variant']}-s0" / "eval" / f"{row['task']}.json", TaskRecord)
        samples = list(read_jsonl(study / "runs" / f"{row['variant']}-s0" / "eval" / f"{row['task']}.samples.jsonl"))
        assert float(row["value"]) == pytest.approx(record.score, abs=1e-6)
        assert sum(s["score"] for s in samples) / len(samples) == pytest.approx(record.score, abs=1e-9)
        assert record.metrics[record.primary_metric] == pytest.approx(record.score, abs=1e-9)
        assert (record.n_errors, record.n) == (0, len(samples))


def test_variants_saw_the_same_data_and_prompts(study):
    logs = [list(read_jsonl(study / "runs" / run / "train.jsonl")) for run in RUNS]
    assert [line["batch_hash"] for line in logs[0]] == [line["batch_hash"] for line in logs[1]]
    assert logs[0][0]["lm_loss"] == logs[1][0]["lm_loss"]
    for task in TASKS:
        samples = [list(read_jsonl(study / "runs" / run / "eval" / f"{task}.samples.jsonl")) for run in RUNS]
        for a, b in zip(*samples, strict=True):
            assert (a["doc_id"], a["prompt_hash"], a["image_hash"]) == (b["doc_id"], b["prompt_hash"], b["image_hash"])


def test_the_export_loads_where_prebench_is_never_imported(study):
    subprocess.run(
        [sys.executable, "-c", LOAD_WITHOUT_PREBENCH, str(study / "runs" / "pre-s0" / "model")], check=True, timeout=300
    )
    assert not list((study / "runs").rglob("*.bin")) + list((study / "runs").rglob("*.pt"))


def test_upstreams_llava_hf_gives_the_same_answers(study, tmp_path):
    arguments = f"pretrained={study / 'runs' / 'pre-s0' / 'model'},device_map=cpu,device=cpu,dtype=float32"
    found = run_lmms_eval(study / "mirror", tmp_path, "llava_hf", arguments, "gqa", "--limit", str(NUM_COMPARED))
    samples = read_jsonl(study / "runs" / "pre-s0" / "eval" / "gqa.samples.jsonl")
    ours = {s["doc_id"]: s["response"].strip() for s in samples if s["doc_id"] < NUM_COMPARED}
    assert len(ours) == len(found["texts"]) == NUM_COMPARED
    equal = sum(found["texts"][doc_id] == text for doc_id, text in ours.items())
    assert equal >= 0.99 * NUM_COMPARED


def test_the_lmms_eval_command_equals_prebench_evaluate(study, tmp_path):
    arguments = f"pretrained={study / 'runs' / 'pre-s0' / 'model'}"
    found = run_lmms_eval(study / "mirror", tmp_path, "prebench_pre", arguments, "gqa")
    record = read_record(study / "runs" / "pre-s0" / "eval" / "gqa.json", TaskRecord)
    assert found["score"] == pytest.approx(record.score, abs=1e-12)


def test_an_export_of_another_variant_is_refused(study, tmp_path):
    arguments = f"pretrained={study / 'runs' / 'pre-s0' / 'model'}"
    # lmms-eval logs a model's error and exits with 0: what counts is that it has no results and names the reason.
    done = lmms_eval_command(study / "mirror", tmp_path, "prebench_baseline", arguments, "gqa", "--limit", "1")
    assert not list(tmp_path.rglob("*_results.json"))
    assert "prebench_baseline" in done.stderr and "'pre'" in done.stderr


@pytest.mark.parametrize("form", ["text", "csv", "latex", "json"])
def test_compare_in_every_format(results, form, tmp_path):
    done = prebench("compare", "baseline", "pre", "--results", results, "--format", form, "-o", tmp_path / "out")
    assert done.returncode == 0, done.stderr
    text = (tmp_path / "out").read_text()
    assert "gqa" in text.lower()
    marks = {"text": "95% interval", "csv": "difference,low,high", "latex": r"\toprule", "json": '"tasks"'}
    assert marks[form] in text


def test_compare_of_a_variant_that_was_not_run(results):
    done = prebench("compare", "baseline", "viral", "--results", results)
    assert done.returncode == 2
    assert "'viral' was not run" in done.stderr and len(done.stderr.splitlines()) == 1


def test_a_repeated_run_changes_nothing(results, study):
    before = contents(study)
    done = prebench("run", "--suite", "smoke", "--results", results)
    assert done.returncode == 0, done.stderr
    assert contents(study) == before


def test_a_damaged_export_is_named(results, study, tmp_path):
    weights = study / "runs" / "pre-s0" / "model" / "model.safetensors"
    original = weights.read_bytes()
    damaged = bytearray(original)
    damaged[-100] ^= 1
    try:
        weights.write_bytes(bytes(damaged))
        done = prebench("run", "--suite", "smoke", "--results", results)
    finally:
        weights.write_bytes(original)
    assert done.returncode == 2
    assert "weights differ from their manifest" in done.stderr


def test_an_interrupted_study_goes_on_and_equals_the_uninterrupted(results, study, tmp_path):
    command = [sys.executable, "-m", "prebench.cli", "run", "--suite", "smoke", "--results", str(tmp_path)]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True)
    assert process.stderr is not None
    for line in process.stderr:
        if line.startswith("train baseline-s0: done"):
            os.kill(process.pid, 9)
            break
    process.communicate()
    assert not (tmp_path / "smoke-smoke" / "scores.csv").exists()
    done = prebench("run", "--suite", "smoke", "--results", tmp_path)
    assert done.returncode == 0, done.stderr[-2000:]
    for name in ("scores.csv", "tables/main.csv", "tables/probes.csv", "tables/main.tex", "figures/layer_curves.svg"):
        assert (tmp_path / "smoke-smoke" / name).read_bytes() == (study / name).read_bytes(), name
    for run in RUNS:
        manifests = [
            read_json(root / "runs" / run / "model" / "prebench.json") for root in (tmp_path / "smoke-smoke", study)
        ]
        assert manifests[0]["weights_hash"] == manifests[1]["weights_hash"]


def test_an_added_seed_runs_only_what_is_new(results, study):
    before = {run: contents(study / "runs" / run) for run in RUNS}
    times = {p: p.stat().st_mtime_ns for run in RUNS for p in (study / "runs" / run).rglob("*") if p.is_file()}
    done = prebench("run", "--suite", "smoke", "--results", results, "--seeds", "1")
    assert done.returncode == 0, done.stderr[-2000:]
    assert sorted(p.name for p in (study / "runs").iterdir()) == ["baseline-s0", "baseline-s1", "pre-s0", "pre-s1"]
    assert {run: contents(study / "runs" / run) for run in RUNS} == before
    assert {p: p.stat().st_mtime_ns for p in times} == times
    assert "baseline-s1" in done.stderr and "baseline-s0" not in done.stderr
