"""The same study twice, and a study killed in every stage, end with the same bytes; nothing finished is done again."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.tiny_study import RUNS, STUDY, TASKS, call, finished, run_command, tables

pytestmark = pytest.mark.slow

TIMEOUT = 300.0


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("first")
    done = call(run_command(folder))
    assert done.returncode == 0, done.stderr[-3000:]
    return folder / STUDY


def test_a_study_twice_gives_equal_bytes(study: Path, tmp_path: Path) -> None:
    done = call(run_command(tmp_path))
    assert done.returncode == 0, done.stderr[-3000:]
    first, second = tables(study), tables(tmp_path / STUDY)
    assert {"scores.csv", "tables/main.csv", "tables/probes.csv", "tables/degradation.csv"} <= first.keys()
    assert second == first


def run_and_kill(folder: Path, when: Callable[[], bool]) -> None:
    """Start the study and kill its process and the processes that it started, without notice, as soon as `when`."""
    process = subprocess.Popen(
        run_command(folder, "--jobs", "1"),  # run after run, so that something is finished at every moment to kill
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
    done = call(run_command(tmp_path))
    assert done.returncode == 0, done.stderr[-3000:]
    after = finished(killed)
    # A record is there once its task is finished; answers without a record are of the task that was cut short.
    assert {path: after.get(path) for path in before} == before
    assert tables(killed) == tables(study)
    assert [path for path in killed.rglob(".*") if path.name != ".lock" and "cache" not in path.parts] == []
