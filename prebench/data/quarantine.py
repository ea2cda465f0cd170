"""Every picture of a data set decoded once, and a marker in the place of each that can't be read.

Upstream's task code decodes pictures while it loads a task (gqa all of them, others the first), so that one damaged
file would cost the whole task. In a mirror that has been through here each task loads, every document keeps its place,
and the documents of a damaged picture get an error record. The damaged bytes are kept beside.
"""

from __future__ import annotations

import hashlib
import io
import multiprocessing
import re
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image, ImageFile, ImageOps

from prebench.errors import DataError
from prebench.images import marker, require_size, to_rgb
from prebench.runtime import available_cores

POOL_ROWS = 2000
"""Fewer rows are decoded in this process: starting others takes longer."""
BATCH_ROWS = 32
"""Rows that a process holds at a time."""
ORIENTATION = 0x0112


@dataclass(frozen=True)
class Unreadable:
    """One picture that can't be decoded."""

    row: int
    """In its file."""
    column: str
    item: int | None
    """Place in a list of pictures; None where the column holds one picture per row."""
    reason: str
    sha256: str
    """Of its bytes; "" where there are none."""


def why_unreadable(picture: Mapping[str, Any]) -> str | None:
    """Return in one line why a picture can't be decoded; None where it can.

    A truncated picture can't: filled up with grey it would be another picture.

    Args:
        picture: as `datasets` stores it: `bytes` and `path`.
    """
    content = picture["bytes"]
    if content is None:
        return "the data set holds no bytes for this image"
    if not content:
        return "the image is empty (0 bytes)"
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of PIL, about large pictures and odd metadata
            image: Image.Image = Image.open(io.BytesIO(content))
            require_size(image)
            image.load()
            if image.getexif().get(ORIENTATION) is not None:
                image = ImageOps.exif_transpose(image)
            to_rgb(image)
    except Exception as error:  # noqa: BLE001  (a damaged file can raise anything in a decoder)
        text = re.sub(r" ?<_io\.BytesIO object at 0x[0-9a-f]+>", "", " ".join(str(error).split()))
        return f"{type(error).__name__}: {text} ({len(content)} bytes)"
    return None


def find_unreadable(
    files: Sequence[Path], columns: Mapping[str, bool], required: bool, report: Callable[[int], None]
) -> dict[Path, list[Unreadable]]:
    """Decode every picture of Parquet files, in processes side by side where there are many.

    Args:
        files: of one table.
        columns: which hold pictures, and whether a row holds a list of them.
        required: a row without a picture is unreadable, too.
        report: called with the number of rows done.

    Returns:
        The unreadable pictures of those files that hold any.

    Raises:
        DataError: a process died while it decoded.
    """
    import pyarrow.parquet as pq

    metadata = {path: pq.read_metadata(path) for path in files}
    parts = [(path, group) for path in files for group in range(metadata[path].num_row_groups)]
    sizes = [metadata[path].row_group(group).num_rows for path, group in parts]
    found: dict[Path, list[Unreadable]] = {}
    done = 0
    for (path, _), size, rows in zip(parts, sizes, _checked(parts, sizes, columns, required), strict=True):
        done += size
        report(done)
        if rows:
            found.setdefault(path, []).extend(rows)
    return found


def _checked(
    parts: Sequence[tuple[Path, int]], sizes: Sequence[int], columns: Mapping[str, bool], required: bool
) -> Iterator[list[Unreadable]]:
    arguments = [(path, group, dict(columns), required) for path, group in parts]
    processes = min(len(parts), available_cores())
    if processes < 2 or sum(sizes) < POOL_ROWS:
        yield from map(_check, arguments)
        return
    try:
        with ProcessPoolExecutor(processes, multiprocessing.get_context("spawn")) as pool:
            yield from pool.map(_check, arguments)
    except BrokenProcessPool as error:
        raise DataError(
            f"{parts[0][0].parent}: a process died while it decoded images (killed, or out of memory?); start again"
        ) from error


def _check(part: tuple[Path, int, dict[str, bool], bool]) -> list[Unreadable]:
    """Decode the pictures of one row group; equal pictures that follow each other once."""
    import pyarrow.parquet as pq

    path, group, columns, required = part
    ImageFile.LOAD_TRUNCATED_IMAGES = False
    file = pq.ParquetFile(path)
    columns = {name: is_list for name, is_list in columns.items() if name in file.schema_arrow.names}
    row = sum(file.metadata.row_group(number).num_rows for number in range(group))
    known: dict[str, str | None] = {}
    found = []
    for batch in file.iter_batches(BATCH_ROWS, row_groups=[group], columns=list(columns)):
        for values in batch.to_pylist():
            for column, is_list in columns.items():
                for item, picture in _pictures(values[column], is_list):
                    if picture is None and not required:
                        continue
                    picture = picture or {"bytes": None}
                    content = picture["bytes"]
                    digest = "" if content is None else hashlib.sha256(content).hexdigest()
                    if digest not in known:
                        known[digest] = why_unreadable(picture)
                    reason = known[digest]
                    if reason is not None:
                        found.append(Unreadable(row, column, item, reason, digest))
            row += 1
    return found


def _pictures(value: Any, is_list: bool) -> list[tuple[int | None, Any]]:
    return list(enumerate(value or [])) if is_list else [(None, value)]


def replace(path: Path, found: Sequence[Unreadable], target: Path, originals: Path) -> None:
    """Write a Parquet file anew with markers in the place of unreadable pictures; all else stays as it is.

    Args:
        path: the file.
        found: its unreadable pictures.
        target: the new file; may not be `path`.
        originals: folder that receives the replaced bytes, named by their SHA-256.
    """
    import pyarrow.parquet as pq

    source = pq.ParquetFile(path)
    first = 0
    with pq.ParquetWriter(target, source.schema_arrow) as writer:
        for group in range(source.num_row_groups):
            table = source.read_row_group(group)
            for picture in found:
                if first <= picture.row < first + table.num_rows:
                    table = _replaced(table, picture.row - first, picture, originals)
            writer.write_table(table)
            first += table.num_rows


def _replaced(table: Any, row: int, picture: Unreadable, originals: Path) -> Any:
    import pyarrow as pa

    index = table.schema.get_field_index(picture.column)
    field, column = table.schema.field(index), table.column(index)
    value = column[row].as_py()
    old = value if picture.item is None else value[picture.item]
    if old is not None and old["bytes"] is not None:
        originals.mkdir(parents=True, exist_ok=True)
        (originals / picture.sha256).write_bytes(old["bytes"])
    new = {"bytes": marker(picture.reason), "path": None}
    if picture.item is not None:
        value[picture.item] = new
        new = value
    chunks = [*column.slice(0, row).chunks, pa.array([new], type=field.type), *column.slice(row + 1).chunks]
    return table.set_column(index, field, pa.chunked_array(chunks, type=field.type))
