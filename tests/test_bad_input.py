"""Damaged data, damaged weights, a full disk, results that do not fit together: one line, exit code 2, nothing lost."""

from __future__ import annotations

import resource
import shutil
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from click.testing import CliRunner

from prebench.cli import main
from prebench.data.mirror import file_record
from prebench.errors import ModelError
from prebench.model import sources
from prebench.model.builder import build_tokenizer
from prebench.records import TaskRecord
from prebench.schema import ModelConfig
from prebench.store import read_json, read_jsonl, read_record, write_json
from prebench.study import LOCK_FILE
from tests.tiny_study import ALONE, STUDY, assert_refused, call, command, finished, tables


def invoke(*arguments: object) -> str:
    """Run a command line that must be refused in one line, and return this line."""
    result = CliRunner().invoke(main, [str(a) for a in arguments])
    assert result.exit_code == 2, result.output
    assert isinstance(result.exception, SystemExit)
    lines = [line for line in result.stderr.splitlines() if line.startswith("prebench:")]
    assert len(lines) == 1, result.stderr
    return lines[0]


def flip(path: Path, place: int) -> None:
    content = bytearray(path.read_bytes())
    content[place] ^= 1
    path.write_bytes(content)


# --- pretrained parts ----------------------------------------------------------------------------------------


@pytest.fixture
def parts(tmp_path: Path) -> Path:
    return Path(shutil.copytree(sources.PRETRAINED, tmp_path / "pretrained"))


def test_a_flipped_byte_in_a_copied_tower_is_named_before_training(parts: Path, tmp_path: Path) -> None:
    weights = parts / "vision_tower" / "model.safetensors"
    flip(weights, -100)
    chosen = f"model.vision_tower.pretrained={weights.parent}"
    line = invoke("run", "--suite", "smoke", "--results", tmp_path / "results", "--set", chosen)
    assert f"{weights}: damaged (hash" in line and "prebench pretrain" in line
    assert {path.name for path in tmp_path.glob("results/*/runs/*/*")} <= {".lock"}


def test_a_tower_without_a_manifest_is_read_or_named(parts: Path, tmp_path: Path) -> None:
    (parts / "manifest.json").unlink()
    weights = parts / "vision_tower" / "model.safetensors"
    flip(weights, 20)
    chosen = f"model.vision_tower.pretrained={weights.parent}"
    line = invoke("run", "--suite", "smoke", "--results", tmp_path / "results", "--set", chosen)
    assert f"{weights.parent}: the vision tower can't be read" in line


@pytest.mark.parametrize("name", ["vision_tower/model.safetensors", "tokenizer/tokenizer.json"])
@pytest.mark.parametrize("damage", ["flip", "delete"])
def test_the_shipped_parts_are_checked(parts: Path, monkeypatch: pytest.MonkeyPatch, name: str, damage: str) -> None:
    monkeypatch.setattr(sources, "PRETRAINED", parts)
    before = sources.parts_hash(ModelConfig())
    assert before == sources.parts_hash(ModelConfig())
    flip(parts / name, -50) if damage == "flip" else (parts / name).unlink()
    with pytest.raises(ModelError, match=rf"{name}: .*prebench pretrain"):
        sources.parts_hash(ModelConfig())


def test_a_damaged_tokenizer_is_named(parts: Path) -> None:
    flip(parts / "tokenizer" / "tokenizer.json", 1000)
    with pytest.raises(ModelError, match=r"tokenizer/tokenizer\.json: damaged"):
        build_tokenizer(parts / "tokenizer")
    (parts / "manifest.json").write_text("[]")
    with pytest.raises(ModelError, match=r"manifest\.json: damaged"):
        build_tokenizer(parts / "tokenizer")


def test_pretraining_to_a_place_that_takes_no_files_is_refused_at_once(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    line = invoke("pretrain", "--to", tmp_path / "file" / "parts")
    assert f"{tmp_path / 'file' / 'parts'}" in line and "can't be written" in line
    assert (tmp_path / "file").read_text() == "mine"


# --- a finished study ----------------------------------------------------------------------------------------


@pytest.fixture
def study(tiny_results: Path, tmp_path: Path) -> Path:
    """A copy to damage."""
    return Path(shutil.copytree(tiny_results / STUDY, tmp_path / "results" / STUDY))


def prebench(study: Path, name: str, *more: str, limit: int | None = None):
    """Run one command on the study; `limit` is the largest file that the machine takes, in bytes."""

    def full_disk() -> None:
        if limit is not None:
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))

    return call(command(name, "--results", study.parent, *more), full_disk)


@pytest.mark.slow
@pytest.mark.parametrize("damage", [Path.unlink, lambda path: flip(path, -100)], ids=["missing", "flipped"])
def test_a_damaged_mirror_is_named_and_results_stay(study: Path, damage: Callable[[Path], None]) -> None:
    path = next(study.glob("mirror/prebench/easy_vqa/**/*.parquet"))
    damage(path)
    before = finished(study)
    for name in ("evaluate", "probe"):
        line = invoke(name, "--results", study.parent)
        assert f"{path.relative_to(study.parent)}" in line and "delete" in line and "to build it again" in line
    assert finished(study) == before


