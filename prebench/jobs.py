"""Several processes on one machine: how many, and how they report progress and failures to their parent."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import queue
import signal
import threading
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from multiprocessing.connection import wait as wait_for
from typing import Any

import psutil

from prebench.errors import InterruptedRunError, TrainingError
from prebench.progress import ProgressLine
from prebench.runtime import available_cores, sigterm_noted

JOB_BYTES = 1_300_000_000
"""Memory that one process of the embedded preset may need."""

Report = Callable[[int, str], None]
"""Called by a job with units done and a note."""


@dataclass(frozen=True)
class Job:
    """One piece of work: `function(report, *arguments)`; all of it must be picklable."""

    title: str
    total: int
    arguments: tuple[Any, ...]


def choose_jobs(requested: int | None, num_items: int, threads_per_job: int | None, device: str) -> int:
    """Return how many processes to use: by cores and free memory on a CPU, one on a GPU.

    Args:
        requested: the user's number; None chooses.
        num_items: pieces of work.
        threads_per_job: cores that one process keeps busy; None: all of them.
        device: "cpu" or "cuda".
    """
    if requested is not None:
        return max(1, min(requested, num_items))
    if device != "cpu" or threads_per_job is None:
        return 1
    memory = psutil.virtual_memory().available
    return max(1, min(num_items, available_cores() // threads_per_job, memory // JOB_BYTES))


def run_jobs(function: Callable[..., None], jobs: Mapping[str, Job], num_processes: int) -> None:
    """Run jobs in processes of their own and show the progress of each.

    After a failure no further job is started; those that run are finished, so that nothing computed is lost. SIGTERM is
    passed on: jobs that know of it (`prebench.runtime.sigterm_noted`) save what they have and end.

    Args:
        function: a module's function, called as `function(report, *job.arguments)`.
        jobs: by name.
        num_processes: how many at a time.

    Raises:
        PrebenchError: the first error of a job.
        TrainingError: a process died.
        InterruptedRunError: SIGTERM came.
    """
    context = multiprocessing.get_context("spawn")
    # A queue with a thread behind it: a worker that is killed while it reports must not stop the others.
    messages = context.Queue()
    stop = threading.Event()
    finished: set[str] = set()
    follower = threading.Thread(target=_follow, args=(messages, jobs, finished, stop), daemon=True)
    follower.start()
    try:
        with ProcessPoolExecutor(num_processes, context, _start, (messages,)) as pool, _passing_on(pool) as stopping:
            _run_all(pool, function, jobs, num_processes, stopping, finished)
    finally:
        stop.set()
        follower.join()
        messages.cancel_join_thread()


@contextlib.contextmanager
def _passing_on(pool: ProcessPoolExecutor) -> Iterator[Callable[[], bool]]:
    """Hand SIGTERM on to the workers inside the block; yields a function that tells whether it came."""
    if threading.current_thread() is not threading.main_thread():
        yield lambda: False
        return
    came: list[int] = []

    def pass_on(number: int, _frame: object) -> None:
        came.append(number)
        for process in list((pool._processes or {}).values()):
            process.terminate()

    before = signal.signal(signal.SIGTERM, pass_on)
    try:
        yield lambda: bool(came)
    finally:
        signal.signal(signal.SIGTERM, before)


def _run_all(
    pool: ProcessPoolExecutor,
    function: Callable[..., None],
    jobs: Mapping[str, Job],
    num_processes: int,
    stop: Callable[[], bool],
    finished: set[str],
) -> None:
    """Hand out one job per free process, so that after a failure none waits inside the pool; note who finished."""
    waiting = list(jobs.items())
    running: dict[Future[None], str] = {}
    error: BaseException | None = None
    try:
        while running or (waiting and error is None and not stop()):
            while waiting and error is None and not stop() and len(running) < num_processes:
                name, job = waiting.pop(0)
                running[pool.submit(_run, function, name, job.arguments)] = name
            for future in wait(running, return_when=FIRST_COMPLETED).done:
                name, failed = running.pop(future), future.exception()
                error = error or failed
                if failed is None:
                    finished.add(name)
    except KeyboardInterrupt:
        for process in list((pool._processes or {}).values()):
            process.terminate()
        raise
    if stop() and (waiting or isinstance(error, BrokenProcessPool)):
        raise InterruptedRunError("interrupted; what was computed is saved and the same command goes on") from error
    if isinstance(error, BrokenProcessPool):
        raise TrainingError(
            "a training process died (killed, or out of memory?); finished runs and checkpoints are kept and the same "
            "command goes on there, `--jobs 1` needs the least memory"
        ) from error
    if error is not None:
        raise error


SECONDS_TO_LEAVE = 5.0
"""After SIGTERM and the job's end; a pool that lost one worker waits for the others and tells them nothing."""

_messages: Any = None
_noting = contextlib.ExitStack()
_stop: Callable[[], bool] = lambda: False  # noqa: E731


def _start(messages: Any) -> None:
    """Set a worker up: keep the way back, and end with the process that started it, however that ends."""
    global _messages, _stop
    _messages = messages
    _stop = _noting.enter_context(sigterm_noted())  # for the worker's life: it ends when its parent has its result
    messages.cancel_join_thread()
    parent = multiprocessing.parent_process()
    assert parent is not None

    def watch() -> None:
        wait_for([parent.sentinel])
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def _run(function: Callable[..., None], name: str, arguments: tuple[Any, ...]) -> None:
    try:
        function(lambda done, note: _messages.put((name, done, note)), *arguments)
        _messages.put((name, None, ""))
    finally:
        if _stop():
            leaving = threading.Timer(SECONDS_TO_LEAVE, os._exit, (InterruptedRunError.exit_code,))
            leaving.daemon = True
            leaving.start()


def _follow(messages: Any, jobs: Mapping[str, Job], finished: set[str], stop: threading.Event) -> None:
    """Show messages until told to stop and none is left; a terminal that went away stops the showing alone.

    The last messages of a worker may be lost with it, so that the parent's word counts in the end.
    """
    ended: set[str] = set()
    lines: dict[str, ProgressLine] = {}
    while True:
        try:
            name, done, note = messages.get(timeout=0.2)
        except queue.Empty:
            if stop.is_set():
                break
            continue
        ended |= {name} if done is None else set()
        with contextlib.suppress(OSError, SystemExit):
            _show(lines, jobs[name], name, done, note)
    with contextlib.suppress(OSError, SystemExit):
        for name in sorted(finished - ended):
            _show(lines, jobs[name], name, jobs[name].total, "")
            _show(lines, jobs[name], name, None, "")
    for line in lines.values():
        line.__exit__(TrainingError, None, None)


def _show(lines: dict[str, ProgressLine], job: Job, name: str, done: int | None, note: str) -> None:
    if done is None:
        if name in lines:
            lines.pop(name).__exit__(None, None, None)
        return
    if name not in lines:
        lines[name] = ProgressLine(job.title, job.total).__enter__()
    lines[name].update(done, note)
