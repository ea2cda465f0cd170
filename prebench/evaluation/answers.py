"""The answer log: every answer of a model to a task's questions, kept as it comes, by what decided it.

A killed evaluation goes on from its log, and another study with the same weights reuses the answers. One file per
weights and task; it is only ever appended to, by any number of processes at once.

A line begins with its newline instead of ending with it. So a line that was cut short (kill -9, a full disk) never
swallows the next one, without a lock and without looking at the file first. Each line carries a checksum: what is
torn or edited is no answer.
"""

from __future__ import annotations

import dataclasses
import errno
import json
import os
import sys
from collections.abc import Hashable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from prebench.errors import StoreError
from prebench.records import content_hash
from prebench.runtime import versions

if TYPE_CHECKING:
    from prebench.evaluation.engine import Engine
    from prebench.evaluation.generation import Answer, GenerationRequest
    from prebench.evaluation.prompts import Prompt

DECODING_VERSION = 1
"""Raise it with every change by which the engine can answer otherwise: older answers are then computed again."""
DECIDING_PACKAGES = ("torch", "transformers", "pillow")
"""Packages whose version can change an answer: the computation, the preprocessing, the chat template's rendering."""
FIELDS = ("settings", "prompt_hash", "image_hash", "text")
CHECKSUM = "sum"

Key = tuple[str, str, str]
"""Hash of what decides an answer besides the question, the prompt's hash, its images' hash."""


def answer_file(folder: Path, weights: str, task: str) -> Path:
    """Return the log of a model's answers to a task.

    Args:
        folder: of all logs (`results/.answers`).
        weights: hash of the model (`prebench.evaluation.request.Hashes.weights`).
        task: lmms-eval's task id.
    """
    return folder / weights / f"{task}.jsonl"


def decided_by(engine: Engine, weights: str) -> dict[str, Any]:
    """Return what decides an answer besides the question: weights, precision, device, versions."""
    found = versions()
    return {
        "weights": weights,
        "dtype": str(engine.model.dtype),
        "device": engine.device.type,
        "decoding": DECODING_VERSION,
        "versions": {name: found[name] for name in DECIDING_PACKAGES},
    }


class AnswerLog:
    """The log of one model and task, open for one evaluation; use it as a context manager.

    An answer may be in it twice, where two processes computed it at once; the first stands. Not kept are errors, which
    are tried again, and answers that the model's context cut off: a text alone does not say so.
    """

    def __init__(self, path: Path, basis: Mapping[str, Any]) -> None:
        """Read what there is.

        Args:
            path: the file; the first answer makes it.
            basis: what decides an answer besides the question (`decided_by`).

        Raises:
            StoreError: the file can't be read.
        """
        self.path = path
        self._basis = dict(basis)
        self._texts, self.damaged = read_answers(path)
        self._asked: dict[Hashable, Key] = {}
        self._handle: int | None = None
        self.taken = 0
        """Answers that the log has given."""

    def __enter__(self) -> AnswerLog:
        return self

    def __exit__(self, *_: object) -> None:
        if self._handle is not None:
            os.close(self._handle)
            self._handle = None

    def known(self, request: GenerationRequest, prompt: Prompt) -> str | None:
        """Return a prompt's answer; where there is none, return None and remember the key until `add`."""
        generation = {
            field.name: getattr(request, field.name)
            for field in dataclasses.fields(request)
            if field.name not in ("key", "messages")  # the document's number, and what the prompt was made from
        }
        key = (content_hash(self._basis | {"generation": generation}), prompt.prompt_hash, prompt.image_hash)
        text = self._texts.get(key)
        if text is None:
            self._asked[request.key] = key
        else:
            self.taken += 1
        return text

    def add(self, answer: Answer) -> None:
        """Append an answer at once, unless it is an error, cut off, or in the log already.

        Raises:
            StoreError: the file can't be written.
        """
        key = self._asked.pop(answer.key, None)
        if key is None or answer.text is None or answer.truncated or key in self._texts:
            return
        self._append(key, answer.text)
        self._texts[key] = answer.text

    def _append(self, key: Key, text: str) -> None:
        values = dict(zip(FIELDS, (*key, text), strict=True))
        line = ("\n" + json.dumps(values | {CHECKSUM: content_hash(values)}, sort_keys=True)).encode()
        try:
            if self._handle is None:
                self.path.parent.mkdir(parents=True, exist_ok=True)
                self._handle = os.open(self.path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o666)
            if os.write(self._handle, line) < len(line):  # one write, which no other process's write can cut in two
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        except OSError as error:
            raise StoreError(
                f"{self.path}: can't be written ({error.strerror}); the answers so far are kept: make room or mend it, "
                "and start again"
            ) from error


def read_answers(path: Path) -> tuple[dict[Key, str], int]:
    """Read a log.

    Returns:
        Texts by key, and the number of damaged lines. A last line that is not whole is no damage: another process may
        be writing it.

    Raises:
        StoreError: the file can't be read.
    """
    try:
        lines = path.read_bytes().split(b"\n")
    except FileNotFoundError:
        return {}, 0
    except OSError as error:
        raise StoreError(f"{path}: can't be read ({error.strerror}); delete it to compute its answers again") from error
    texts: dict[Key, str] = {}
    damaged = 0
    for number, line in enumerate(lines, start=1):
        found = _parse(line)
        if found is not None:
            texts.setdefault(*found)
        elif line and number < len(lines):
            damaged += 1
    return texts, damaged


def _parse(line: bytes) -> tuple[Key, str] | None:
    try:
        values = json.loads(line)
    except (ValueError, RecursionError):
        return None
    if not isinstance(values, dict) or values.keys() != {*FIELDS, CHECKSUM}:
        return None
    checksum = values.pop(CHECKSUM)
    if not all(isinstance(value, str) for value in values.values()) or checksum != content_hash(values):
        return None
    settings, prompt_hash, image_hash, text = (values[name] for name in FIELDS)
    return (sys.intern(settings), prompt_hash, image_hash), text
