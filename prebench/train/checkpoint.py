"""Checkpoints inside a run: a run that is stopped loses the steps since the last one, and nothing else changes.

A checkpoint is a folder `step-<steps done>` of safetensors files beside one JSON file that holds their hashes. It is
written under a hidden name and renamed as a whole, so that a reader sees all of it or none. No pickle anywhere.

Training waits for the copy of a checkpoint in memory alone; a thread writes it, hashes it and waits for the disk.
"""

from __future__ import annotations

import copy
import json
import os
import shutil
import tempfile
import time
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import Tensor

from prebench.errors import StoreError, user_error
from prebench.progress import say
from prebench.records import content_hash
from prebench.runtime import file_sha256
from prebench.store import write_json
from prebench.train.log import RunLog

FORMAT = 1
KEEP = 2
"""Checkpoints that lie on the disk: the last one, and the one before in case the last is damaged."""
STATE_FILE = "checkpoint.json"
STEP = "step-"
UNFINISHED = ".unfinished-"
SUFFIX = ".safetensors"

Tensors = Mapping[str, Tensor]


@dataclass(frozen=True)
class Checkpoint:
    """What was saved."""

    steps: int
    """Optimiser steps done, over both stages."""
    tensors: dict[str, dict[str, Tensor]]
    """By file, then by name; on the CPU."""
    state: dict[str, Any]
    """Plain values."""


class _DamagedError(Exception):
    """A checkpoint that can't be trusted."""


