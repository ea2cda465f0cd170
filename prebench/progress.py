"""Progress with rate and time left: a rich bar on a terminal, plain lines elsewhere (log files, CI)."""

from __future__ import annotations

import sys
import threading
import time
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

_CONSOLE = Console(stderr=True)
PLAIN_INTERVAL = 15.0
"""Seconds between two plain lines."""


def say(text: str) -> None:
    """Print one line of status to stderr; stdout carries results alone."""
    _CONSOLE.print(text, markup=False, highlight=False, soft_wrap=True)


class ProgressLine:
    """One task's progress; use as a context manager and call `update`. Several may be open at once."""

    def __init__(self, title: str, total: int, unit: str = "step") -> None:
        self.title = title
        self.total = total
        self.unit = unit
        self._started = time.perf_counter()
        self._first: int | None = None
        self._last_line = self._started
        self._bars: Progress | None = None

    def __enter__(self) -> ProgressLine:
        if sys.stderr.isatty():
            self._bars = _Bars.open()
            self._task = self._bars.add_task(self.title, total=self.total, rate="", note="")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bars is not None:
            self._bars.remove_task(self._task)
            _Bars.close()
        if kind is None:
            say(f"{self.title}: done in {_duration(time.perf_counter() - self._started)}")

    def update(self, done: int, note: str = "") -> None:
        """Show that `done` of the total are finished; the first call's items do not count for the rate."""
        now = time.perf_counter()
        if self._first is None:
            self._first = done
            self._started_counting = now
        seconds = now - self._started_counting
        rate = (done - self._first) / seconds if seconds > 0 else 0.0
        if self._bars is not None:
            self._bars.update(self._task, completed=done, rate=f"{rate:.1f} {self.unit}/s", note=note)
        elif now - self._last_line >= PLAIN_INTERVAL:
            self._last_line = now
            left = f", {_duration((self.total - done) / rate)} left" if rate > 0 else ""
            say(f"{self.title}: {done}/{self.total} {self.unit}s, {rate:.1f}/s{left} {note}".rstrip())


class _Bars:
    """The terminal's one live display, shared by all open lines: rich allows no second one."""

    _progress: Progress | None = None
    _users = 0
    _lock = threading.Lock()

    @classmethod
    def open(cls) -> Progress:
        with cls._lock:
            cls._users += 1
            return cls._progress or cls._start()

    @classmethod
    def close(cls) -> None:
        with cls._lock:
            cls._users -= 1
            if cls._users == 0 and cls._progress is not None:
                cls._progress.stop()
                cls._progress = None

    @classmethod
    def _start(cls) -> Progress:
        cls._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[rate]}"),
            TimeRemainingColumn(),
            TextColumn("{task.fields[note]}"),
            console=_CONSOLE,
            transient=True,
        )
        cls._progress.start()
        return cls._progress


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest:02d} s" if minutes else f"{rest} s"
