from collections import Counter
from pathlib import Path

import pytest

from prebench.data import easy_vqa
from prebench.errors import DataError


def test_splits_are_disjoint_and_complete():
    train, validation, test = (easy_vqa.load(split) for split in ("train", "validation", "test"))
    assert (len(train.image_paths), len(validation.image_paths), len(test.image_paths)) == (3600, 400, 1000)
    assert not set(train.image_paths.values()) & set(validation.image_paths.values())
    assert not set(test.image_paths.values()) & (set(train.image_paths.values()) | set(validation.image_paths.values()))
    assert sum(len(pairs) for pairs in test.questions.values()) == 9673


def test_questions_belong_to_their_picture():
    data = easy_vqa.load("train")
    assert ("what is the blue shape?", "rectangle") in data.questions[0]
    assert easy_vqa.open_image(data.image_paths[0]).size == (64, 64)


def test_question_types():
    assert easy_vqa.question_type("what is the color of the circle?") == "color"
    assert easy_vqa.question_type("what is the blue shape?") == "shape"
    assert easy_vqa.question_type("is there a circle?") == "existence"
    assert easy_vqa.question_type("is there not a circle?") == "negation"
    found = Counter(easy_vqa.question_type(t) for pairs in easy_vqa.load("test").questions.values() for t, _ in pairs)
    assert set(found) == {"color", "shape", "existence", "negation"}


def test_a_truncated_picture_is_one_clear_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("PIL.ImageFile.LOAD_TRUNCATED_IMAGES", True)  # as where lmms-eval is imported
    broken = tmp_path / "7.png"
    broken.write_bytes(easy_vqa.load("test").image_paths[0].read_bytes()[:200])
    with pytest.raises(DataError, match=r"7\.png: not a readable picture .*pip install"):
        easy_vqa.open_image(broken)


def test_missing_files_are_one_clear_line(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    import easy_vqa as package

    monkeypatch.setattr(package.easy_vqa, "BASE_PATH", str(tmp_path))
    easy_vqa.load.cache_clear()
    try:
        with pytest.raises(DataError, match=r"easy-vqa can't be read .*pip install"):
            easy_vqa.load("train")
    finally:
        easy_vqa.load.cache_clear()