class Checkpoints:
    """The checkpoints of one run.

    Args:
        folder: where they lie; made with the first one.
        key: what decides how a run goes on (configuration, data, weights' origin, precision, processes); a checkpoint
            with another key is refused.
        log: the run's log, which is cut back to where it was.
    """

    def __init__(self, folder: Path, key: Mapping[str, Any], log: RunLog) -> None:
        self.folder = folder
        self.log = log
        self._key = {"format": FORMAT, **key}
        self._seconds_before = 0.0
        self._started = time.perf_counter()
        self._writer = ThreadPoolExecutor(1, "checkpoint")
        self._writing: Future[None] | None = None

    @property
    def seconds(self) -> float:
        """Return the time spent on the run so far, earlier processes included, without the steps that were lost."""
        return self._seconds_before + time.perf_counter() - self._started

    def open(self) -> int | None:
        """Find the newest intact checkpoint and start the log there; None where the run starts from its beginning.

        Returns:
            The steps that it holds, for `read`.

        Damaged checkpoints are named on stderr and removed.

        Raises:
            StoreError: a checkpoint was made with another configuration, or the folder can't be written.
        """
        for path in self.folder.glob(f"{UNFINISHED}*"):
            shutil.rmtree(path, ignore_errors=True)
        for folder in self._folders():
            try:
                state = self._check(folder)
            except _DamagedError as error:
                say(f"WARNING: {folder}: damaged checkpoint ({error}); removed, the one before it is taken")
                shutil.rmtree(folder, ignore_errors=True)
                continue
            self.log.start(state["log_bytes"])
            self._seconds_before = state["seconds"]
            steps = int(folder.name.removeprefix(STEP))
            say(f"{self.folder.parent.name}: goes on after step {steps}")
            return steps
        if self.folder.is_dir():
            say(f"WARNING: {self.folder}: no intact checkpoint; the run starts again")
        self.log.start()
        return None

    def read(self, steps: int) -> Checkpoint:
        """Return a checkpoint that `open` found, in this process or in another of the same run."""
        folder = self._path(steps)
        content = json.loads((folder / STATE_FILE).read_text(encoding="utf-8"))
        tensors = {name.removesuffix(SUFFIX): load_file(folder / name) for name in content["files"]}
        return Checkpoint(steps, tensors, content["state"])

    def save(self, steps: int, tensors: Mapping[str, Tensors], state: Mapping[str, Any]) -> None:
        """Copy a checkpoint and begin to write it, and to remove all but the last two, while training goes on.

        One is written at a time: this waits for the one before. What it writes is what was given, whatever changes
        afterwards.

        Args:
            steps: optimiser steps done, over both stages.
            tensors: by file, then by name.
            state: values that JSON can hold.

        Raises:
            StoreError: the one before can't be written, as `wait` says.
        """
        self.wait()
        copies = {
            file: {name: value.detach().to("cpu", copy=True).contiguous() for name, value in values.items()}
            for file, values in tensors.items()
        }
        now = {"log_bytes": self.log.position(), "seconds": self.seconds}
        self._writing = self._writer.submit(self._write, steps, copies, copy.deepcopy(dict(state)) | now)

    def wait(self) -> None:
        """Wait until what was saved is on the disk.

        Raises:
            StoreError: the disk is full or the folder can't be written; earlier checkpoints are kept.
        """
        writing, self._writing = self._writing, None
        if writing is not None:
            writing.result()

    def close(self) -> None:
        """Wait for a write that is under way, and let its thread go; whether it succeeded no longer matters."""
        self._writer.shutdown()

    def remove(self) -> None:
        """Remove all checkpoints: the run is exported."""
        shutil.rmtree(self.folder, ignore_errors=True)

    def _folders(self) -> list[Path]:
        return sorted(self.folder.glob(f"{STEP}*"), reverse=True)

    def _path(self, steps: int) -> Path:
        return self.folder / f"{STEP}{steps:08d}"

    def _write(self, steps: int, tensors: Mapping[str, Tensors], state: dict[str, Any]) -> None:
        try:
            self._write_folder(steps, tensors, state)
        except Exception as error:
            if user_error(error) is None:
                raise
            kept = [folder.name for folder in self._folders()]
            raise StoreError(
                f"{self.folder}: the checkpoint of step {steps} can't be written ({_reason(error)}); kept: "
                f"{kept[0] if kept else 'none before it'}; make room and start the same command again, it goes on there"
            ) from error
        for folder in self._folders()[KEEP:]:
            shutil.rmtree(folder, ignore_errors=True)

    def _write_folder(self, steps: int, tensors: Mapping[str, Tensors], state: dict[str, Any]) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(dir=self.folder, prefix=UNFINISHED))
        try:
            hashes = {}
            for name, values in tensors.items():
                path = temporary / f"{name}{SUFFIX}"
                save_file(dict(values), path)
                hashes[path.name] = file_sha256(path)
                _sync(path)
            content = {"key": self._key, "steps": steps, "files": hashes, "state": state}
            write_json(temporary / STATE_FILE, content | {"hash": content_hash(content)})
            temporary.chmod(0o755)
            temporary.replace(self._path(steps))
            _sync(self.folder)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)

    def _check(self, folder: Path) -> dict[str, Any]:
        """Return the plain values of a checkpoint whose every byte is as it was written."""
        try:
            content = json.loads((folder / STATE_FILE).read_text(encoding="utf-8"))
            body = {name: content[name] for name in ("key", "steps", "files", "state")}
            if content["hash"] != content_hash(body):
                raise _DamagedError(f"{STATE_FILE} differs from its hash")
            self._require_same_run(folder, body["key"])
            for name, expected in body["files"].items():
                if file_sha256(folder / name) != expected:
                    raise _DamagedError(f"{name} differs from its hash")
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise _DamagedError(str(error)) from error
        log_bytes = self.log.path.stat().st_size if self.log.path.is_file() else 0
        if log_bytes < body["state"]["log_bytes"]:
            raise _DamagedError(f"{self.log.path.name} is shorter than when it was made")
        state: dict[str, Any] = body["state"]
        return state

    def _require_same_run(self, folder: Path, key: Mapping[str, Any]) -> None:
        for name, value in self._key.items():
            if key.get(name) != value:
                raise StoreError(
                    f"{folder}: made with {name} {key.get(name)}, but here it is {value}: the run can't go on exactly. "
                    f"Go back to that, or delete {self.folder} to train the run from its start"
                )


def _reason(error: Exception) -> str:
    return (error.strerror or str(error)) if isinstance(error, OSError) else str(error)


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
