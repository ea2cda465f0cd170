"""Pictures of a mirror by the hash under which records know them, as small data URIs.

A picture is found by its content, so that the one that is shown is the one that was asked about, whatever the schema of
its data set.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

from PIL import Image

from prebench.errors import StoreError
from prebench.images import pixel_hash, require_size, to_rgb
from prebench.store import read_json

MANIFEST = "mirror.json"
SIDE = 160
"""Longest side of a thumbnail in pixels."""
QUALITY = 78
MAX_BYTES = 6_000_000
"""Of all thumbnails of a page, as data URIs."""
MAX_SCANNED = 5_000
"""Pictures of one task that are decoded in search of those that do not stand at their document's row."""
BATCH_ROWS = 32


class Album:
    """Thumbnails by picture hash, up to `MAX_BYTES` in all."""

    def __init__(self, mirror: Path) -> None:
        self.mirror = mirror
        self.pictures: dict[str, str] = {}
        self.full = False
        """A picture was left out for size."""
        self._bytes = 0
        path = mirror / MANIFEST
        self._tasks: Mapping[str, Any] = {}
        if path.is_file():
            found = read_json(path)
            tasks = found.get("tasks") if isinstance(found, dict) else None
            self._tasks = tasks if isinstance(tasks, dict) else {}

    @property
    def found(self) -> bool:
        """Tell whether there is a mirror at all."""
        return bool(self._tasks)

    def add(self, task: str, wanted: Mapping[str, Collection[int]]) -> None:
        """Look for the pictures of one task.

        Args:
            task: whose files are searched.
            wanted: the documents' numbers by picture hash; looked up at these rows first.

        Raises:
            StoreError: a file of the mirror can't be read as Parquet.
        """
        missing = set(wanted) - self.pictures.keys()
        entry = self._tasks.get(task)
        if not missing or not isinstance(entry, dict):
            return
        files = [self.mirror / name for name in sorted(entry.get("files", {})) if name.endswith(".parquet")]
        rows = {row for key in missing for row in wanted[key]}
        try:
            last = b""
            for content in _contents([path for path in files if path.is_file()], rows):
                if not missing or self.full:
                    break
                if content != last:  # questions about one picture follow each other
                    self._take(content, missing)
                last = content
        except (OSError, ValueError) as error:
            raise StoreError(
                f"{self.mirror}: pictures of {task} can't be read ({error}); make the mirror again"
            ) from error

    def _take(self, content: bytes, missing: set[str]) -> None:
        try:
            image = Image.open(io.BytesIO(content))
            require_size(image)
            rgb = to_rgb(image)
        except Exception:  # noqa: BLE001  (a damaged file can raise anything in a decoder; it was no document's picture)
            return
        key = pixel_hash(rgb)
        if key not in missing:
            return
        missing.discard(key)
        uri = _thumbnail(rgb)
        if self._bytes + len(uri) > MAX_BYTES:
            self.full = True
            return
        self._bytes += len(uri)
        self.pictures[key] = uri


def _thumbnail(rgb: Image.Image) -> str:
    small = rgb.copy()
    small.thumbnail((SIDE, SIDE), Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    small.save(buffer, format="WEBP", quality=QUALITY, method=4)
    return f"data:image/webp;base64,{base64.b64encode(buffer.getvalue()).decode()}"


def _contents(files: list[Path], rows: Collection[int]) -> Iterator[bytes]:
    """Yield stored pictures: those in the named rows of each table first, then all others up to a limit."""
    tables: dict[Path, list[Path]] = {}
    for path in files:
        tables.setdefault(path.parent, []).append(path)
    for chosen in (rows, None):
        for parts in tables.values():
            for number, content in enumerate(_stored(parts, chosen)):
                if chosen is None and number >= MAX_SCANNED:
                    break
                yield content


def _stored(parts: list[Path], rows: Collection[int] | None) -> Iterator[bytes]:
    """Yield the pictures of one table's files, of some rows or of all, row by row."""
    import pyarrow.parquet as pq

    first = 0
    for path in parts:
        file = pq.ParquetFile(path)
        columns = [field.name for field in file.schema_arrow if _holds_pictures(field.type)]
        for group in range(file.num_row_groups):
            here = range(first, first + file.metadata.row_group(group).num_rows)
            first = here.stop
            wanted: Collection[int] = here if rows is None else {row for row in rows if row in here}
            if columns and wanted:
                batches = file.iter_batches(BATCH_ROWS, row_groups=[group], columns=columns)
                yield from _of_rows(batches, here.start, wanted)


def _of_rows(batches: Iterator[Any], first: int, wanted: Collection[int]) -> Iterator[bytes]:
    for batch in batches:
        for row in range(batch.num_rows):
            if first + row in wanted:
                for value in batch.slice(row, 1).to_pylist()[0].values():
                    for picture in value if isinstance(value, list) else [value]:
                        if picture and picture.get("bytes"):
                            yield picture["bytes"]
        first += batch.num_rows


def _holds_pictures(kind: Any) -> bool:
    """Tell whether a column is `datasets`' Image, or a list of them: a struct of bytes and path."""
    import pyarrow.types as types

    if types.is_list(kind) or types.is_large_list(kind):
        kind = kind.value_type
    return types.is_struct(kind) and {field.name for field in kind} == {"bytes", "path"}
