"""The command line in forks of one process that has imported what training needs: a start costs no import.

`python command_forks.py` answers every line on standard input, a JSON object: `{"arguments", "environment", "stderr",
"file_limit"}` with the process id of a fork that runs the command, `{"wait": id}` with its exit code.
"""

from __future__ import annotations

import json
import os
import resource
import signal
import subprocess
import sys
import traceback
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil


class Forks:
    """The process that forks; ends with the block."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._number = 0
        root = Path(__file__).parents[1]
        self._server = subprocess.Popen(
            [sys.executable, __file__],
            env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(root)},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def __enter__(self) -> Forks:
        return self

    def __exit__(self, *_: object) -> None:
        assert self._server.stdin is not None
        self._server.stdin.close()
        self._server.wait()

    def ask(self, request: dict[str, Any]) -> int:
        assert self._server.stdin is not None and self._server.stdout is not None
        self._server.stdin.write(json.dumps(request) + "\n")
        self._server.stdin.flush()
        return int(self._server.stdout.readline())

    def start(self, arguments: list[str], file_limit: int | None = None, **environment: str) -> Started:
        """Start a command line that begins with `python -m prebench.cli`; no file may grow beyond the limit."""
        self._number += 1
        stderr = self._folder / f"stderr-{self._number}.txt"
        request = {"arguments": arguments[3:], "environment": environment, "file_limit": file_limit}
        return Started(self, self.ask(request | {"stderr": str(stderr)}), stderr)

    def call(self, arguments: list[str], file_limit: int | None = None) -> SimpleNamespace:
        """Run a command line to its end."""
        started = self.start(arguments, file_limit)
        return SimpleNamespace(returncode=started.wait(), stderr=started.stderr())


class Started:
    """A command that runs; used like `subprocess.Popen`."""

    def __init__(self, forks: Forks, pid: int, stderr: Path) -> None:
        self._forks, self.pid, self._stderr = forks, pid, stderr

    def stderr(self) -> str:
        return self._stderr.read_text()

    def ended(self) -> bool:
        return psutil.Process(self.pid).status() == psutil.STATUS_ZOMBIE

    def send(self, number: int) -> None:
        os.kill(self.pid, number)

    def wait(self) -> int:
        return self._forks.ask({"wait": self.pid})


def run(request: dict[str, Any]) -> int:
    """Be the command; return its exit code."""
    from prebench.cli import main

    os.setsid()
    os.environ.update(request["environment"])
    os.dup2(os.open(os.devnull, os.O_RDWR), 0)
    os.dup2(0, 1)
    os.dup2(os.open(request["stderr"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC), 2)
    if request["file_limit"] is not None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (request["file_limit"], request["file_limit"]))
    sys.argv = ["prebench", *request["arguments"]]
    try:
        main()
    except SystemExit as ended:
        return int(ended.code or 0)
    finally:
        sys.stderr.flush()
    return 0


def serve() -> None:
    """Answer until standard input ends."""
    import prebench.pipeline
    import prebench.train.loop
    import prebench.train_runs

    assert prebench.pipeline and prebench.train.loop and prebench.train_runs
    answers = os.fdopen(os.dup(1), "w")
    for line in sys.stdin:
        request = json.loads(line)
        if "wait" in request:
            found = os.waitstatus_to_exitcode(os.waitpid(request["wait"], 0)[1])
        else:
            found = os.fork()
            if found == 0:
                try:
                    os._exit(run(request))
                finally:  # an error must not lead back into the loop
                    traceback.print_exc()
                    os._exit(1)
        answers.write(f"{found}\n")
        answers.flush()


if __name__ == "__main__":
    serve()
