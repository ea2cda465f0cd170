"""Progress with rate and time left: a rich bar on a terminal, plain lines elsewhere (log files, CI)."""

from __future__ import annotations

import sys
import time
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

PLAIN_INTERVAL = 15.0
"""Seconds between two plain lines."""


def say(text: str) -> None:
    """Print one line of status to stderr; stdout carries results alone."""
    Console(stderr=True, highlight=False, soft_wrap=True).print(text, markup=False)


class ProgressLine:
    """One task's progress; use as a context manager and call `update`."""

    def __init__(self, title: str, total: int, unit: str = "step") -> None:
        self.title = title
        self.total = total
        self.unit = unit
        self._started = time.perf_counter()
        self._first: int | None = None
        self._last_line = self._started
        self._bar: Progress | None = None
        if sys.stderr.isatty():
            self._bar = Progress(
                TextColumn("{task.description}"),
                BarColumn(),
                MofNCompleteColumn(),
                TextColumn("{task.fields[rate]}"),
                TimeRemainingColumn(),
                TextColumn("{task.fields[note]}"),
                console=Console(stderr=True),
                transient=True,
            )
            self._task = self._bar.add_task(title, total=total, rate="", note="")

    def __enter__(self) -> ProgressLine:
        if self._bar is not None:
            self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.stop()
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
        if self._bar is not None:
            self._bar.update(self._task, completed=done, rate=f"{rate:.1f} {self.unit}/s", note=note)
        elif now - self._last_line >= PLAIN_INTERVAL:
            self._last_line = now
            left = f", {_duration((self.total - done) / rate)} left" if rate > 0 else ""
            say(f"{self.title}: {done}/{self.total} {self.unit}s, {rate:.1f}/s{left} {note}".rstrip())


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest:02d} s" if minutes else f"{rest} s"
