"""Reading and writing a study's files: atomic, append-only where it matters, one clear error per bad file."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, TypeVar

from prebench.errors import StoreError
from prebench.records import from_dict, to_dict

RecordT = TypeVar("RecordT")
TEMPORARY = ".part"
"""Ends the hidden name that a file has while it is being written."""


def write_bytes(path: Path, content: bytes) -> None:
    """Write a file so that a reader sees the old content or the new, never a part.

    Raises:
        StoreError: the folder can't be written (permissions, full disk).
    """
    write_chunks(path, [content])


def write_chunks(path: Path, chunks: Iterable[bytes]) -> None:
    """Write a file's content piece by piece, for one that is larger than memory; else as `write_bytes`.

    Raises:
        StoreError: the folder can't be written (permissions, full disk).
    """
    temporary = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=TEMPORARY)
        with os.fdopen(handle, "wb") as file:
            file.writelines(chunks)
            file.flush()
            os.fsync(file.fileno())
        mask = os.umask(0)
        os.umask(mask)
        Path(temporary).chmod(0o666 & ~mask)
        Path(temporary).replace(path)
    except OSError as error:
        if temporary is not None:
            Path(temporary).unlink(missing_ok=True)
        raise StoreError(f"{path}: can't be written ({error.strerror or error}); nothing was replaced") from error


def require_writable(folder: Path) -> None:
    """Make a folder, and find out before hours of work whether it takes files.

    Raises:
        StoreError: it does not.
    """
    write_bytes(folder / ".writable", b"")
    (folder / ".writable").unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Write UTF-8 text atomically."""
    write_bytes(path, text.encode())


def write_json(path: Path, value: Any) -> None:
    """Write JSON atomically, keys sorted, so that equal content gives equal bytes."""
    write_text(path, json.dumps(value, indent=2, sort_keys=True, ensure_ascii=False) + "\n")


def read_json(path: Path) -> Any:
    """Read a JSON file.

    Raises:
        StoreError: the file is missing or is no JSON.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise StoreError(f"{path}: not found") from error
    except (OSError, ValueError) as error:
        raise StoreError(f"{path}: can't be read as JSON ({error}); delete it to compute it again") from error


def write_jsonl(path: Path, records: Iterable[Any]) -> None:
    """Write records (dataclasses or dicts), one JSON object a line, atomically."""
    lines = [json.dumps(_plain(record), sort_keys=True, ensure_ascii=False) for record in records]
    write_text(path, "".join(line + "\n" for line in lines))


def read_jsonl(path: Path) -> Iterator[dict[str, Any]]:
    """Yield the objects of a JSON-lines file.

    Raises:
        StoreError: the file is missing, or a line is no JSON (the line is named).
    """
    try:
        with path.open(encoding="utf-8") as file:
            for number, line in enumerate(file, start=1):
                try:
                    yield json.loads(line)
                except ValueError as error:
                    raise StoreError(
                        f"{path}:{number}: no JSON ({error}); delete the file to compute it again"
                    ) from error
    except (OSError, UnicodeDecodeError) as error:
        raise StoreError(f"{path}: can't be read ({error}); delete it to compute it again") from error


def read_record(path: Path, record_type: type[RecordT]) -> RecordT:
    """Read one record from a JSON file."""
    try:
        return from_dict(record_type, read_json(path))
    except KeyError as error:
        raise StoreError(f"{path}: {error.args[0]}") from error


def write_record(path: Path, record: Any) -> None:
    """Write one record as JSON."""
    write_json(path, to_dict(record))


def _plain(record: Any) -> Any:
    return record if isinstance(record, dict) else to_dict(record)
