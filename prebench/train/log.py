"""A run's `train.jsonl`: one JSON object a line, appended; a run that goes on cuts it back to its checkpoint."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from prebench.errors import StoreError

LogLine = dict[str, Any]


class RunLog:
    """The log of one run. Nothing is touched before `start`.

    Args:
        path: the file.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.last: LogLine = {}
        """The last line of a training step, or {}."""
        self._file: Any = None

    def start(self, keep: int = 0) -> None:
        """Open the log for appending behind its first `keep` bytes; what follows them is removed.

        Raises:
            StoreError: the file can't be written, or a line that is kept is no JSON.
        """
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self.path.open("ab"):
                os.truncate(self.path, keep)
            for line in self.path.read_text(encoding="utf-8").splitlines():
                self._remember(json.loads(line))
            self._file = self.path.open("ab", buffering=0)  # a buffer would fail again when closed, and hide the reason
        except OSError as error:
            raise StoreError(f"{self.path}: can't be written ({error.strerror})") from error
        except ValueError as error:
            raise StoreError(
                f"{self.path}: a line is no JSON ({error}); delete {self.path.parent} to train this run again"
            ) from error

    def write(self, entry: LogLine) -> None:
        """Append one line.

        Raises:
            StoreError: the disk is full or the file can't be written.
        """
        try:
            rest = (json.dumps(entry, sort_keys=True) + "\n").encode()
            while rest:
                rest = rest[self._file.write(rest) :]
        except OSError as error:
            raise StoreError(
                f"{self.path}: can't be written ({error.strerror}); finished runs and checkpoints are kept: make room "
                "and start the same command again"
            ) from error
        self._remember(entry)

    def position(self) -> int:
        """Return the bytes written so far, once they have reached the disk."""
        if self._file is None:
            return 0
        os.fsync(self._file.fileno())
        return os.fstat(self._file.fileno()).st_size

    def close(self) -> None:
        """Close the file."""
        if self._file is not None:
            self._file.close()
            self._file = None

    def _remember(self, entry: LogLine) -> None:
        if entry.get("kind") != "validation":
            self.last = dict(entry)
