"""The files that a probe leaves: rows in Parquet, similarity maps in JSON, each with the hashes of what made it."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from prebench.records import PROBE_HASHES, ProbeRow, SimilarityMap, to_dict
from prebench.store import write_bytes, write_text


def write_rows(path: Path, rows: Sequence[ProbeRow], hashes: Mapping[str, str]) -> None:
    """Write `probe.parquet` atomically.

    Raises:
        StoreError: the folder can't be written.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    table = pa.Table.from_pylist([to_dict(row) for row in rows])
    # A column without any value would have no type, and be read as a column of objects.
    types = [field.with_type(pa.float64()) if pa.types.is_null(field.type) else field for field in table.schema]
    table = table.cast(pa.schema(types)).replace_schema_metadata(
        {PROBE_HASHES: json.dumps(dict(hashes), sort_keys=True)}
    )
    buffer = pa.BufferOutputStream()
    pq.write_table(table, buffer)
    write_bytes(path, buffer.getvalue().to_pybytes())


def read_hashes(path: Path) -> dict[str, str] | None:
    """Return the hashes in `probe.parquet`; None where the file is missing or is none."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        found = (pq.read_schema(path).metadata or {}).get(PROBE_HASHES)
    except (OSError, pa.ArrowInvalid):
        return None
    return None if found is None else dict(json.loads(found))


def write_maps(path: Path, maps: Sequence[SimilarityMap], hashes: Mapping[str, str]) -> None:
    """Write `probe_maps.json` atomically, one line a map.

    Raises:
        StoreError: the folder can't be written.
    """
    lines = ",\n".join(json.dumps(to_dict(found), sort_keys=True) for found in maps)
    write_text(path, f'{{"hashes": {json.dumps(dict(hashes), sort_keys=True)}, "maps": [\n{lines}\n]}}\n')
