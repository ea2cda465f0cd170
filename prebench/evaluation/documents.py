"""A task's documents, each picture decoded once for all questions that follow each other."""

from __future__ import annotations

from collections import OrderedDict
from typing import Any

from datasets import Dataset, Image
from PIL import Image as PILImage

KEPT_IMAGES = 2
"""Decoded pictures that are kept: questions about one mostly stand side by side."""


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
        row = self._documents[doc_id]
        for name in self._pictures:
            if row[name] is not None:
                row[name] = self._picture(name, row[name])
        return row

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
