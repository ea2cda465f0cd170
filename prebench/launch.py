"""Training through a launcher that the user names (`--launch "accelerate launch --num_processes 8"`).

The launcher is a subprocess and starts `prebench train` as often as it wants; this process waits, passes SIGTERM on to
the workers and gives back the error of the first one. Both sides meet in a folder beside the runs.
"""

from __future__ import annotations

import contextlib
import json
import os
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from prebench.errors import ConfigError, InterruptedRunError, PrebenchError, TrainingError
from prebench.runtime import num_processes, process_index, sigterm_noted
from prebench.store import write_json

VARIABLE = "PREBENCH_LAUNCH"
"""Names the folder where both sides meet."""
WORKER, FAILED = "worker-", "failed-"
SECONDS = 0.5
"""Between two looks at whether SIGTERM came."""


def train_command(launch: str, folder: Path, names: Sequence[str]) -> list[str]:
    """Return the command that trains runs of a study.

    Args:
        launch: the launcher's words.
        folder: the study.
        names: runs; none: all that are missing.

    Raises:
        ConfigError: there is no such program, or this process was itself started by a launcher.
    """
    try:
        words = shlex.split(launch)
    except ValueError as error:
        raise ConfigError(f"--launch {launch!r}: {error}") from error
    if not words or shutil.which(words[0], path=_path()) is None:
        raise ConfigError(f"--launch {launch!r}: no such program; write a launcher, such as 'accelerate launch'")
    if num_processes() > 1:
        raise ConfigError("--launch: this process was started by a launcher already; leave one of the two out")
    chosen = [part for name in names for part in ("--run", name)]
    arguments = ["--study", folder.name, "--results", str(folder.parent), *chosen]
    return [*words, "-m", "prebench.cli", "train", *arguments]


def launched(command: Sequence[str], folder: Path) -> None:
    """Run such a command to its end.

    Args:
        command: of `train_command`.
        folder: the study.

    Raises:
        InterruptedRunError: SIGTERM came, here or to the workers; a checkpoint is written.
        TrainingError: a worker failed, with its message, or the launcher.
    """
    meeting = Path(tempfile.mkdtemp(dir=folder, prefix=".launch-"))
    try:
        with sigterm_noted() as stop:
            environment = os.environ | {"PATH": _path(), VARIABLE: str(meeting.resolve())}
            with subprocess.Popen(command, env=environment) as process:  # noqa: S603
                code = _wait(process, meeting, stop)
            stopped = stop()
        error = _first_error(meeting)
    finally:
        shutil.rmtree(meeting, ignore_errors=True)
    if stopped:
        raise (
            error
            if isinstance(error, InterruptedRunError)
            else InterruptedRunError("interrupted; what was computed is saved and the same command goes on")
        )
    if code:
        raise error or TrainingError(
            f"--launch: {shlex.join(command)} ended with code {code}, its output says why; finished runs and "
            "checkpoints are kept and the same command goes on there"
        )


def note_worker() -> None:
    """Tell the process that waits behind the launcher, if there is one, of this worker; called once at the start."""
    meeting = os.environ.get(VARIABLE)
    if meeting is not None and Path(meeting).is_dir():
        write_json(
            Path(meeting) / f"{WORKER}{process_index()}.json", {"host": socket.gethostname(), "pid": os.getpid()}
        )


def note_failure(error: PrebenchError) -> None:
    """Tell it how this worker ends."""
    meeting = os.environ.get(VARIABLE)
    if meeting is not None and Path(meeting).is_dir():
        content = {"message": str(error), "exit_code": error.exit_code}
        write_json(Path(meeting) / f"{FAILED}{process_index()}.json", content)


def _wait(process: subprocess.Popen[bytes], meeting: Path, stop: Callable[[], bool]) -> int:
    told = False
    while True:
        try:
            return process.wait(timeout=SECONDS)
        except subprocess.TimeoutExpired:
            if stop() and not told:
                told = True
                _pass_on(process, meeting)


def _pass_on(process: subprocess.Popen[bytes], meeting: Path) -> None:
    """Send SIGTERM to this machine's workers, which save a checkpoint together with all others.

    A launcher would kill them half a minute later, in the middle of a large checkpoint.
    """
    here = [w["pid"] for w in _read(meeting, WORKER) if w["host"] == socket.gethostname()]
    for pid in here:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGTERM)
    if not here:
        process.terminate()


def _first_error(meeting: Path) -> PrebenchError | None:
    found = _read(meeting, FAILED)
    if not found:
        return None
    kind = InterruptedRunError if found[0]["exit_code"] == InterruptedRunError.exit_code else TrainingError
    return kind(found[0]["message"])


def _read(meeting: Path, start: str) -> list[dict[str, Any]]:
    return [json.loads(path.read_text(encoding="utf-8")) for path in sorted(meeting.glob(f"{start}*.json"))]


def _path() -> str:
    """Return the search path with this interpreter's folder in front, where accelerate and torchrun lie."""
    return os.pathsep.join((str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)))
