"""Captions and questions in words about a scene.

Answers are balanced, so that the text of a question says little about its answer, and negatives are hard. The word that
decides stands late in a question. Neither background nor fill is ever mentioned; size is in the rare questions alone.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np

from prebench.data.scenes import COLORS, SHAPES, SIZES, Scene, SceneObject

T = TypeVar("T")

SHORT_SUFFIX = "\nAnswer the question using a single word or phrase."
"""What lmms-eval's tasks append to a question (after LLaVA-1.5)."""
LETTER_SUFFIX = "\n\nAnswer with the option's letter from the given choices directly."
"""What lmms-eval's MMBench appends to its options."""
OPTIONS_PROMPT = "There are several options:"
"""What lmms-eval's MMBench puts between question and options."""
CAPTION_PROMPT = "describe the image."
LETTERS = "ABCD"
PLACES = (
    ("top left", "top", "top right"),
    ("left", "center", "right"),
    ("bottom left", "bottom", "bottom right"),
)
"""Where a cell of the grid is, by row and column."""
RELATIONS = (("left", "right"), ("above", "below"))
"""The two answers to a question about columns, and to one about rows."""
IN_THE_IMAGE_SHARE = 0.25
"""Share of the existence questions that end as POPE's do ("in the image?")."""

SHARES = {
    "existence": 0.18,
    "color": 0.19,
    "shape": 0.16,
    "count": 0.05,
    "color_count": 0.114,
    "position": 0.12,
    "relation": 0.14,
    "multiple_choice": 0.05,
    "choose": 0.04,
    "logical": 0.04,
    "rare": 0.018,
}
"""Relative share of the draws per question type. A draw that a scene does not admit, or that repeats a text, is drawn
again, which costs colour and shape most: of eight questions per scene, 2% are rare."""


@dataclass(frozen=True)
class Question:
    """A question about a picture and its one right answer."""

    type: str
    text: str
    answer: str

    @property
    def suffix(self) -> str:
        """Return the answer-format suffix of the benchmarks that ask this kind of question."""
        return LETTER_SUFFIX if self.type == "multiple_choice" else SHORT_SUFFIX


def caption(scene: Scene) -> str:
    """Return all objects in reading order: "a red circle, a blue square and a teal star"."""
    names = [f"a {item.name}" for item in scene.objects]
    return " and ".join([", ".join(names[:-1]), names[-1]]) if len(names) > 1 else names[0]


def ask(
    scene: Scene, rng: np.random.Generator, num_questions: int, types: tuple[str, ...] = tuple(SHARES)
) -> list[Question]:
    """Return distinct questions about a scene, drawn with `SHARES` (renormalised over `types`).

    Fewer than `num_questions` come back only where the scene does not admit as many.
    """
    shares = np.asarray([SHARES[name] for name in types])
    found: dict[str, Question] = {}
    for _ in range(40 * num_questions):
        if len(found) == num_questions:
            break
        name = types[rng.choice(len(types), p=shares / shares.sum())]
        question = _MAKERS[name](scene, rng)
        if question is not None:
            found.setdefault(question.text, question)
    return list(found.values())


def existence(name: str, in_the_image: bool = False) -> str:
    """Return the text of an existence question about an object's name."""
    return f"is there a {name}{' in the image' if in_the_image else ''}?"


def absent_names(scene: Scene) -> tuple[list[str], list[str]]:
    """Return the absent objects' names: hard ones (colour and shape present, not together), and all others."""
    present = {item.name for item in scene.objects}
    shapes, colors = _unique_counts(scene)
    hard: list[str] = []
    easy: list[str] = []
    for shape in SHAPES:
        for color in COLORS:
            if f"{color} {shape}" not in present:
                (hard if shape in shapes and color in colors else easy).append(f"{color} {shape}")
    return hard, easy


def _unique_counts(scene: Scene) -> tuple[Counter[str], Counter[str]]:
    return Counter(item.shape for item in scene.objects), Counter(item.color for item in scene.objects)


def _pick(rng: np.random.Generator, values: Sequence[T]) -> T:
    return values[int(rng.integers(len(values)))]


def _yes(value: bool) -> str:
    return "yes" if value else "no"


def _absent(scene: Scene, rng: np.random.Generator) -> str:
    hard, easy = absent_names(scene)
    return _pick(rng, hard if hard and rng.random() < 0.5 else easy)


def _existence(scene: Scene, rng: np.random.Generator) -> Question:
    there = rng.random() < 0.5
    name = _pick(rng, scene.objects).name if there else _absent(scene, rng)
    return Question("existence", existence(name, rng.random() < IN_THE_IMAGE_SHARE), _yes(there))


def _unique_shape(scene: Scene, rng: np.random.Generator) -> SceneObject | None:
    shapes, _ = _unique_counts(scene)
    known = [item for item in scene.objects if shapes[item.shape] == 1]
    return _pick(rng, known) if known else None


