"""The real command, killed, asked to end, out of disk and with damaged files: the same command ends with equal bytes.

More moments than in a test: `PREBENCH_KILLS=20 pytest -m slow tests/train/test_survival.py` (some seconds each).
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from prebench.config import load_preset, load_suite, load_variant
from prebench.errors import InterruptedRunError
from prebench.schema import StudyConfig
from prebench.study import open_study
from tests.command_forks import Forks, Started
from tests.tiny_study import SETTINGS, assert_refused, call, command

pytestmark = pytest.mark.slow

KILLS = int(os.environ.get("PREBENCH_KILLS", "2"))
STEPS = {"train.align.steps": 12, "train.instruct.steps": 28, "train.log_every": 1, "train.checkpoint_every": 4}
TOTAL = 40
TIMEOUT = 300.0
ALONE: tuple[object, ...] = ("--jobs", 1)


def make_study(results: Path, variants: tuple[str, ...] = ("pre",), **changes: object) -> Path:
    settings = SETTINGS | STEPS | {name.replace("__", "."): value for name, value in changes.items()}
    config = StudyConfig(
        name="s",
        preset=load_preset("smoke", [f"{name}={value}" for name, value in settings.items()]),
        suite=load_suite("smoke"),
        variants=tuple(load_variant(name) for name in variants),
        seeds=(0,),
    )
    open_study(results / "s", config)
    return results / "s"


def train_command(study: Path, *more: object, processes: int = 1) -> list[str]:
    arguments = command("train", "--study", study.name, "--results", study.parent, *more)
    launcher = ["-m", "torch.distributed.run", "--nproc-per-node", str(processes), "--standalone"]
    return [arguments[0], *launcher, *arguments[1:]] if processes > 1 else arguments


def start(arguments: list[str]) -> subprocess.Popen[str]:
    return subprocess.Popen(
        arguments,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )


@pytest.fixture(scope="module")
def forks(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Forks]:
    with Forks(tmp_path_factory.mktemp("forks")) as found:
        yield found


def wait_until(process: subprocess.Popen[str] | Started, happened: Callable[[], bool]) -> None:
    deadline = time.monotonic() + TIMEOUT
    while not happened():
        ended = process.ended() if isinstance(process, Started) else process.poll() is not None
        assert not ended, "ended too early"
        assert time.monotonic() < deadline
        time.sleep(0.001)


def num_lines(run: Path) -> int:
    path = run / "train.jsonl"
    return path.read_bytes().count(b"\n") if path.is_file() else 0


def result(run: Path) -> tuple[str, list[dict[str, object]]]:
    """Return the hash of the trained weights and the log without its times."""
    assert not (run / "checkpoints").exists()
    digest = hashlib.sha256((run / "model" / "model.safetensors").read_bytes()).hexdigest()
    lines = [json.loads(line) for line in (run / "train.jsonl").read_text().splitlines()]
    return digest, [{name: value for name, value in line.items() if name != "seconds"} for line in lines]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory, forks: Forks) -> tuple[str, list[dict[str, object]]]:
    study = make_study(tmp_path_factory.mktemp("plain"), train__checkpoint_every=0)
    done = forks.call(train_command(study, *ALONE))
    assert done.returncode == 0, done.stderr[-3000:]
    return result(study / "runs" / "pre-s0")


def start_all(forks: Forks, study: Path, processes: int) -> list[Started]:
    """Start the training command in so many processes, with the variables that torchrun sets."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    found = []
    for rank in map(str, range(processes)):
        ranks = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": str(processes), "LOCAL_WORLD_SIZE": str(processes)}
        launched = ranks | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        found.append(forks.start(train_command(study, *ALONE), **launched if processes > 1 else {}))
    return found


def kill_at(forks: Forks, study: Path, lines: int, delay: float, processes: int) -> None:
    """Kill training `delay` seconds after its log has `lines` lines, whatever it is doing then."""
    started = start_all(forks, study, processes)
    wait_until(started[0], lambda: num_lines(study / "runs" / "pre-s0") >= lines)
    time.sleep(delay)
    for process in started:
        process.send(signal.SIGKILL)
    # The first writes; another may have noticed its end before it was killed.
    codes = [process.wait() for process in started]
    assert codes[0] == -signal.SIGKILL


