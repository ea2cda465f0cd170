"""Documents whose pictures are decoded once are those that `datasets` gives."""

from __future__ import annotations

import io

import numpy as np
import pytest
from datasets import Dataset, Features, Image, Value
from PIL import Image as PILImage

from prebench.evaluation.documents import DecodedOnce


def _file(seed: int, kind: str = "PNG", mode: str = "RGB", **settings) -> dict:
    pixels = np.random.default_rng(seed).integers(0, 256, (20, 30, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    PILImage.fromarray(pixels).convert(mode).save(buffer, kind, **settings)
    return {"bytes": buffer.getvalue(), "path": None}


def _rotated() -> dict:
    exif = PILImage.Exif()
    exif[0x0112] = 6
    return _file(3, "JPEG", exif=exif)


@pytest.fixture
def documents() -> Dataset:
    pictures = [_file(1), _file(1), _file(2, "GIF", "P"), _rotated(), _file(1), _file(4, "JPEG", "CMYK")]
    others = [None, _file(1), _file(1, mode="L"), None, _file(2), _file(5)]
    columns = {"image": pictures, "other": others, "question": [str(i) for i in range(6)]}
    features = Features({"image": Image(), "other": Image(mode="RGB"), "question": Value("string")})
    return Dataset.from_dict(columns, features=features)


def test_documents_are_those_of_the_data_set(documents: Dataset) -> None:
    once = DecodedOnce(documents)
    assert len(once) == len(documents)
    for doc_id in (0, 1, 2, 3, 4, 5, 1, 0, -1):
        found, expected = once[doc_id], documents[doc_id]
        assert found.keys() == expected.keys() and found["question"] == expected["question"]
        for name in ("image", "other"):
            if expected[name] is None:
                assert found[name] is None
            else:
                assert (found[name].mode, found[name].size) == (expected[name].mode, expected[name].size)
                assert found[name].tobytes() == expected[name].tobytes()


def test_a_picture_is_decoded_once_and_stays_when_a_task_changes_its_copy(documents: Dataset, monkeypatch) -> None:
    opened = []
    original = PILImage.open
    monkeypatch.setattr(PILImage, "open", lambda file, *rest: opened.append(1) or original(file, *rest))
    once = DecodedOnce(documents.select_columns(["image", "question"]))
    once[0]["image"].paste((0, 0, 0), (0, 0, 30, 20))
    assert once[1]["image"].tobytes() == documents[1]["image"].tobytes()
    opened.clear()
    once[1]
    assert not opened


def test_a_broken_picture_raises_each_time_and_other_data_sets_are_read_as_they_are(documents: Dataset) -> None:
    broken = Dataset.from_dict({"image": [{"bytes": b"no picture", "path": None}]}, Features({"image": Image()}))
    once = DecodedOnce(broken)
    for _ in range(2):
        with pytest.raises(OSError, match="cannot identify"):
            once[0]
    rows = [{"image": 1}, {"image": 2}]
    assert DecodedOnce(rows)[1] is rows[1]
    with_format = documents.with_format("numpy")
    assert DecodedOnce(with_format)._documents is with_format


def test_rows_of_all_blocks_are_those_of_the_data_set() -> None:
    columns = {"image": [_file(i % 3) for i in range(20)], "values": [{"a": [i, i + 1]} for i in range(20)]}
    features = Features({"image": Image(), "values": {"a": [Value("int64")]}})
    documents = Dataset.from_dict(columns, features=features)
    once = DecodedOnce(documents)
    for doc_id in [0, 19, 7, 8, 15, 16, 3, 3, -20]:
        found = once[doc_id]
        assert found["values"] == documents[doc_id]["values"]
        found["values"]["a"].append(99)  # a task's code may
    with pytest.raises(IndexError):
        once[20]
