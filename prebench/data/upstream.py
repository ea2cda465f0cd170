"""Rows of the mirrored benchmarks in the schemas that lmms-eval's own task code reads, filled from test scenes.

Each benchmark keeps what makes it itself: compositional questions in GQA, ten annotators who do not always agree in
VQAv2, random, popular and adversarial negatives in POPE, rotated options (CircularEval) in MMBench. The easy-VQA rows
are real. Every task draws scenes of its own, and all questions about one picture share its id.
"""

from __future__ import annotations

import io
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from PIL import Image

from prebench.data import easy_vqa
from prebench.data.probe_scenes import drawn
from prebench.data.questions import (
    LETTERS,
    PLACES,
    RELATIONS,
    Question,
    absent_names,
    ask,
    choices_question,
    existence,
    options_text,
)
from prebench.data.references import Document
from prebench.data.scenes import COLORS, SHAPES, Scene, generate_scene, labels, render, scene_rng
from prebench.schema import ProbeConfig, TaskConfig

GQA_TYPES = {
    "existence": ("verify", "obj", "existAttr"),
    "color": ("query", "attr", "color"),
    "shape": ("query", "cat", "category"),
    "position": ("query", "attr", "positionQuery"),
    "relation": ("choose", "rel", "relChooser"),
    "choose": ("choose", "attr", "chooseColor"),
    "logical": ("logical", "obj", "existAnd"),
    "rare": ("query", "attr", "size"),
}
"""Question type -> GQA's structural, semantic and detailed type."""
VQA_TYPES = {
    "existence": "yes/no",
    "relation": "other",
    "logical": "yes/no",
    "color": "other",
    "shape": "other",
    "position": "other",
    "count": "number",
    "color_count": "number",
}
"""Question type -> VQAv2's answer type."""
DISSENTERS = (0.5, 0.25, 0.15, 0.1)
"""Probability that 0, 1, 2 or 3 of the ten annotators disagree: the right answer always keeps full credit."""
CIRCULAR_STRIDE = 1_000_000
SCENES_PER_TASK = 1_000_000
FIRST_SCENE = {name: SCENES_PER_TASK * number for number, name in enumerate(("gqa", "vqav2_val", "pope", "mmbench"))}
"""First test scene of each benchmark: no two share a picture."""


@dataclass(frozen=True)
class Table:
    """One config and split of a data set on the Hub."""

    config: str
    split: str
    rows: list[dict[str, Any]]
    images: tuple[str, ...] = ()
    """Columns that hold pictures (PNG bytes)."""


@dataclass(frozen=True)
class Benchmark:
    """A data set as the Hub would hold it."""

    repo: str
    data_source: Literal["generated", "real"]
    tables: tuple[Table, ...]
    documents: tuple[Document, ...] = ()
    """What is asked, for the scores without a picture; empty for the probe."""

    @property
    def num_docs(self) -> int:
        """Return the rows of the evaluated table (the first)."""
        return len(self.tables[0].rows)


def png(image: Image.Image) -> dict[str, Any]:
    """Return a picture as the `datasets` Image feature stores it."""
    buffer = io.BytesIO()
    image.save(buffer, format="PNG")
    return {"bytes": buffer.getvalue(), "path": None}


def benchmark_scene(seed: int, split: str, index: int) -> Scene:
    """Return a scene of the benchmarks' world: the test scenes, and the training scenes of the blind prior.

    Both have the generator's default object counts, whatever a preset trains on: with other counts "how many objects
    are there?" would have another most frequent answer, and the blind score would not be the test questions'.
    """
    return generate_scene(seed, split, index)


def gqa(task: TaskConfig, seed: int) -> Benchmark:
    """Return `lmms-lab-encoder/GQA`: questions and pictures in two configs, joined by imageId."""
    questions: list[dict[str, Any]] = []
    images: list[dict[str, Any]] = []
    documents = []
    for scene, rng in _test_scenes("gqa", task, seed):
        image_id = f"scene-{scene.index}"
        images.append({"id": image_id, "image": png(render(scene)[0])})
        for question in ask(scene, rng, task.questions_per_image, tuple(GQA_TYPES)):
            questions.append(_gqa_row(f"{len(questions):08d}", image_id, question))
            documents.append(Document(question, {question.answer: 1.0}))
    return Benchmark(
        "lmms-lab-encoder/GQA",
        "generated",
        (
            Table("testdev_balanced_instructions", "testdev", questions),
            Table("testdev_balanced_images", "testdev", images, ("image",)),
        ),
        tuple(documents),
    )