@pytest.mark.parametrize("processes", [1, 2])
def test_killed_at_random_moments_of_both_stages_it_ends_with_the_bytes_of_the_undisturbed(
    tmp_path, request, forks, processes
):
    study = make_study(tmp_path / "killed")
    if processes == 1:
        expected = request.getfixturevalue("undisturbed")
    else:
        plain = make_study(tmp_path / "plain", train__checkpoint_every=0)
        assert call(train_command(plain, *ALONE, processes=processes)).returncode == 0
        expected = result(plain / "runs" / "pre-s0")
    moments = random.Random(KILLS)  # noqa: S311
    for number in range(KILLS):
        lines = 1 + (TOTAL - 12) * number // KILLS + moments.randrange(3)
        kill_at(forks, study, lines, moments.uniform(0, 0.05), processes)
        assert not (study / "runs" / "pre-s0" / "model").exists(), "killed too late"
    started = start_all(forks, study, processes)
    assert [process.wait() for process in started] == [0] * processes, started[0].stderr()[-3000:]
    assert "pre-s0: goes on after step" in started[0].stderr()
    assert result(study / "runs" / "pre-s0") == expected


def test_sigterm_a_full_disk_and_a_flipped_byte_one_after_the_other(tmp_path, forks, undisturbed):
    study = make_study(tmp_path)
    run = study / "runs" / "pre-s0"
    process = forks.start(train_command(study, *ALONE))
    wait_until(process, lambda: num_lines(run) >= 8)
    process.send(signal.SIGTERM)
    ended, said = process.wait(), process.stderr()
    assert ended == InterruptedRunError.exit_code, said
    assert "Traceback" not in said and "the same command goes on there" in said.splitlines()[-1]
    saved = sorted(path.name for path in (run / "checkpoints").iterdir())
    # The log ends at the step that is saved: nothing is lost.
    assert saved[-1] == f"step-{num_lines(run):08d}"

    full = forks.call(train_command(study, *ALONE), file_limit=60_000)  # the log fits, the language model does not
    saved = sorted(path.name for path in (run / "checkpoints").iterdir())
    assert_refused(full, "can't be written", f"kept: {saved[-1]}; make room and start the same command again")
    assert len(saved) == 2, "the half of a checkpoint is left"

    weights = run / "checkpoints" / saved[-1] / "weights.safetensors"
    content = bytearray(weights.read_bytes())
    content[-100] ^= 1
    weights.write_bytes(bytes(content))
    done = forks.call(train_command(study, *ALONE))
    assert done.returncode == 0, done.stderr[-3000:]
    assert "WARNING" in done.stderr and "weights.safetensors differs from its hash" in done.stderr
    assert result(run) == undisturbed


def test_sigterm_reaches_workers_and_a_vanished_worker_costs_the_others_nothing(tmp_path, undisturbed):
    study = make_study(tmp_path, ("baseline", "pre"))
    folders = [study / "runs" / name for name in ("baseline-s0", "pre-s0")]
    both = train_command(study, "--jobs", 2)
    process = start(both)
    wait_until(process, lambda: min(map(num_lines, folders)) >= 3)
    process.terminate()
    _, said = process.communicate()
    assert process.returncode == InterruptedRunError.exit_code and "Traceback" not in said, said
    assert all(list((folder / "checkpoints").glob("step-*")) for folder in folders)
    before = [num_lines(folder) for folder in folders]

    process = start(both)
    wait_until(process, lambda: all(num_lines(f) > n for f, n in zip(folders, before, strict=True)))
    os.kill(worker_of(process.pid), signal.SIGKILL)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 2 and "a training process died" in said.splitlines()[-1], said
    assert "Traceback" not in said

    done = call(train_command(study, *ALONE))
    assert done.returncode == 0, done.stderr[-3000:]
    assert result(folders[1]) == undisturbed


def worker_of(parent: int) -> int:
    """Return one of the processes that train for this one."""
    children = Path(f"/proc/{parent}/task/{parent}/children").read_text().split()
    return max(int(pid) for pid in children if "spawn_main" in Path(f"/proc/{pid}/cmdline").read_text())
