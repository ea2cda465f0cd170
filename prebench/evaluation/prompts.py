"""From chat messages to token ids and image features: the part of the engine that runs once per document and image."""

from __future__ import annotations

import struct
import sys
import zlib
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from jinja2 import TemplateError
from PIL import Image
from torch import Tensor

from prebench.images import marked_reason, pixel_hash, require_size, to_rgb
from prebench.records import content_hash

Messages = Sequence[Mapping[str, Any]]

DOCUMENT_ERRORS = (
    OSError,
    ValueError,
    RuntimeError,
    SyntaxError,  # PIL: broken PNG chunks
    EOFError,
    TypeError,
    KeyError,
    IndexError,
    AttributeError,
    AssertionError,
    struct.error,
    zlib.error,
    TemplateError,
    Image.DecompressionBombError,
)
"""What a broken document (image, missing field) can raise in PIL, datasets, a task's functions or the chat template."""


@dataclass(frozen=True)
class Prompt:
    """One tokenised prompt. `ids[:prefix_length]` ends with the last image token; it is what questions share."""

    ids: tuple[int, ...]
    prefix_length: int
    images: tuple[str, ...]
    """Keys into the ImageStore, in the order of the prompt."""
    prompt_hash: str
    image_hash: str
    room: int
    """New tokens that the model's context leaves after the prompt (at least one)."""

    @property
    def prefix_key(self) -> tuple[tuple[int, ...], tuple[str, ...]]:
        """Return what decides the prefix's hidden states: token ids and image content."""
        return self.ids[: self.prefix_length], self.images

    @property
    def suffix(self) -> tuple[int, ...]:
        """Return the tokens that belong to this question alone (at least one)."""
        return self.ids[self.prefix_length :]


@dataclass(frozen=True)
class ImageInputs:
    """One preprocessed image: the model's keyword arguments (leading dimension 1) and its number of tokens."""

    features: dict[str, Tensor]
    num_tokens: int


class ImageStore:
    """Preprocessed images by content, least recently used first out."""

    def __init__(self, processor: Any, image_token_id: int, capacity: int = 512) -> None:
        self._processor = processor
        self._image_token_id = image_token_id
        self._capacity = capacity
        self._inputs: OrderedDict[str, ImageInputs] = OrderedDict()

    def add(self, image: Image.Image) -> str:
        """Preprocess an image unless equal content was seen lately, and return its content hash.

        Raises:
            OSError, ValueError, ...: the image can't be decoded or is too large (DOCUMENT_ERRORS).
        """
        key, rgb = _rgb_and_hash(image)
        if key in self._inputs:
            self._inputs.move_to_end(key)
        else:
            self._inputs[key] = self._preprocess(rgb)
        return key

    def __getitem__(self, key: str) -> ImageInputs:
        """Return a stored image."""
        return self._inputs[key]

    def trim(self) -> None:
        """Forget the oldest images; called between windows, so that a window's own images stay."""
        while len(self._inputs) > self._capacity:
            self._inputs.popitem(last=False)

    def _preprocess(self, image: Image.Image) -> ImageInputs:
        batch = self._processor(text=self._processor.image_token, images=[image], return_tensors="pt")
        ids = batch.pop("input_ids")
        batch.pop("attention_mask", None)
        batch.pop("mm_token_type_ids", None)
        return ImageInputs(dict(batch), int((ids == self._image_token_id).sum()))


def _rgb_and_hash(image: Image.Image) -> tuple[str, Image.Image]:
    if not isinstance(image, Image.Image):
        raise ValueError(f"an image was expected, not {type(image).__name__}")
    require_size(image)
    rgb = to_rgb(image)
    if reason := marked_reason(rgb):
        raise ValueError(f"unreadable when the mirror was made: {reason}")
    return pixel_hash(rgb), rgb


class PromptBuilder:
    """Renders messages with the model's chat template and expands image tokens as its processor does."""

    def __init__(self, processor: Any, image_token_id: int, context_length: int = sys.maxsize) -> None:
        self._processor = processor
        self._image_token_id = image_token_id
        self._context_length = context_length
        self.images = ImageStore(processor, image_token_id)

    def build(self, messages: Messages) -> Prompt:
        """Return the tokenised prompt; its images are in `self.images` afterwards.

        Args:
            messages: Hugging Face chat schema with PIL images inside: `{"type": "image", "image": image}`.

        Raises:
            ValueError and other DOCUMENT_ERRORS: an image is broken, placeholders and images do not match, or the
                model's context leaves no room for an answer.
        """
        keys = [self.images.add(part["image"]) for part in _image_parts(messages)]
        text = self._processor.apply_chat_template(
            _without_pixels(messages), tokenize=False, add_generation_prompt=True
        )
        pieces = text.split(self._processor.image_token)
        if len(pieces) - 1 != len(keys):
            raise ValueError(f"the prompt holds {len(pieces) - 1} image tokens for {len(keys)} images")
        expanded = pieces[0]
        for key, piece in zip(keys, pieces[1:], strict=True):
            expanded += self._processor.image_token * self.images[key].num_tokens + piece
        ids = tuple(self._processor.tokenizer(expanded)["input_ids"])
        prefix_length = max((i + 1 for i, token in enumerate(ids) if token == self._image_token_id), default=0)
        if prefix_length == len(ids):
            raise ValueError(
                "the prompt ends with an image; a question must follow it" if ids else "the prompt is empty"
            )
        room = self._context_length - len(ids)
        if room < 1:
            raise ValueError(f"a prompt of {len(ids)} tokens leaves no room in the context of {self._context_length}")
        image_hash = keys[0] if len(keys) == 1 else content_hash(keys) if keys else ""
        return Prompt(ids, prefix_length, tuple(keys), content_hash(text), image_hash, room)


def context_length(config: Any) -> int:
    """Return how many tokens a model was made for, prompt and answer together; no limit where it names none."""
    return getattr(config.get_text_config(), "max_position_embeddings", None) or sys.maxsize


def _image_parts(messages: Messages) -> list[Mapping[str, Any]]:
    return [
        part
        for message in messages
        if not isinstance(message["content"], str)
        for part in message["content"]
        if part["type"] == "image"
    ]


def _without_pixels(messages: Messages) -> list[dict[str, Any]]:
    return [
        {
            "role": message["role"],
            "content": message["content"]
            if isinstance(message["content"], str)
            else [
                {"type": "image"} if part["type"] == "image" else {"type": "text", "text": _text(part["text"])}
                for part in message["content"]
            ],
        }
        for message in messages
    ]


def _text(value: Any) -> str:
    if not isinstance(value, str):  # a template would ask the question "None"
        raise ValueError(f"a text was expected, not {type(value).__name__}")
    return value
