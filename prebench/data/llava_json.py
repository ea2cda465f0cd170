"""LLaVA's JSON: a list of records, or one per line, with "conversations" of human and gpt turns and perhaps an "image".

The rules are those of LLaVA's own preprocessing: a turn's pictures come first, what is left of its text is stripped,
and a conversation that starts with the assistant loses that turn.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pyarrow as pa

from prebench.data.image_files import ImageFolders, read_bytes
from prebench.data.records import Record, image_part, require_text, text_part
from prebench.errors import DataError
from prebench.runtime import file_hash
from prebench.schema import LlavaJsonConfig

IMAGE = "<image>"
ROLES = {"human": "user", "gpt": "assistant"}


class LlavaJson:
    """The records of one file, parsed one at a time.

    Args:
        config: file and image folders.

    Raises:
        DataError: the file is missing or no JSON of this kind; the line is named.
    """

    def __init__(self, config: LlavaJsonConfig) -> None:
        self.path = Path(config.path).expanduser()
        if not self.path.is_file():
            raise DataError(f"{self.path}: no such file (data: path)")
        self._images = ImageFolders(self.path.parent if config.image_root is None else config.image_root)
        self._records, self._lines = _split(self.path)
        self.key = file_hash(self.path)

    def __len__(self) -> int:
        return len(self._records)

    def where(self, index: int) -> str:
        """Return how messages name a record."""
        return f"{self.path}:{self._lines[index]} (record {index})"

    def record(self, index: int) -> Record:
        """Return a record's messages and the names of its pictures.

        Raises:
            DataError: it is malformed; the field is named.
        """
        return parse_record(json.loads(self._records[index].as_py()))

    def image(self, _index: int, name: str) -> bytes:
        """Return a picture's file.

        Raises:
            DataError: it is missing, or its path is refused.
        """
        return read_bytes(self._images.find(name))


def parse_record(value: Any) -> Record:
    """Return a JSON record as chat messages.

    Raises:
        DataError: it is malformed; the field is named.
    """
    if not isinstance(value, dict):
        raise DataError(f"a record is an object with the field 'conversations', not {type(value).__name__}")
    images = _image_names(value.get("image"))
    turns = value.get("conversations")
    if not isinstance(turns, list) or not turns:
        raise DataError("conversations: a list of turns is expected")
    for number, turn in enumerate(turns):
        if not isinstance(turn, dict) or not isinstance(turn.get("from"), str) or turn["from"] not in ROLES:
            raise DataError(f"conversations[{number}].from: 'human' or 'gpt' is expected")
        require_text(turn.get("value"), f"conversations[{number}].value")
    first = 1 if turns[0]["from"] == "gpt" else 0
    messages = []
    placed = 0
    for number, turn in enumerate(turns[first:], first):
        expected = "human" if (number - first) % 2 == 0 else "gpt"
        if turn["from"] != expected:
            raise DataError(f"conversations[{number}].from: {expected!r} is expected, human and gpt take turns")
        count = _placeholders(turn, number, images)
        text = turn["value"].replace(IMAGE, "").strip() if count else turn["value"]
        if not text.strip() and not count:
            raise DataError(f"conversations[{number}].value: empty")
        content = [image_part()] * count + ([text_part(text)] if text else [])
        messages.append({"role": ROLES[turn["from"]], "content": content})
        placed += count
    if not messages or messages[-1]["role"] != "assistant":
        raise DataError(f"conversations[{len(turns) - 1}]: the last turn has no answer")
    if placed != len(images):
        raise DataError(f"image: {len(images)} named, but the turns place {placed} ({IMAGE})")
    return Record(messages, tuple(images))


def _image_names(value: Any) -> list[str]:
    names = [] if value is None else [value] if isinstance(value, str) else value
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise DataError("image: a path or a list of paths is expected")
    for name in names:
        require_text(name, "image")
    return names


def _placeholders(turn: Mapping[str, str], number: int, images: list[str]) -> int:
    """Return how many pictures a turn places; several marks of a record's only picture are one, as LLaVA has it."""
    count = turn["value"].count(IMAGE)
    if count and turn["from"] == "gpt":
        raise DataError(f"conversations[{number}].value: {IMAGE} in an answer")
    return min(count, 1) if len(images) == 1 else count


def _split(path: Path) -> tuple[pa.Array, list[int]]:
    """Return the records' JSON texts and the lines where they start."""
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: can't be read as UTF-8 text ({error})") from error
    found = list(_list_items(path, text) if text.startswith("[", _skip(text, 0)) else _lines(path, text))
    if not found:
        raise DataError(f"{path}: no records")
    return pa.array([record for record, _ in found], type=pa.large_string()), [line for _, line in found]


def _lines(path: Path, text: str) -> Iterator[tuple[str, int]]:
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            try:
                json.loads(line)
            except (ValueError, RecursionError) as error:
                raise DataError(f"{path}:{number}: malformed JSON: {error}") from error
            yield line.strip(), number


def _list_items(path: Path, text: str) -> Iterator[tuple[str, int]]:
    """Yield the items of a JSON list one at a time: as Python objects a million of them would not fit in memory."""
    decoder = json.JSONDecoder()
    place = _skip(text, text.index("[") + 1)
    line, counted = 1, 0
    while text[place : place + 1] != "]":
        line, counted = line + text.count("\n", counted, place), place
        try:
            _, end = decoder.raw_decode(text, place)
        except (ValueError, RecursionError) as error:
            at = getattr(error, "lineno", line)
            raise DataError(f"{path}:{at}: malformed JSON: {getattr(error, 'msg', error)}") from error
        yield text[place:end], line
        place = _skip(text, end)
        if text[place : place + 1] not in (",", "]"):
            raise DataError(f"{path}:{line + text.count(chr(10), counted, place)}: malformed JSON: ',' or ']' expected")
        if text[place] == ",":
            place = _skip(text, place + 1)
            if text[place : place + 1] == "]":
                raise DataError(f"{path}:{line}: malformed JSON: ',' before ']'")
    if text[place + 1 :].strip():
        raise DataError(f"{path}: malformed JSON: text behind the list")


def _skip(text: str, place: int) -> int:
    while text[place : place + 1] in (" ", "\n", "\r", "\t"):
        place += 1
    return place
