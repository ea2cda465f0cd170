"""Training examples: what a model of the embedded preset reads, as chat messages about lazily drawn pictures."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from PIL import Image

from prebench.data import easy_vqa
from prebench.data.questions import (
    CAPTION_PROMPT,
    LETTER_SUFFIX,
    SHARES,
    SHORT_SUFFIX,
    Question,
    ask,
    caption,
)
from prebench.data.scenes import Scene, generate_scene, render
from prebench.records import content_hash
from prebench.schema import DataConfig

SCENE_PREFIX = "scene-"
EASY_VQA_PREFIX = "easy-vqa-"
FINGERPRINT_IMAGES = 16


@dataclass(frozen=True)
class Example:
    """One training conversation about its pictures: one in generated data, any number in files."""

    image_ids: tuple[str, ...]
    """In the order of their placeholders."""
    messages: list[dict[str, Any]]
    """Hugging Face chat messages; the picture's placeholder opens the first user turn."""
    kind: Literal["caption", "questions"]
    prompt: Literal["chat", "plain"] = "chat"
    """The template: the processor's, or that of LLaVA's align stage."""

    @property
    def image_id(self) -> str:
        """Return the name of the only picture."""
        (image_id,) = self.image_ids
        return image_id


@dataclass(frozen=True)
class ValidationQuestion:
    """One held-out question about one picture; `text` carries its answer-format suffix."""

    image_id: str
    image: Image.Image
    type: str
    text: str
    answer: str


