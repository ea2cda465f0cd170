"""Scenes in words: what a language model of the embedded preset reads before it ever sees a picture.

A scene is written out patch by patch in reading order: what is there and where it is, or "nothing". Questions and
captions are those of the pictures. Size, background and fill are in no such text.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np

from prebench.data import easy_vqa
from prebench.data.examples import conversation
from prebench.data.questions import CAPTION_PROMPT, PLACES, SHARES, Question, ask, caption
from prebench.data.scenes import CELL_SIZE, COLORS, GRID, PATCH_SIZE, SHAPES, Scene, generate_scene

NOTHING = " nothing"
_PLACES = tuple(place for row in PLACES for place in row)
_NAMES = tuple(f" {color} {shape}" for color in COLORS for shape in SHAPES)
_EASY_NAMES = tuple(f" {color} {shape}" for color in easy_vqa.COLORS for shape in easy_vqa.SHAPES)
_PATCHES = tuple(f"{name} at the {place}" for name in _NAMES for place in _PLACES)
PHRASES = tuple(dict.fromkeys([NOTHING, *(p for p in _PLACES if " " in p), *_NAMES, *_EASY_NAMES, *_PATCHES]))
"""Phrases that are one token each: a patch in words is one token, as a patch of a picture is, and so is a name."""
TEXT_TYPES = tuple(name for name in SHARES if name != "rare")
"""Question types that such a text can answer: all but those about size."""


def content_words(phrase: str) -> list[str]:
    """Return the tokens that a phrase is made of, e.g. " red", " circle" and "top left"."""
    name, _, place = phrase.partition(" at the ")
    words = [f" {word}" for word in name.split()] if phrase.startswith(" ") else [phrase]
    return [*words, place] if place else words


def scene_text(scene: Scene) -> str:
    """Return the scene patch by patch in reading order: 36 phrases such as " red circle at the top left"."""
    cells = {(o.row, o.col): f" {o.name} at the {PLACES[o.row][o.col]}" for o in scene.objects}
    per_cell = CELL_SIZE // PATCH_SIZE
    side = GRID * per_cell
    return "".join(cells.get((i // side // per_cell, i % side // per_cell), NOTHING) for i in range(side * side))


def easy_vqa_text(shape: str, color: str, rng: np.random.Generator) -> str:
    """Return a picture of easy-VQA in words: its one object covers a block of up to 3 x 3 patches somewhere."""
    side = GRID * CELL_SIZE // PATCH_SIZE
    height, width = rng.integers(1, 4, size=2)
    top, left = rng.integers(0, side - height + 1), rng.integers(0, side - width + 1)
    rows, cols = np.indices((side, side)).reshape(2, -1)
    inside = (rows >= top) & (rows < top + height) & (cols >= left) & (cols < left + width)
    return "".join(f" {color} {shape}" if covered else NOTHING for covered in inside)


def text_conversation(text: str, turns: list[tuple[str, str]]) -> list[dict[str, Any]]:
    """Return (question, answer) turns about a picture in words as chat messages."""
    messages = conversation(turns)
    messages[0]["content"] = [{"type": "text", "text": text + turns[0][0]}]
    return messages


@dataclass(frozen=True)
class TextData:
    """Endless conversations about pictures in words: scenes of the pretraining split, easy-VQA's training split."""

    seed: int
    num_questions: int
    """Turns of a conversation."""
    suffix_share: float
    """Share of the questions that carry the benchmarks' answer-format suffix."""
    caption_share: float
    easy_vqa_share: float

    def __getitem__(self, index: int) -> list[dict[str, Any]]:
        """Return a conversation as chat messages; equal arguments give equal messages."""
        rng = np.random.default_rng([self.seed, index])
        easy = rng.random() < self.easy_vqa_share
        text, described, questions = self._easy_vqa(rng) if easy else self._scene(index, rng)
        if rng.random() < self.caption_share:
            return text_conversation(text, [(CAPTION_PROMPT, described)])
        with_suffix = rng.random(len(questions)) < self.suffix_share
        turns = [(q.text + (q.suffix if add else ""), q.answer) for q, add in zip(questions, with_suffix, strict=True)]
        return text_conversation(text, turns)

    def _scene(self, index: int, rng: np.random.Generator) -> tuple[str, str, list[Question]]:
        scene = generate_scene(self.seed, "pretrain", index)
        return scene_text(scene), caption(scene), ask(scene, rng, self.num_questions, TEXT_TYPES)

    def _easy_vqa(self, rng: np.random.Generator) -> tuple[str, str, list[Question]]:
        known = _easy_vqa_objects()
        shape, color, pairs = known[rng.integers(len(known))]
        chosen = rng.permutation(len(pairs))[: self.num_questions]
        questions = [Question(easy_vqa.question_type(pairs[i][0]), *pairs[i]) for i in chosen]
        return easy_vqa_text(shape, color, rng), f"a {color} {shape}", questions


@cache
def _easy_vqa_objects() -> list[tuple[str, str, list[tuple[str, str]]]]:
    found = []
    for pairs in easy_vqa.load("train").questions.values():
        shape, color = easy_vqa.shape_and_color(pairs)
        if shape is not None and color is not None:
            found.append((shape, color, pairs))
    return found
