"""Evaluates in forks of one process that has imported everything, so that a test can kill many of them in a minute.

`python forks.py TRACE` answers every line `WORK.json` on standard input with the fork's process id and, once it has
ended, its status (`os.waitpid`). Each batch leaves its number of questions in the file TRACE before it is computed.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from prebench.evaluation import harness, runner
from prebench.evaluation.engine import Engine

PAUSE = 0.05
"""Seconds before each batch: time to strike, however slowly the test itself runs."""


def trace_batches(trace: Path) -> None:
    """Have the engine write the size of each batch into a file."""
    original = Engine._decode

    def traced(self: Engine, prefixes: Any, jobs: list[Any]) -> Iterator[Any]:
        with trace.open("a", encoding="utf-8") as file:
            file.write(f"{len(jobs)}\n")
        time.sleep(PAUSE)
        yield from original(self, prefixes, jobs)

    Engine._decode = traced  # type: ignore[method-assign]


def tell(number: int) -> None:
    """Write one line at once."""
    sys.stdout.write(f"{number}\n")
    sys.stdout.flush()


def main() -> None:
    """Serve until standard input ends."""
    assert harness  # lmms-eval is imported
    trace_batches(Path(sys.argv[1]))
    for line in sys.stdin:
        never_ends, _ = os.pipe()  # the evaluating process ends with its standard input
        pid = os.fork()
        if pid == 0:
            os.dup2(never_ends, 0)
            os.dup2(2, 1)
            os._exit(runner.main([line.strip()]))
        tell(pid)
        tell(os.waitpid(pid, 0)[1])


if __name__ == "__main__":
    main()
