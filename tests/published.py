"""Data sets as they lie on the Hub, for tests that fetch them from a Hub on this machine."""

from __future__ import annotations

from pathlib import Path

import datasets
import pyarrow as pa
import pyarrow.parquet as pq

from prebench.data.download import HubTask, fill_mirror
from prebench.data.hub import Hub
from prebench.schema import SuiteConfig
from tests import hub_server
from tests.evaluation.mirror import write_mirror
from tests.evaluation.paper_mirror import write_paper_mirror

GQA, POPE, MMSTAR = "lmms-lab-encoder/GQA", "lmms-lab-encoder/POPE", "Lin-Chen/MMStar"
TASKS = {
    "gqa": HubTask("gqa", GQA, "testdev_balanced_instructions", "testdev"),
    "pope": HubTask("pope", POPE, None, "test"),
    "mmstar": HubTask("mmstar", MMSTAR, None, "val"),
}


def suite(*names: str, **changes: object) -> SuiteConfig:
    tasks = [{"task": n, "label": n, "data_source": "real", "primary_metric": "exact_match"} for n in names]
    return SuiteConfig.model_validate(
        {"name": "mine", "defaults": {"preset": "smoke"}, "tasks": tasks, "probe": None} | changes
    )


def write_data_sets(root: Path) -> dict[str, Path]:
    """Write data sets in upstream's schemas and return their folders by name."""
    write_mirror(root / "more")  # its GQA has more pictures
    write_paper_mirror(root / "paper")
    return {GQA: root / "more" / GQA, POPE: root / "paper" / POPE, MMSTAR: root / "paper" / MMSTAR}


def fill(folder: Path, server: hub_server.Hub, *names: str, revisions: dict[str, str] | None = None) -> dict:
    wanted = [TASKS[name] for name in names]
    return fill_mirror(folder, suite(*names), names, wanted, revisions or {}, "mine.yaml", Hub(server.url))


def load(folder: Path, repo: str, *arguments: str, cache: Path) -> datasets.DatasetDict:
    return datasets.load_dataset(str(folder / repo), *arguments, cache_dir=str(cache))


def parquet(columns: dict[str, list]) -> bytes:
    buffer = pa.BufferOutputStream()
    pq.write_table(pa.table(columns), buffer)
    return buffer.getvalue().to_pybytes()


def spoil(path: Path, pictures: dict[int, bytes | None], column: str = "image") -> None:
    """Replace the bytes of pictures in a Parquet file."""
    table = pq.read_table(path)
    values = table.column(column).to_pylist()
    for row, content in pictures.items():
        values[row] = {"bytes": content, "path": None}
    index = table.schema.get_field_index(column)
    field = table.schema.field(index)
    pq.write_table(table.set_column(index, field, pa.array(values, type=field.type)), path, row_group_size=4)


def picture(path: Path, row: int, column: str = "image") -> bytes:
    return pq.read_table(path).column(column)[row].as_py()["bytes"]
