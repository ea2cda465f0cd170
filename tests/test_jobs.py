"""Processes side by side: results, failures and progress reach the parent, and no worker outlives it."""

from __future__ import annotations

import os
import queue
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from prebench import jobs as jobs_module
from prebench.errors import DataError, TrainingError
from prebench.jobs import Job, available_cores, choose_jobs, run_jobs


def write(report, folder: Path, name: str) -> None:
    report(1, "half")
    (folder / name).write_text(str(os.getpid()))
    report(2, "done")


def fail(report, folder: Path, name: str) -> None:
    if name == "bad":
        raise DataError("bad: this one is broken")
    write(report, folder, name)


def die(report, folder: Path, name: str) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def linger(report, folder: Path, name: str) -> None:
    write(report, folder, name)
    time.sleep(60)


def jobs(folder, *names):
    return {name: Job(name, 2, (folder, name)) for name in names}


def test_all_jobs_run_in_processes_of_their_own(tmp_path, capsys):
    run_jobs(write, jobs(tmp_path, "a", "b", "c"), 2)
    pids = {(tmp_path / name).read_text() for name in "abc"}
    assert str(os.getpid()) not in pids
    shown = capsys.readouterr().err
    assert all(f"{name}: done in" in shown for name in "abc")


def mute(report, folder: Path, name: str) -> None:
    """Write, and die so soon that no message comes home."""
    jobs_module._messages = queue.SimpleQueue()
    (folder / name).write_text("done")


def test_a_job_whose_messages_were_lost_is_shown_as_done(tmp_path, capsys):
    run_jobs(mute, jobs(tmp_path, "a", "b"), 2)
    shown = capsys.readouterr().err
    assert all(f"{name}: done in" in shown for name in "ab")


def test_a_users_error_comes_back_as_it_is_and_the_others_finish(tmp_path):
    with pytest.raises(DataError, match="bad: this one is broken"):
        run_jobs(fail, jobs(tmp_path, "bad", "good"), 2)
    assert (tmp_path / "good").exists()


def test_after_a_failure_nothing_more_is_started(tmp_path):
    with pytest.raises(DataError):
        run_jobs(fail, jobs(tmp_path, "bad", "second", "third"), 1)
    assert not list(tmp_path.iterdir())


def test_a_killed_process_is_one_clear_error(tmp_path):
    with pytest.raises(TrainingError, match="a training process died"):
        run_jobs(die, jobs(tmp_path, "a"), 1)


def test_no_worker_outlives_its_parent(tmp_path):
    code = (
        "from pathlib import Path; from prebench.jobs import run_jobs; from tests.test_jobs import jobs, linger\n"
        f"if __name__ == '__main__': run_jobs(linger, jobs(Path({str(tmp_path)!r}), 'a'), 1)"
    )
    script = tmp_path / "parent.py"
    script.write_text(code)
    root = Path(__file__).parent.parent
    parent = subprocess.Popen([sys.executable, str(script)], env=os.environ | {"PYTHONPATH": str(root)}, cwd=tmp_path)
    deadline = time.monotonic() + 60
    while not (tmp_path / "a").exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    worker = int((tmp_path / "a").read_text())
    parent.kill()
    parent.wait()
    while time.monotonic() < deadline:
        try:
            os.kill(worker, 0)
        except ProcessLookupError:
            return
        state = Path(f"/proc/{worker}/stat").read_text().rpartition(")")[2].split()[0]
        if state == "Z":  # dead; whoever adopted it has not collected it yet
            return
        time.sleep(0.05)
    pytest.fail(f"worker {worker} still runs")


def test_how_many():
    assert choose_jobs(None, 6, None, "cpu") == 1
    assert choose_jobs(None, 6, 1, "cuda") == 1
    assert choose_jobs(None, 1, 1, "cpu") == 1
    assert 1 <= choose_jobs(None, 100, 1, "cpu") <= available_cores()
    assert choose_jobs(8, 6, None, "cuda") == 6
    assert choose_jobs(3, 6, 1, "cpu") == 3
