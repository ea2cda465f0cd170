"""No connection is opened: not with the embedded data, nor on a mirror of real benchmarks with unreadable pictures."""

from __future__ import annotations

import io
import os
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from prebench.images import pixel_hash, to_rgb
from prebench.records import TaskRecord
from prebench.store import read_json, read_jsonl, read_record
from tests import hub_server
from tests.published import GQA, MMSTAR, POPE, picture, spoil, write_data_sets
from tests.socket_guard import SocketGuard
from tests.tiny_study import SETTINGS, assert_refused, command, run_command

SUITE = """
defaults: {preset: smoke}
max_error_share: 0.5
tasks:
  - {task: gqa, label: GQA, data_source: real, primary_metric: exact_match}
  - {task: pope, label: POPE, data_source: real, primary_metric: pope_accuracy}
  - {task: mmstar, label: MMStar, data_source: real, primary_metric: average}
  - {task: prebench_easy_vqa, label: easy-VQA, data_source: real, primary_metric: exact_match, num_images: 5}
probe:
  num_train: 40
  num_val: 10
  num_test: 20
  attributes: [{name: background, kind: unasked}]
  reference_attribute: background
"""


def call(arguments: list[str], **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        arguments,
        capture_output=True,
        text=True,
        check=False,
        timeout=600,
        env=os.environ | {"OMP_NUM_THREADS": "1"} | environment,
    )


@pytest.fixture
def guard(tmp_path: Path) -> SocketGuard:
    return SocketGuard(tmp_path / "guard")


def test_the_guard_sees_sockets_of_children_and_lets_local_ones_pass(guard):
    code = (
        "import socket, subprocess, sys\n"
        "a, b = socket.socketpair(); a.send(b'x'); assert b.recv(1) == b'x'\n"
        "udp = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)\n"
        "for use in (lambda: socket.create_connection(('127.0.0.1', 9)), lambda: udp.sendto(b'x', ('127.0.0.1', 9)),\n"
        "            lambda: udp.bind(('0.0.0.0', 0)), lambda: socket.getaddrinfo('localhost', 80)):\n"
        "    try: use()\n"
        "    except PermissionError as error: assert 'socket guard' in str(error)\n"
        "    else: raise AssertionError\n"
        "if sys.argv[1:]: subprocess.run([sys.executable, '-P', '-c', open(sys.argv[1]).read()], check=True)\n"
    )
    (guard.folder / "code.py").write_text(code)
    done = call([sys.executable, "-c", code, str(guard.folder / "code.py")], **guard.environment)
    assert done.returncode == 0, done.stderr
    assert len(guard.guarded()) == 2 and len(guard.opened()) == 8
    assert len({line.split()[0] for line in guard.opened()}) == 2


@pytest.mark.slow
def test_a_run_with_embedded_data_opens_no_connection(guard, tmp_path):
    arguments = run_command(tmp_path / "results", "--variants", "baseline", train__instruct__steps=2)
    done = call(arguments, **guard.environment)
    assert done.returncode == 0, done.stderr[-3000:]
    assert guard.opened() == []
    assert any("prebench.evaluation.runner" in line for line in guard.guarded())


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Data sets of which each holds a damaged and an empty picture."""
    root = tmp_path_factory.mktemp("published")
    folders = write_data_sets(root)
    spoil(folders[GQA] / "testdev_balanced_images.parquet", {1: b"\x89PNG\r\n\x1a\nno more", 4: b""})
    spoil(folders[POPE] / "default.parquet", {0: b"", 4: b"JFIF"})
    whole = picture(folders[MMSTAR] / "default.parquet", 2)
    spoil(folders[MMSTAR] / "default.parquet", {2: whole[: len(whole) // 2], 5: b""})
    return folders


UNREADABLE = {
    "gqa": {document for document in range(24) if document % 6 in (1, 4)},
    "pope": {0, 4},
    "mmstar": {2, 5},
    "prebench_easy_vqa": set(),
}
"""Documents of the damaged and the empty picture; in gqa the table of pictures is joined by name."""


def picture_of(folders: dict[str, Path], task: str, document: int) -> bytes:
    if task == "gqa":
        return picture(folders[GQA] / "testdev_balanced_images.parquet", document % 6)
    return picture(folders[{"pope": POPE, "mmstar": MMSTAR}[task]] / "default.parquet", document)


def contents(folder: Path) -> dict[Path, int]:
    return {path: path.stat().st_mtime_ns for path in folder.rglob("*")}


@pytest.mark.slow
def test_a_run_on_a_mirror_opens_no_connection_and_asks_about_no_unreadable_picture(guard, published, tmp_path):
    suite, mirror, results = tmp_path / "real.yaml", tmp_path / "mirror", tmp_path / "results"
    suite.write_text(SUITE)
    with hub_server.running() as hub:
        for repo, folder in published.items():
            hub.publish(repo, folder)
        done = call(command("mirror", "--suite", suite, "--to", mirror), HF_ENDPOINT=hub.url)
    assert done.returncode == 0, done.stderr[-3000:]
    entries = read_json(mirror / "mirror.json")["tasks"]
    assert {name: len(entry.get("unreadable", [])) for name, entry in entries.items()} == {
        **dict.fromkeys(("gqa", "pope", "mmstar"), 2),
        **dict.fromkeys(("prebench_easy_vqa", "prebench_visual_probe"), 0),
    }
    before = contents(mirror)

    chosen = SETTINGS | {"train.instruct.steps": 2}
    sets = [part for name, value in chosen.items() for part in ("--set", f"{name}={value}")]
    line = command("run", "--suite", suite, "--variants", "baseline", "--results", results, *sets)
    refused = call(line)
    assert_refused(
        refused, "real data are needed for gqa, pope, mmstar", "`prebench mirror --suite real.yaml --to DIR`"
    )
    assert not results.exists()
    done = call([*line, "--mirror", str(mirror)], **guard.environment)
    assert done.returncode == 0, done.stderr[-3000:]
    assert guard.opened() == []
    assert any("prebench.evaluation.runner" in line for line in guard.guarded())
    assert contents(mirror) == before

    study = results / "real-smoke"
    assert str(tmp_path) not in (study / "study.yaml").read_text()
    evaluation = study / "runs" / "baseline-s0" / "eval"
    for task, unreadable in UNREADABLE.items():
        samples = list(read_jsonl(evaluation / f"{task}.samples.jsonl"))
        assert {sample["doc_id"] for sample in samples if sample["error"]} == unreadable, task
        record = read_record(evaluation / f"{task}.json", TaskRecord)
        assert (record.n, record.n_errors) == (len(samples), len(unreadable))
        for sample in samples:
            if sample["doc_id"] in unreadable:
                assert "unreadable when the mirror was made: " in sample["error"]
                assert sample["response"] is None and sample["score"] is None
            elif task != "prebench_easy_vqa":
                with Image.open(io.BytesIO(picture_of(published, task, sample["doc_id"]))) as image:
                    assert sample["image_hash"] == pixel_hash(to_rgb(image)), (task, sample["doc_id"])

    again = call(command("evaluate", "--results", results))
    assert_refused(again, "real data are needed for gqa, pope, mmstar", "--mirror DIR or set PREBENCH_MIRROR=DIR")
    again = call(command("evaluate", "--results", results), PREBENCH_MIRROR=str(mirror), **guard.environment)
    assert again.returncode == 0, again.stderr[-3000:]
    assert "every task has been scored already" in again.stderr
    assert guard.opened() == []
