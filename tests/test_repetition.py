"""The same study twice, killed in every stage, or called again, ends with the same bytes; nothing is done again."""

from __future__ import annotations

import hashlib
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from prebench.store import read_json
from tests.tiny_study import ALONE, RUNS, STUDY, TASKS, assert_refused, call, finished, run_command, tables

pytestmark = pytest.mark.slow

TIMEOUT = 300.0


@pytest.fixture(scope="module")
def study(tiny_results: Path) -> Path:
    return tiny_results / STUDY


@pytest.fixture
def copy(study: Path, tmp_path: Path) -> Path:
    """A study to go on with."""
    return Path(shutil.copytree(study, tmp_path / STUDY))


def weights(study: Path) -> dict[str, str]:
    return {run: read_json(study / "runs" / run / "model" / "prebench.json")["weights_hash"] for run in RUNS}


def test_a_study_twice_gives_equal_bytes_whatever_runs_side_by_side(study: Path, tmp_path: Path) -> None:
    done = call(run_command(tmp_path, "--jobs", "2"))
    assert done.returncode == 0, done.stderr[-3000:]
    assert_equal(tmp_path / STUDY, study)


def assert_equal(other: Path, study: Path) -> None:
    first, second = tables(study), tables(other)
    assert {"scores.csv", "tables/main.csv", "tables/probes.csv", "figures/layer_curves.svg"} <= first.keys()
    assert second == first
    assert weights(other) == weights(study)


def everything(study: Path) -> dict[Path, tuple[int, str]]:
    """Return time of change and hash of every file."""
    paths = (path for path in study.rglob("*") if path.is_file() and path.name != ".lock" and "cache" not in path.parts)
    return {path: (path.stat().st_mtime_ns, hashlib.sha256(path.read_bytes()).hexdigest()) for path in sorted(paths)}


def test_a_repeated_run_changes_nothing_and_a_damaged_export_is_named(copy: Path) -> None:
    before = {path: known[1] for path, known in everything(copy).items()}
    done = call(run_command(copy.parent))
    assert done.returncode == 0, done.stderr[-3000:]
    assert {path: known[1] for path, known in everything(copy).items()} == before
    path = copy / "runs" / "pre-s0" / "model" / "model.safetensors"
    content = bytearray(path.read_bytes())
    content[-100] ^= 1
    path.write_bytes(bytes(content))
    assert_refused(call(run_command(copy.parent)), "weights differ from their manifest")


def test_an_added_seed_runs_only_what_is_new(copy: Path) -> None:
    before = {run: everything(copy / "runs" / run) for run in RUNS}
    done = call(run_command(copy.parent, "--seeds", "1", *ALONE))
    assert done.returncode == 0, done.stderr[-3000:]
    assert sorted(path.name for path in (copy / "runs").iterdir()) == ["baseline-s0", "baseline-s1", "pre-s0", "pre-s1"]
    assert {run: everything(copy / "runs" / run) for run in RUNS} == before
    assert "baseline-s1" in done.stderr and "baseline-s0" not in done.stderr


def run_and_kill(folder: Path, when: Callable[[], bool]) -> None:
    """Start the study and kill its process and the processes that it started, without notice, as soon as `when`."""
    process = subprocess.Popen(
        run_command(folder, *ALONE),  # run after run, so that something is finished at every moment to kill
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    start = time.monotonic()
    while not when():
        assert process.poll() is None, "the study ended before the moment to kill it"
        assert time.monotonic() - start < TIMEOUT
        time.sleep(0.002)
    os.killpg(process.pid, signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL


def test_a_study_killed_in_every_stage_ends_with_the_bytes_of_the_undisturbed(study: Path, tmp_path: Path) -> None:
    killed = tmp_path / STUDY
    baseline, pre = (killed / "runs" / run for run in RUNS)
    first, second = (f"eval/{task}.json" for task in TASKS)
    stages: dict[str, tuple[Callable[[], bool], Callable[[], bool]]] = {
        # name: (when to kill, what must still be missing then)
        "training": (
            lambda: (pre / "train.jsonl").exists() and (pre / "train.jsonl").stat().st_size > 0,
            lambda: (baseline / "model" / "prebench.json").exists() and not (pre / "model").exists(),
        ),
        "evaluation": (lambda: (baseline / first).exists(), lambda: not (baseline / second).exists()),
        "probing": (
            lambda: any(baseline.glob(".probe-*")),
            lambda: (baseline / second).exists() and not (baseline / "probe.parquet").exists(),
        ),
    }
    before: dict[Path, tuple[int, str]] = {}
    for name, (when, missing) in stages.items():
        run_and_kill(tmp_path, when)
        assert missing(), f"{name}: killed too late"
        assert not (killed / "scores.csv").exists()
        after = finished(killed)
        assert {path: after.get(path) for path in before} == before, f"{name}: finished work was done again"
        assert len(after) > len(before)
        before = after
    done = call(run_command(tmp_path, *ALONE))
    assert done.returncode == 0, done.stderr[-3000:]
    after = finished(killed)
    # A record is there once its task is finished; answers without a record are of the task that was cut short.
    assert {path: after.get(path) for path in before} == before
    assert_equal(killed, study)
    assert [path for path in killed.rglob(".*") if path.name != ".lock" and "cache" not in path.parts] == []