def _unique_color(scene: Scene, rng: np.random.Generator) -> SceneObject | None:
    _, colors = _unique_counts(scene)
    known = [item for item in scene.objects if colors[item.color] == 1]
    return _pick(rng, known) if known else None


def _color(scene: Scene, rng: np.random.Generator) -> Question | None:
    item = _unique_shape(scene, rng)
    return None if item is None else Question("color", f"what color is the {item.shape}?", item.color)


def _shape(scene: Scene, rng: np.random.Generator) -> Question | None:
    item = _unique_color(scene, rng)
    return None if item is None else Question("shape", f"which shape is {item.color}?", item.shape)


def _count(scene: Scene, rng: np.random.Generator) -> Question:
    return Question("count", "how many objects are there?", str(len(scene.objects)))


def _color_count(scene: Scene, rng: np.random.Generator) -> Question:
    _, counts = _unique_counts(scene)
    # First the number, then a colour that occurs so often: otherwise most answers would be 0 or 1.
    number = _pick(rng, sorted({counts[color] for color in COLORS}))
    color = _pick(rng, [color for color in COLORS if counts[color] == number])
    return Question("color_count", f"how many objects are {color}?", str(number))


def _position(scene: Scene, rng: np.random.Generator) -> Question | None:
    item = _unique_shape(scene, rng)
    if item is None:
        return None
    return Question("position", f"where is the {item.shape}?", PLACES[item.row][item.col])


def _relation(scene: Scene, rng: np.random.Generator) -> Question | None:
    shapes, _ = _unique_counts(scene)
    known = [item for item in scene.objects if shapes[item.shape] == 1]
    if len(known) < 2:
        return None
    first, second = (known[i] for i in rng.permutation(len(known))[:2])
    across = rng.random() < 0.5
    distance = second.col - first.col if across else second.row - first.row
    if distance == 0:
        return None
    sides = RELATIONS[0] if across else RELATIONS[1]
    where = f"{sides[0]} or {sides[1]}{' of' if across else ''}"
    return Question("relation", f"is the {first.shape} {where} the {second.shape}?", sides[0 if distance > 0 else 1])


def choices_question(scene: Scene, rng: np.random.Generator) -> tuple[str, str, list[str]] | None:
    """Return a colour or shape question with its answer and four options in random order, or None."""
    makers = (_color, _shape) if rng.random() < 0.5 else (_shape, _color)
    base = makers[0](scene, rng) or makers[1](scene, rng)
    if base is None:
        return None
    others = [value for value in (COLORS if base.type == "color" else SHAPES) if value != base.answer]
    options = [base.answer, *(others[i] for i in rng.permutation(len(others))[: len(LETTERS) - 1])]
    return base.text, base.answer, [options[i] for i in rng.permutation(len(options))]


def options_text(options: list[str]) -> str:
    """Return the options as lmms-eval's MMBench writes them, one "A. red" a line."""
    lines = [f"{letter}. {option}" for letter, option in zip(LETTERS, options, strict=False)]
    return "\n".join([OPTIONS_PROMPT, *lines])


def _multiple_choice(scene: Scene, rng: np.random.Generator) -> Question | None:
    made = choices_question(scene, rng)
    if made is None:
        return None
    text, answer, options = made
    return Question("multiple_choice", f"{text} {options_text(options)}", LETTERS[options.index(answer)])


def _choose(scene: Scene, rng: np.random.Generator) -> Question | None:
    item = _unique_shape(scene, rng)
    if item is None:
        return None
    pair = [item.color, _pick(rng, [color for color in COLORS if color != item.color])]
    first, second = (pair[i] for i in rng.permutation(2))
    return Question("choose", f"{first} or {second}: what color is the {item.shape}?", item.color)


def _logical(scene: Scene, rng: np.random.Generator) -> Question:
    there = rng.random() < 0.5
    present = [item.name for item in scene.objects]
    if there and len(present) > 1:
        names = [present[i] for i in rng.permutation(len(present))[:2]]
    else:
        names = [_pick(rng, present), _absent(scene, rng)]
        names = [names[i] for i in rng.permutation(2)]
    both = all(name in present for name in names)
    return Question("logical", f"are there a {names[0]} and a {names[1]}?", _yes(both))


def _rare(scene: Scene, rng: np.random.Generator) -> Question:
    item = _pick(rng, scene.objects)
    if rng.random() < 0.5:
        return Question("rare", f"what size is the {item.name}?", item.size)
    size = _pick(rng, SIZES)
    return Question("rare", f"is the {item.name} {size}?", _yes(item.size == size))


_MAKERS: dict[str, Callable[[Scene, np.random.Generator], Question | None]] = {
    "existence": _existence,
    "color": _color,
    "shape": _shape,
    "count": _count,
    "color_count": _color_count,
    "position": _position,
    "relation": _relation,
    "multiple_choice": _multiple_choice,
    "choose": _choose,
    "logical": _logical,
    "rare": _rare,
}