def _gqa_row(row_id: str, image_id: str, question: Question) -> dict[str, Any]:
    structural, semantic, detailed = GQA_TYPES[question.type]
    if question.type == "rare" and question.answer in ("yes", "no"):
        structural, detailed = "verify", "sizeVerify"
    return {
        "id": row_id,
        "imageId": image_id,
        "question": question.text,
        "answer": question.answer,
        "fullAnswer": f"the answer is {question.answer}.",
        "isBalanced": True,
        "groups": {"global": question.type, "local": f"{image_id}-{question.type}"},
        "entailed": "[]",
        "equivalent": f"['{row_id}']",
        "types": {"structural": structural, "semantic": semantic, "detailed": detailed},
        "semanticStr": "",
    }


def vqav2(task: TaskConfig, seed: int) -> Benchmark:
    """Return `lmms-lab-encoder/VQAv2`: ten annotators per question, of whom up to three give another answer."""
    rows: list[dict[str, Any]] = []
    documents = []
    for scene, rng in _test_scenes("vqav2_val", task, seed):
        picture = png(render(scene)[0])
        for number, question in enumerate(ask(scene, rng, task.questions_per_image, tuple(VQA_TYPES))):
            answers = _annotators(question, rng)
            rows.append(
                {
                    "question_type": " ".join(question.text.split()[:2]),
                    "multiple_choice_answer": question.answer,
                    "answers": answers,
                    "image_id": scene.index,
                    "answer_type": VQA_TYPES[question.type],
                    "question_id": scene.index * 1000 + number,
                    "question": question.text,
                    "image": picture,
                }
            )
            documents.append(Document(question, vqa_credit([a["answer"] for a in answers])))
    table = Table("default", "validation", rows, ("image",))
    return Benchmark("lmms-lab-encoder/VQAv2", "generated", (table,), tuple(documents))


def vqa_credit(answers: list[str]) -> dict[str, float]:
    """Return VQA accuracy per answer: the mean over annotators of min(1, agreeing others / 3) (Goyal et al., 2017)."""
    counts = Counter(answers)
    return {
        answer: sum(min(1.0, (count - (given == answer)) / 3) for given in answers) / len(answers)
        for answer, count in counts.items()
    }


def _annotators(question: Question, rng: np.random.Generator) -> list[dict[str, Any]]:
    dissenters = int(rng.choice(len(DISSENTERS), p=DISSENTERS))
    answers = [question.answer] * (10 - dissenters) + [_mistake(question, rng) for _ in range(dissenters)]
    sure = ["yes"] * (10 - dissenters) + ["maybe"] * dissenters
    order = rng.permutation(10)
    return [
        {"answer": answers[i], "answer_confidence": sure[i], "answer_id": position}
        for position, i in enumerate(order, start=1)
    ]


def _mistake(question: Question, rng: np.random.Generator) -> str:
    if question.answer in ("yes", "no"):
        return "no" if question.answer == "yes" else "yes"
    if question.answer.isdigit():
        return str(abs(int(question.answer) + (1 if rng.random() < 0.5 else -1)))
    kinds = RELATIONS if question.type == "relation" else (COLORS, SHAPES, tuple(p for row in PLACES for p in row))
    others = [v for kind in kinds if question.answer in kind for v in kind if v != question.answer]
    return others[int(rng.integers(len(others)))]


