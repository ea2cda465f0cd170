"""easy-VQA: real public data (V. Zhou, 2019; 64 px pictures of one shape), read from its PyPI package `easy-vqa`.

The package's test split is for evaluation alone; validation is held out of its training split.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from PIL import Image, UnidentifiedImageError

from prebench.errors import DataError
from prebench.images import whole_images

SHAPES = ("circle", "rectangle", "triangle")
COLORS = ("black", "blue", "brown", "gray", "green", "red", "teal", "yellow")
NUM_VALIDATION = 400
"""The last pictures of the package's training split; 3,600 are left for training."""
REINSTALL = "install it again: pip install --force-reinstall --no-deps easy-vqa"


@dataclass(frozen=True)
class EasyVqa:
    """One split: picture files, and (question, answer) pairs by picture number."""

    image_paths: dict[int, Path]
    questions: dict[int, list[tuple[str, str]]]


@cache
def load(split: str) -> EasyVqa:
    """Read the split `train` (3,600 pictures), `validation` (400) or `test` (1,000).

    Raises:
        DataError: the package or one of its files is missing.
    """
    try:
        import easy_vqa
    except ImportError as error:
        raise DataError(f"the package easy-vqa is not installed; {REINSTALL}") from error
    if split == "test":
        return _read(easy_vqa.get_test_image_paths, easy_vqa.get_test_questions)
    assert split in ("train", "validation"), split
    whole = _read(easy_vqa.get_train_image_paths, easy_vqa.get_train_questions)
    numbers = sorted(whole.image_paths)
    chosen = numbers[-NUM_VALIDATION:] if split == "validation" else numbers[:-NUM_VALIDATION]
    return EasyVqa({n: whole.image_paths[n] for n in chosen}, {n: whole.questions[n] for n in chosen})


def open_image(path: Path) -> Image.Image:
    """Read a picture as RGB.

    Raises:
        DataError: the file is missing, truncated or no picture.
    """
    try:
        with whole_images(), Image.open(path) as image:
            return image.convert("RGB")
    except (OSError, UnidentifiedImageError, SyntaxError) as error:
        raise DataError(f"{path}: not a readable picture ({error}); {REINSTALL}") from error


def shape_and_color(pairs: list[tuple[str, str]]) -> tuple[str | None, str | None]:
    """Return the shape and the colour that a picture's questions give away, each None where none does."""
    answers = [answer for _, answer in pairs]
    shape = next((a for a in answers if a in SHAPES), None)
    return shape, next((a for a in answers if a in COLORS), None)


def question_type(text: str) -> str:
    """Return `color`, `shape`, `existence` or `negation` for an easy-VQA question."""
    words = text.rstrip("?").split()
    if words[0] == "what":
        return "color" if "color" in words else "shape"
    return "negation" if {"not", "no"} & set(words) else "existence"


def _read(
    paths: Callable[[], dict[int, str]], questions: Callable[[], tuple[list[str], list[str], list[int]]]
) -> EasyVqa:
    try:
        files = paths()
        texts, answers, numbers = questions()
    except (OSError, ValueError, LookupError) as error:
        raise DataError(f"the data of the package easy-vqa can't be read ({error}); {REINSTALL}") from error
    found: dict[int, list[tuple[str, str]]] = {number: [] for number in sorted(files)}
    for text, answer, number in zip(texts, answers, numbers, strict=True):
        if number not in found:
            raise DataError(f"easy-vqa: picture {number} of the questions is missing; {REINSTALL}")
        found[number].append((text, answer))
    unasked = [number for number, pairs in found.items() if not pairs]
    if unasked:
        raise DataError(f"easy-vqa: picture {unasked[0]} has no questions; {REINSTALL}")
    return EasyVqa({number: Path(files[number]) for number in found}, found)
