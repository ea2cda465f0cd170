"""A task's documents, each picture decoded once for all questions that follow each other."""

from __future__ import annotations

import copy
from collections import OrderedDict
from typing import Any

from datasets import Dataset, Image
from PIL import Image as PILImage

KEPT_IMAGES = 2
"""Decoded pictures that are kept: questions about one mostly stand side by side."""
ROWS_AT_ONCE = 8
"""Rows that are read together, as files: one alone takes as long."""


class DecodedOnce:
    """Rows of a data set, equal to `documents[doc_id]`.

    `datasets` decodes a row's pictures each time; with 18 questions about a picture, in rows of their own, that takes
    longer than answering them. Files are compared by content.
    """

    def __init__(self, documents: Any) -> None:
        """Take a data set; what is no plain `datasets.Dataset` is read as it is."""
        self._documents = documents
        self._pictures: dict[str, Image] = {}
        self._decoded: OrderedDict[tuple[str, bytes], PILImage.Image] = OrderedDict()
        self._block: tuple[int, dict[str, list[Any]]] = (-ROWS_AT_ONCE, {})
        if isinstance(documents, Dataset) and documents.format["type"] is None:
            features = documents.features.items()
            self._pictures = {name: kind for name, kind in features if isinstance(kind, Image) and kind.decode}
        for name, kind in self._pictures.items():
            self._documents = self._documents.cast_column(name, Image(mode=kind.mode, decode=False))

    def __len__(self) -> int:
        """Return the number of documents."""
        return len(self._documents)

    def __getitem__(self, doc_id: int) -> Any:
        """Return a document.

        Raises:
            OSError, ...: a picture can't be decoded.
        """
        if not self._pictures:
            return self._documents[doc_id]
        row = self._row(doc_id)
        for name in self._pictures:
            if row[name] is not None:
                row[name] = self._picture(name, row[name])
        return row

    def _row(self, doc_id: int) -> dict[str, Any]:
        """Return a row of its own, with pictures as files."""
        place = range(len(self))[doc_id]
        start, rows = self._block  # read and set in one step: another thread may ask, too
        if not start <= place < start + ROWS_AT_ONCE:
            start = place - place % ROWS_AT_ONCE
            rows = self._documents[start : start + ROWS_AT_ONCE]
            self._block = start, rows
        row = {name: values[place - start] for name, values in rows.items()}
        return {name: value if name in self._pictures else copy.deepcopy(value) for name, value in row.items()}

    def _picture(self, name: str, stored: dict[str, Any]) -> PILImage.Image:
        content = stored["bytes"]
        if content is None:  # a path: its file may change
            return self._pictures[name].decode_example(stored)
        key = (name, content)
        if key in self._decoded:
            self._decoded.move_to_end(key)
        else:
            self._decoded[key] = self._pictures[name].decode_example(stored)
            if len(self._decoded) > KEPT_IMAGES:
                self._decoded.popitem(last=False)
        return self._decoded[key].copy()  # whoever changes it changes his own