def pope(task: TaskConfig, seed: int) -> Benchmark:
    """Return `lmms-lab-encoder/POPE`: as many present as absent objects per picture and category (Li et al., 2023).

    Absent objects are any (random), among the more frequent half of all objects in these pictures (popular), or of
    a colour and a shape that are both present, though not together (adversarial).
    """
    drawn = list(_test_scenes("pope", task, seed))
    frequency = Counter(item.name for scene, _ in drawn for item in scene.objects)
    names = sorted((f"{color} {shape}" for color in COLORS for shape in SHAPES), key=lambda n: (-frequency[n], n))
    popular = set(names[: len(names) // 2])
    rows: list[dict[str, Any]] = []
    documents = []
    for scene, rng in drawn:
        picture = png(render(scene)[0])
        hard, easy = absent_names(scene)
        absent = hard + easy
        pairs = max(1, min(task.questions_per_image // 6, len(scene.objects)))
        present = _sample([item.name for item in scene.objects], pairs, rng)
        pools = {"random": absent, "popular": [n for n in absent if n in popular], "adversarial": hard}
        for category, pool in pools.items():
            missing = _sample(pool, pairs, rng)
            # Where all present objects share colour or shape, too few hard ones are left.
            missing += _sample([name for name in absent if name not in missing], pairs - len(missing), rng)
            for name in [*present, *missing]:
                question = Question("existence", existence(name, True), "yes" if name in present else "no")
                rows.append(_pope_row(len(rows), scene, category, question, picture))
                documents.append(Document(question, {question.answer: 1.0}))
    table = Table("default", "test", rows, ("image",))
    return Benchmark("lmms-lab-encoder/POPE", "generated", (table,), tuple(documents))


def _pope_row(number: int, scene: Scene, category: str, question: Question, picture: dict[str, Any]) -> dict[str, Any]:
    return {
        "id": str(number),
        "question_id": str(number + 1),
        "question": question.text,
        "answer": question.answer,
        "image_source": f"scene-{scene.index}",
        "image": picture,
        "category": category,
    }


def mmbench(task: TaskConfig, seed: int) -> Benchmark:
    """Return `lmms-lab-encoder/MMBench` (config en): one question per picture, once per rotation of its options.

    The rows of one question have indices that agree modulo 1,000,000 (CircularEval, Liu et al., 2023).
    """
    rows: list[dict[str, Any]] = []
    documents = []
    for number, (scene, rng) in enumerate(_test_scenes("mmbench", task, seed)):
        made = choices_question(scene, rng)
        if made is None:
            continue
        text, answer, options = made
        picture = png(render(scene)[0])
        for shift in range(len(options)):
            rotated = options[shift:] + options[:shift]
            letter = LETTERS[rotated.index(answer)]
            rows.append(
                {
                    "index": number + shift * CIRCULAR_STRIDE,
                    "question": text,
                    "hint": "nan",
                    "answer": letter,
                    **dict(zip(LETTERS, rotated, strict=True)),
                    "category": "attribute_recognition" if answer in COLORS else "object_recognition",
                    "image": picture,
                    "source": "prebench scenes",
                    "L2-category": "finegrained_perception (instance-level)",
                    "comment": "nan",
                    "split": "dev",
                }
            )
            question = Question("multiple_choice", f"{text} {options_text(rotated)}", letter)
            documents.append(Document(question, {letter: 1.0}, group=str(number)))
    table = Table("en", "dev", rows, ("image",))
    return Benchmark("lmms-lab-encoder/MMBench", "generated", (table,), tuple(documents))


def easy_vqa_test(task: TaskConfig, seed: int) -> Benchmark:
    """Return `prebench/easy_vqa`: real test pictures of easy-VQA, drawn by seed, each with all of its questions."""
    source = easy_vqa.load("test")
    numbers = sorted(source.image_paths)
    chosen = np.random.default_rng(seed).permutation(len(numbers))[: task.num_images]
    rows: list[dict[str, Any]] = []
    documents = []
    for number in sorted(numbers[i] for i in chosen):
        picture = png(easy_vqa.open_image(source.image_paths[number]))
        for position, (text, answer) in enumerate(source.questions[number]):
            question = Question(easy_vqa.question_type(text), text, answer)
            rows.append(
                {
                    "image": picture,
                    "question": text,
                    "answer": answer,
                    "image_id": f"easy-vqa-test-{number}",
                    "question_id": f"{number}-{position}",
                    "type": question.type,
                }
            )
            documents.append(Document(question, {answer: 1.0}))
    table = Table("default", "test", rows, ("image",))
    return Benchmark("prebench/easy_vqa", "real", (table,), tuple(documents))


def visual_probe(probe: ProbeConfig, seed: int) -> Benchmark:
    """Return `prebench/visual_probe`: pictures, exact masks and labels in three subsets of disjoint scenes."""
    rows = []
    for index, (subset, scene) in enumerate(drawn(probe, seed)):
        image, mask = render(scene)
        rows.append(
            {
                "image": png(image),
                "mask": png(Image.fromarray(mask)),
                "image_id": f"probe-{index}",
                "subset": subset,
                **labels(scene),
                "object_names": [item.name for item in scene.objects],
            }
        )
    table = Table("default", "test", rows, ("image", "mask"))
    return Benchmark("prebench/visual_probe", "generated", (table,))


def _test_scenes(name: str, task: TaskConfig, seed: int) -> Iterator[tuple[Scene, np.random.Generator]]:
    assert task.num_images is not None, "a suite without a number of pictures has been refused"
    for index in range(FIRST_SCENE[name], FIRST_SCENE[name] + task.num_images):
        yield benchmark_scene(seed, "test", index), scene_rng(seed, "test", index, stream=2)


def _sample(names: list[str], count: int, rng: np.random.Generator) -> list[str]:
    return [names[i] for i in rng.permutation(len(names))[:count]]