def truncate_images(study: Path, count: int) -> set[int]:
    """Cut pictures of easy-VQA in half, as a mirror of one's own may have them; return the documents."""
    path = next(study.glob("mirror/prebench/easy_vqa/**/*.parquet"))
    table = pq.read_table(path)
    rows = table.to_pylist()
    for row in rows[:count]:
        row["image"]["bytes"] = row["image"]["bytes"][: len(row["image"]["bytes"]) // 2]
    pq.write_table(pa.Table.from_pylist(rows, schema=table.schema), path)
    manifest = read_json(study / "mirror" / "mirror.json")
    manifest["tasks"]["prebench_easy_vqa"]["files"][str(path.relative_to(study / "mirror"))] = file_record(path)
    write_json(study / "mirror" / "mirror.json", manifest)
    return set(range(count))


@pytest.mark.slow
def test_a_truncated_picture_is_an_error_that_the_totals_show(study: Path) -> None:
    broken = truncate_images(study, 3)
    others = {path: known for path, known in finished(study).items() if "prebench_easy_vqa" not in path.name}
    done = prebench(study, "evaluate", *ALONE)
    assert done.returncode == 0, done.stderr[-3000:]
    for run in ("baseline-s0", "pre-s0"):
        evaluation = study / "runs" / run / "eval"
        samples = list(read_jsonl(evaluation / "prebench_easy_vqa.samples.jsonl"))
        assert {s["doc_id"] for s in samples if s["error"]} == broken
        assert "truncated" in samples[0]["error"] and samples[0]["score"] is None
        assert read_record(evaluation / "prebench_easy_vqa.json", TaskRecord).n_errors == 3
    assert {path: known for path, known in finished(study).items() if path in others} == others
    assert CliRunner().invoke(main, ["report", "--results", str(study.parent)]).exit_code == 0
    assert ",3," in next(line for line in (study / "scores.csv").read_text().splitlines() if "easy_vqa" in line)
    compared = CliRunner().invoke(main, ["compare", "baseline", "pre", "--results", str(study.parent)])
    assert "left out of all runs: easy-VQA 3" in " ".join(compared.stdout.split())


@pytest.mark.slow
def test_too_many_truncated_pictures_are_one_line_and_earlier_results_stay(study: Path) -> None:
    count = len(list(read_jsonl(study / "runs" / "pre-s0" / "eval" / "prebench_easy_vqa.samples.jsonl")))
    truncate_images(study, count // 2)
    before = finished(study)
    done = prebench(study, "evaluate", *ALONE)
    assert_refused(done, f"baseline-s0 prebench_easy_vqa: {count // 2} of {count} documents failed, more than 20.0%")
    assert finished(study) == before


# --- a full disk ---------------------------------------------------------------------------------------------
# A limit on the size of a file stands for it: it needs no privileges and strikes at the chosen file.


def ask_for_another_seed(study: Path) -> None:
    path = study / "study.yaml"
    path.write_text(yaml.safe_dump(yaml.safe_load(path.read_text()) | {"seeds": [0, 1]}, sort_keys=False))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("limit", "jobs", "parts"),
    [
        (6_000, 1, ["-s1/train.jsonl: can't be written", "finished runs and checkpoints are kept"]),
        (50_000, 2, ["-s1/model: the model can't be written", "the finished runs are kept"]),
    ],
    ids=["log", "export"],
)
def test_a_disk_that_is_full_in_training(study: Path, limit: int, jobs: int, parts: list[str]) -> None:
    ask_for_another_seed(study)
    before = finished(study)
    assert_refused(prebench(study, "train", "--jobs", str(jobs), limit=limit), *parts)
    assert finished(study) == before
    # Of two that train side by side either may be the first to fail.
    left = {path.name for run in study.glob("runs/*-s1") for path in run.iterdir()}
    assert left - {LOCK_FILE} == {"train.jsonl"}
    done = prebench(study, "train", *ALONE)
    assert done.returncode == 0, done.stderr[-3000:]
    assert (study / "runs" / "pre-s1" / "model" / "prebench.json").is_file()
    after = finished(study)
    assert {path: after[path] for path in before} == before


@pytest.mark.slow
def test_a_disk_that_is_full_in_evaluation(study: Path, tiny_results: Path) -> None:
    evaluation = study / "runs" / "pre-s0" / "eval"
    # First the cache of `datasets` does not fit; where it is there already, the answers do not.
    for part in ("can't be loaded: OSError", "prebench_easy_vqa.samples.jsonl: can't be written"):
        for path in evaluation.glob("prebench_easy_vqa.*"):
            path.unlink()
        before = finished(study)
        assert_refused(prebench(study, "evaluate", *ALONE, limit=6_000), part, "File too large")
        assert finished(study) == before
        assert sorted(path.name for path in evaluation.iterdir()) == ["gqa.json", "gqa.samples.jsonl"]
        done = prebench(study, "evaluate", *ALONE)
        assert done.returncode == 0, done.stderr[-3000:]
        assert tables(study) == tables(tiny_results / STUDY)


# --- results that do not fit together ------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda lines: [lines[0].replace('"prompt_hash": "', '"prompt_hash": "0'), *lines[1:]], "have another prompt"),
        (lambda lines: lines[1:], "1 of them in one run only (first: 0, in baseline-s0)"),
    ],
    ids=["prompt", "removed"],
)
def test_documents_that_differ_between_two_variants_are_not_compared(
    study: Path, damage: Callable[[list[str]], list[str]], message: str
) -> None:
    path = study / "runs" / "pre-s0" / "eval" / "gqa.samples.jsonl"
    path.write_text("".join(line + "\n" for line in damage(path.read_text().splitlines())))
    before = finished(study)
    line = invoke("compare", "baseline", "pre", "--results", study.parent)
    assert "gqa: baseline-s0 and pre-s0 can't be paired" in line and message in line
    assert finished(study) == before
