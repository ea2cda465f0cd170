"""The whole chain through the real command line: train, export, lmms-eval, probe, tables."""

from __future__ import annotations

import csv
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner

from prebench.cli import main
from prebench.records import TaskRecord
from prebench.store import read_jsonl, read_record
from tests.evaluation.command import run_lmms_eval
from tests.tiny_study import RUNS, TASKS, assert_refused, call, command

pytestmark = pytest.mark.slow

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


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("results")
    done = call(command("run", "--suite", "smoke", "--results", folder))
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
    found = run_lmms_eval(study / "mirror", tmp_path, "llava_hf", arguments, "gqa", limit=NUM_COMPARED)["gqa"]
    samples = read_jsonl(study / "runs" / "pre-s0" / "eval" / "gqa.samples.jsonl")
    ours = {s["doc_id"]: s["response"].strip() for s in samples if s["doc_id"] < NUM_COMPARED}
    assert len(ours) == len(found["texts"]) == NUM_COMPARED
    equal = sum(found["texts"][doc_id] == text for doc_id, text in ours.items())
    assert equal >= 0.99 * NUM_COMPARED


def test_the_lmms_eval_command_equals_prebench_evaluate(study, tmp_path):
    run = study / "runs" / "pre-s0"
    found = run_lmms_eval(study / "mirror", tmp_path, "prebench_pre", f"pretrained={run / 'model'}", *TASKS)
    for task in TASKS:
        record = read_record(run / "eval" / f"{task}.json", TaskRecord)
        assert found[task]["score"] == pytest.approx(record.score, abs=1e-12)
        samples = read_jsonl(run / "eval" / f"{task}.samples.jsonl")
        assert found[task]["texts"] == {s["doc_id"]: s["response"].strip() for s in samples}, task


@pytest.mark.parametrize("form", ["text", "csv", "latex", "json"])
def test_compare_in_every_format(results, form, tmp_path):
    arguments = ["compare", "baseline", "pre", "--results", results, "--format", form, "-o", tmp_path / "out"]
    done = CliRunner().invoke(main, [str(a) for a in arguments])
    assert done.exit_code == 0, done.output
    text = (tmp_path / "out").read_text()
    assert "gqa" in text.lower()
    marks = {"text": "95% interval", "csv": "difference,low,high", "latex": r"\toprule", "json": '"tasks"'}
    assert marks[form] in text


def test_compare_of_a_variant_that_was_not_run(results):
    done = call(command("compare", "baseline", "viral", "--results", results))
    assert_refused(done, "'viral' was not run")
    assert len(done.stderr.splitlines()) == 1
