"""Documents that `prebench doctor` asks: generated pictures of several shapes, several questions each."""

from __future__ import annotations

from pathlib import Path

from PIL import Image

from prebench.data.questions import ask
from prebench.data.scenes import IMAGE_SIZE, generate_scene, render, scene_rng

QUESTIONS_PER_IMAGE = 6
SHAPES = ((IMAGE_SIZE, IMAGE_SIZE), (IMAGE_SIZE * 5 // 3, IMAGE_SIZE), (IMAGE_SIZE, IMAGE_SIZE * 4 // 3))
"""Widths and heights in pixels, in turn: some processors make more tokens of a larger picture."""


def check_documents(folder: Path, count: int, seed: int = 0) -> list[tuple[str, tuple[str, ...]]]:
    """Write pictures to a folder and return documents about them: a question and its picture files.

    Of each picture: six questions, a description, a question without the picture, and one about two pictures.

    Args:
        folder: exists.
        count: number of documents.
        seed: of the scenes.
    """
    documents: list[tuple[str, tuple[str, ...]]] = []
    previous: tuple[str, ...] = ()
    index = 0
    while len(documents) < count:
        scene = generate_scene(seed, "test", index)
        path = folder / f"{index}.png"
        image = render(scene)[0].resize(SHAPES[index % len(SHAPES)], Image.Resampling.BICUBIC)
        image.save(path)
        found = ask(scene, scene_rng(seed, "test", index, stream=2), QUESTIONS_PER_IMAGE)
        texts = [question.text + question.suffix for question in found]
        own = (str(path),)
        if previous:
            documents.append((f"which image has more objects? {texts[-1]}", (*previous, *own)))
        documents += [(text, own) for text in [*texts, "describe the image."]]
        documents.append((f"{index}: {texts[0]}", ()))
        previous = own
        index += 1
    return documents[:count]
