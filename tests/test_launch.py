"""`--launch`: training in the processes of a launcher, the rest here; errors, interruptions, and who holds what."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from prebench.config import load_preset, load_suite, load_variant
from prebench.errors import ConfigError, InterruptedRunError, StoreError, TrainingError
from prebench.evaluation import runner
from prebench.launch import launched, note_failure, note_worker, train_command
from prebench.pipeline import chosen_runs
from prebench.runtime import visible_gpus
from prebench.schema import StudyConfig
from prebench.study import Run, in_turn, locked, run_locked, shared
from tests.tiny_study import STUDY, assert_refused, call, run_command

TWO = "accelerate launch --multi_gpu --num_processes 2 --num_machines 1 --mixed_precision no --dynamo_backend no"


def test_the_command_names_study_and_runs(tmp_path):
    found = train_command("accelerate launch --num_processes 2", tmp_path / "s", ["pre-s0"])
    assert found[:6] == ["accelerate", "launch", "--num_processes", "2", "-m", "prebench.cli"]
    assert found[6:] == ["train", "--study", "s", "--results", str(tmp_path), "--run", "pre-s0"]


@pytest.mark.parametrize("words", ["no-such-launcher --x", "", "accelerate 'launch"])
def test_a_launcher_that_is_not_there_is_refused(tmp_path, words):
    assert_refused(call(run_command(tmp_path, "--launch", words)), "--launch")
    assert not (tmp_path / STUDY).exists()


def test_a_dry_run_prints_the_command(tmp_path):
    done = call(run_command(tmp_path, "--launch", TWO, "--dry-run"))
    line = next(line for line in done.stdout.splitlines() if line.startswith("launch"))
    assert line.split(maxsplit=1)[1] == f"{TWO} -m prebench.cli train --study {STUDY} --results {tmp_path}"
    assert not (tmp_path / STUDY).exists()


def test_a_launcher_inside_a_launcher_is_refused(tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ConfigError, match="started by a launcher already"):
        train_command("accelerate launch", tmp_path / "s", [])


WORKER = """
import os, sys, time
from prebench.errors import InterruptedRunError, TrainingError
from prebench.launch import note_failure, note_worker
from prebench.runtime import sigterm_noted
with sigterm_noted() as stop:
    note_worker()
    if sys.argv[1] == "fail":
        note_failure(TrainingError("batch_size 8 is no multiple of 3"))
        os._exit(2)
    print("ready", flush=True)
    while sys.argv[1] == "wait" and not stop():
        time.sleep(0.05)
    if sys.argv[1] == "wait":
        note_failure(InterruptedRunError("interrupted after step 3"))
    os._exit(1 if sys.argv[1] != "good" else 0)
"""


def worker(kind: str) -> list[str]:
    return [sys.executable, "-c", WORKER, kind]


def test_a_launcher_that_ends_well(tmp_path):
    launched(worker("good"), tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_the_error_of_a_worker_is_the_commands_error(tmp_path):
    with pytest.raises(TrainingError, match="batch_size 8 is no multiple of 3"):
        launched(worker("fail"), tmp_path)
    with pytest.raises(TrainingError, match="ended with code 1, its output says why"):
        launched(worker("bad"), tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_sigterm_reaches_the_workers(tmp_path):
    """The launcher in between must not get it: half a minute later it would kill them in the middle of a checkpoint."""
    launcher = "import signal, subprocess, sys; signal.signal(signal.SIGTERM, lambda *_: sys.exit(99));"
    launcher += "sys.exit(subprocess.call(sys.argv[1:]))"
    inner = worker("wait")
    script = (
        "import sys; from pathlib import Path; from prebench.errors import PrebenchError; from prebench.launch import "
        "launched\ntry:\n    launched(sys.argv[2:], Path(sys.argv[1]))\nexcept PrebenchError as error:\n"
        "    print(error); sys.exit(error.exit_code)"
    )
    arguments = [sys.executable, "-c", script, str(tmp_path), sys.executable, "-c", launcher, *inner]
    with subprocess.Popen(arguments, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        process.send_signal(signal.SIGTERM)
        assert process.stdout.read() == "interrupted after step 3\n"
    assert process.returncode == InterruptedRunError.exit_code
    assert list(tmp_path.iterdir()) == []


def test_outside_a_launch_nothing_is_noted(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    note_worker()
    note_failure(TrainingError("x"))
    assert list(tmp_path.iterdir()) == []


def test_runs_are_held_one_by_one_and_the_study_by_many(tmp_path):
    one, other = (Run("pre", seed, tmp_path / "runs" / f"pre-s{seed}") for seed in (0, 1))
    with shared(tmp_path), shared(tmp_path), run_locked(one), run_locked(other):
        with pytest.raises(StoreError, match="another prebench process trains this run"), run_locked(one):
            pass
        with pytest.raises(StoreError, match="another prebench process works on this study"), locked(tmp_path):
            pass
    with locked(tmp_path), pytest.raises(StoreError, match="works on this study"), shared(tmp_path):
        pass


def test_a_file_system_without_locks_is_named(tmp_path, monkeypatch):
    def refuse(*_: object) -> None:
        raise OSError(37, "No locks available")

    monkeypatch.setattr("fcntl.flock", refuse)
    with (
        pytest.raises(StoreError, match=r"can't lock files \(No locks available\).*Lustre: -o flock"),
        shared(tmp_path),
    ):
        pass


def test_only_one_is_in_its_turn(tmp_path):
    script = (
        "import sys, time; from pathlib import Path; from prebench.study import in_turn\n"
        "with in_turn(Path(sys.argv[1])):\n    print('in', flush=True); time.sleep(0.5); print('out', flush=True)"
    )
    with subprocess.Popen([sys.executable, "-c", script, str(tmp_path)], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "in\n"
        started = time.monotonic()
        with in_turn(tmp_path):
            assert time.monotonic() - started > 0.2
            assert process.stdout.readline() == "out\n"


def test_runs_are_evaluated_on_all_gpus(tmp_path, monkeypatch):
    """There is none here: what is tested is which process would see which."""
    work = SimpleNamespace(data="d", items=[SimpleNamespace(run=SimpleNamespace(name=name)) for name in "abc"])
    started = []

    class Child:
        def __init__(self, part: str, _number: int, _mirror: Path, _cache: Path, environment: dict[str, str]) -> None:
            started.append((part, environment.get("CUDA_VISIBLE_DEVICES")))

        def join(self) -> None: ...

        def problem(self) -> None: ...

    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,6")
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    monkeypatch.setattr(runner, "plan", lambda *_: work)
    monkeypatch.setattr(runner, "split", lambda work, jobs: [item.run.name for item in work.items])
    monkeypatch.setattr(runner, "_Child", Child)
    runner.run_in_subprocesses(SimpleNamespace(device="auto"), tmp_path, tmp_path)
    assert started == [("a", "4"), ("b", "6"), ("c", "4")]
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    assert visible_gpus() == ["0", "1"]
    monkeypatch.setattr("torch.cuda.device_count", lambda: 0)
    assert visible_gpus() == []


def test_an_unknown_run_is_refused(tmp_path):
    variants = (load_variant("baseline"),)
    config = StudyConfig(
        name="s", preset=load_preset("smoke"), suite=load_suite("smoke"), variants=variants, seeds=(0,)
    )
    with pytest.raises(ConfigError, match=r"--run: unknown run .baseline-s1. .did you mean .baseline-s0."):
        chosen_runs(tmp_path, config, ["baseline-s1"])
    assert [run.name for run in chosen_runs(tmp_path, config)] == ["baseline-s0"]
