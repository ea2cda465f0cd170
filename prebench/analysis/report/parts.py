"""What the page is made of: tables whose cells say where their number stands, and figures."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pandas as pd
from markupsafe import Markup

from prebench.analysis.join import Study
from prebench.analysis.render import NOT_DEFINED
from prebench.runtime import file_hash


@dataclass(frozen=True)
class Cell:
    """One cell: the text, and what it comes from."""

    text: str
    title: str = ""
    mark: str = ""
    """A class of the style sheet: `decided`, `no`, ..."""


@dataclass(frozen=True)
class Source:
    """A file of the study that holds the numbers; linked relative to the page."""

    path: str
    digest: str
    """Hash of its content; "" where the file is not there."""


@dataclass(frozen=True)
class Table:
    """A table: the first `heads` cells of a row are its headings."""

    id: str
    caption: str
    header: Sequence[str]
    rows: Sequence[Sequence[Cell]]
    sources: Sequence[Source] = ()
    heads: int = 1
    words: Collection[str] = ()
    """Columns of text: all others are aligned as numbers."""


@dataclass(frozen=True)
class Figure:
    """A chart with what stands above and below it."""

    title: str
    svg: Markup
    note: str = ""


@dataclass(frozen=True)
class Group:
    """Figures under one heading."""

    heading: str
    figures: Sequence[Figure]
    note: str = ""
    folded: bool = False
    """Shown when the reader opens it."""


@dataclass(frozen=True)
class Section:
    """Figures and tables that belong together, and what is missing."""

    groups: Sequence[Group] = ()
    tables: Sequence[Table] = ()
    notes: Sequence[str] = ()
    sources: Sequence[Source] = field(default=())


def source(study: Study, path: str) -> Source:
    """Return a file of the study with the hash of its content."""
    where: Path = study.folder / path
    return Source(path, file_hash(where) if where.is_file() else "")


Columns = Callable[[str], Sequence[str]]


def from_csv(
    study: Study,
    name: str,
    made: tuple[pd.DataFrame, pd.DataFrame, str],
    columns: Columns,
    heads: int = 1,
    words: Collection[str] = (),
) -> Table:
    """Return a table of the study as it is printed; every number's title names file, line, columns and value.

    Args:
        study: the study.
        name: of the file in tables/.
        made: numbers, printed cells, caption: row by row the same.
        columns: which columns of the numbers a printed column shows.
        heads: how many columns name the row.
        words: columns of text.
    """
    numbers, printed, caption = made
    path = f"tables/{name}.csv"
    header = list(printed.columns)
    rows = []
    for line, (values, texts) in enumerate(zip(numbers.to_dict("records"), printed.to_dict("records"), strict=True)):
        cells = [Cell(str(texts[column])) for column in header[:heads]]
        for column in header[heads:]:
            named = {key: values[key] for key in columns(column) if key in values}
            cells.append(Cell(str(texts[column]), _trace(path, line + 2, named)))
        rows.append(cells)
    return Table(name.replace("_", "-"), caption, header, rows, (source(study, path),), heads, words)


def _trace(path: str, line: int, values: dict[str, Any]) -> str:
    shown = ", ".join(f"{name} = {exact(value)}" for name, value in values.items())
    return f"{path}, line {line}: {shown}" if shown else ""


def exact(value: Any) -> str:
    """Return a number as the CSV files hold it."""
    if value is None or value is pd.NA or (isinstance(value, float) and pd.isna(value)):
        return NOT_DEFINED
    return f"{value:.6f}" if isinstance(value, float) else str(value)