class TrainingData:
    """The training split of a preset: scenes and easy-VQA pictures.

    Args:
        config: what to train on. Of easy-VQA at most the 3,600 pictures of its training split are used.

    Raises:
        DataError: easy-VQA is asked for and its package's files are missing.
    """

    def __init__(self, config: DataConfig) -> None:
        self.config = config
        self.image_ids: list[str] = []
        if config.scenes is not None:
            self.image_ids += [f"{SCENE_PREFIX}{index}" for index in range(config.scenes.num_images)]
        if config.easy_vqa is not None:
            numbers = list(easy_vqa.load("train").image_paths)[: config.easy_vqa.num_images]
            self.image_ids += [f"{EASY_VQA_PREFIX}{number}" for number in numbers]

    def image(self, image_id: str) -> Image.Image:
        """Draw or read a picture (RGB; scenes 96 x 96, easy-VQA 64 x 64).

        Raises:
            DataError: an easy-VQA picture can't be read.
        """
        if image_id.startswith(SCENE_PREFIX):
            return render(self._scene(image_id))[0]
        return easy_vqa.open_image(easy_vqa.load("train").image_paths[_number(image_id)])

    def caption(self, image_id: str) -> Example | None:
        """Return a picture's captioning example; None where its questions don't tell what it shows."""
        if image_id.startswith(SCENE_PREFIX):
            text = caption(self._scene(image_id))
        else:
            shape, color = easy_vqa.shape_and_color(easy_vqa.load("train").questions[_number(image_id)])
            if shape is None or color is None:
                return None
            text = f"a {color} {shape}"
        return Example((image_id,), conversation([(CAPTION_PROMPT, text)]), "caption")

    def conversation(self, image_id: str, rng: np.random.Generator) -> Example:
        """Return several questions about one picture, drawn anew with each call.

        A question carries the benchmarks' answer-format suffix with probability `config.suffix_share`: a model that
        has seen only one of the two forms fails on the other.
        """
        drawn = self._questions(image_id, rng)
        with_suffix = rng.random(len(drawn)) < self.config.suffix_share
        turns = [(q.text + (q.suffix if add else ""), q.answer) for q, add in zip(drawn, with_suffix, strict=True)]
        return Example((image_id,), conversation(turns), "questions")

    def validation(self, num_images: int) -> list[ValidationQuestion]:
        """Return questions of the validation splits: of each scene one per type, of each easy-VQA picture one per type.

        Args:
            num_images: pictures of each source.
        """
        found = []
        scenes = self.config.scenes
        for index in range(num_images if scenes is not None else 0):
            assert scenes is not None
            scene = generate_scene(self.config.seed, "validation", index, scenes.min_objects, scenes.max_objects)
            picture = render(scene)[0]
            for name in SHARES:
                for q in ask(scene, np.random.default_rng([self.config.seed, index]), 1, types=(name,)):
                    found.append(ValidationQuestion(f"scene-{index}", picture, q.type, q.text + q.suffix, q.answer))
        if self.config.easy_vqa is not None:
            source = easy_vqa.load("validation")
            for number in list(source.image_paths)[:num_images]:
                picture = easy_vqa.open_image(source.image_paths[number])
                for name, (text, answer) in {
                    easy_vqa.question_type(t): (t, a) for t, a in source.questions[number]
                }.items():
                    kind = f"{EASY_VQA_PREFIX}{name}"
                    found.append(ValidationQuestion(f"easy-{number}", picture, kind, text + SHORT_SUFFIX, answer))
        return found

    def fingerprint(self) -> str:
        """Return a hash of the configuration and of what it yields: pictures, captions and conversations."""
        digest = hashlib.sha256(repr(self.config.model_dump(mode="json")).encode())
        step = max(1, len(self.image_ids) // FINGERPRINT_IMAGES)
        for number, image_id in enumerate(self.image_ids[::step]):
            examples = [self.caption(image_id), self.conversation(image_id, np.random.default_rng(number))]
            digest.update(self.image(image_id).tobytes())
            digest.update(content_hash([e.messages for e in examples if e is not None]).encode())
        return digest.hexdigest()[:16]

    def _scene(self, image_id: str) -> Scene:
        scenes = self.config.scenes
        assert scenes is not None, f"{image_id}: no scenes are configured"
        return generate_scene(self.config.seed, "train", _number(image_id), scenes.min_objects, scenes.max_objects)

    def _questions(self, image_id: str, rng: np.random.Generator) -> list[Question]:
        if image_id.startswith(SCENE_PREFIX):
            assert self.config.scenes is not None
            return ask(self._scene(image_id), rng, self.config.scenes.questions_per_image)
        assert self.config.easy_vqa is not None
        known = easy_vqa.load("train").questions[_number(image_id)]
        chosen = rng.permutation(len(known))[: self.config.easy_vqa.questions_per_image]
        return [Question(easy_vqa.question_type(known[i][0]), *known[i]) for i in chosen]


def conversation(turns: list[tuple[str, str]]) -> list[dict[str, Any]]:
    """Return (question, answer) turns about one picture as chat messages."""
    messages: list[dict[str, Any]] = []
    for question, answer in turns:
        picture = [] if messages else [{"type": "image"}]
        messages.append({"role": "user", "content": [*picture, {"type": "text", "text": question}]})
        messages.append({"role": "assistant", "content": [{"type": "text", "text": answer}]})
    return messages


def corpus(num_scenes: int = 400, seed: int = 0) -> Iterator[str]:
    """Yield representative texts for the tokenizer: every word of prompts, questions, answers and captions.

    Scenes come from the `pretrain` split, easy-VQA's words from its training split.
    """
    for index in range(num_scenes):
        scene = generate_scene(seed, "pretrain", index)
        yield CAPTION_PROMPT
        yield caption(scene)
        for name in SHARES:
            # Every type equally often: the rare words need tokens, too.
            for question in ask(scene, np.random.default_rng([seed, index]), 2, types=(name,)):
                yield question.text + (question.suffix if index % 2 else "")
                yield question.answer
    for pairs in list(easy_vqa.load("train").questions.values())[:num_scenes]:
        for text, answer in pairs:
            yield text
            yield answer
    for _ in range(num_scenes):
        yield SHORT_SUFFIX
        yield LETTER_SUFFIX
        yield "0 1 2 3 4 5 6 7 8 9 10"
        yield "A B C D E"


def _number(image_id: str) -> int:
    return int(image_id.rpartition("-")[2])
