"""From chat messages to token ids and image features: the part of the engine that runs once per document and image."""

from __future__ import annotations

import struct
import sys
import zlib
from collections import OrderedDict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jinja2 import TemplateError
from PIL import Image
from torch import Tensor

from prebench.errors import one_line
from prebench.images import hash_of_pixels, marked_reason, require_size, to_rgb
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


IMAGES_AT_ONCE = 8
"""Images of equal size that are preprocessed in one call: one at a time costs twice as much, more at once no less."""
CACHED_BYTES = 4_000_000
"""Preprocessed images that are kept for the next windows: questions about an image mostly stand side by side."""


@dataclass(frozen=True)
class Draft:
    """Messages whose images have been looked at."""

    chat: list[dict[str, Any]]
    """What the chat template sees: the messages without pixels."""
    images: tuple[str, ...]
    """Content hashes, in the order of the messages."""


@dataclass(frozen=True)
class Prompt:
    """A rendered prompt: all that decides its answer, before a token or a preprocessed pixel is computed."""

    text: str
    images: tuple[str, ...]
    """Content hashes of the images, in the order of the prompt."""
    prompt_hash: str
    image_hash: str


@dataclass(frozen=True)
class Encoded:
    """A tokenised prompt. `ids[:prefix_length]` ends with the last image token; it is what questions share."""

    ids: tuple[int, ...]
    prefix_length: int
    images: tuple[str, ...]
    room: int
    """New tokens that the model's context leaves after the prompt (at least one)."""

    @property
    def prefix_key(self) -> tuple[tuple[int, ...], tuple[str, ...]]:
        """Return what decides the prefix's hidden states: token ids and image content."""
        return self.ids[: self.prefix_length], self.images

    @property
    def suffix(self) -> tuple[int, ...]:
        """Return the tokens that belong to this question alone; none where the prompt ends with an image."""
        return self.ids[self.prefix_length :]


@dataclass(frozen=True)
class ImageInputs:
    """One preprocessed image: the model's keyword arguments (leading dimension 1) and its number of tokens."""

    features: dict[str, Tensor]
    num_tokens: int

    @property
    def num_bytes(self) -> int:
        """Return the size of the tensors."""
        return sum(tensor.nbytes for tensor in self.features.values())


Images = Mapping[str, ImageInputs | str]
"""Preprocessed images by content hash; a line of error stands where an image could not be preprocessed."""


class ImageStore:
    """Preprocesses images, and keeps the latest by content."""

    def __init__(self, processor: Any, image_token_id: int) -> None:
        self._processor = processor
        self._image_token_id = image_token_id
        self._inputs: OrderedDict[str, ImageInputs] = OrderedDict()
        self._num_bytes = 0
        self._num_tokens: dict[tuple[int, int], int] = {}
        self.largest = 0
        """Bytes of the largest preprocessed image so far."""

    def __contains__(self, key: str) -> bool:
        """Tell whether an image is preprocessed already."""
        return key in self._inputs

    def take(self, keys: Iterable[str], pixels: Mapping[str, Image.Image]) -> dict[str, ImageInputs | str]:
        """Return preprocessed images, each the same as if it were preprocessed alone.

        Args:
            keys: which, by content hash.
            pixels: RGB images; those that are not in the store must be there.
        """
        found: dict[str, ImageInputs | str] = {}
        by_size: dict[tuple[int, int], list[str]] = {}
        for key in dict.fromkeys(keys):
            if key in self._inputs:
                self._inputs.move_to_end(key)
                found[key] = self._inputs[key]
            else:
                by_size.setdefault(pixels[key].size, []).append(key)
        for same_size in by_size.values():
            for start in range(0, len(same_size), IMAGES_AT_ONCE):
                chunk = same_size[start : start + IMAGES_AT_ONCE]
                found.update(zip(chunk, self._chunk([pixels[key] for key in chunk]), strict=True))
        for key in found:
            self._keep(key, found[key])
        return found

    def _chunk(self, images: list[Image.Image]) -> list[ImageInputs | str]:
        """Preprocess images of equal size together, or one by one where that fails."""
        try:
            return list(self._preprocess(images))
        except DOCUMENT_ERRORS as error:
            if len(images) == 1:
                return [one_line(error)]
            return [self._chunk([image])[0] for image in images]

    def _preprocess(self, images: list[Image.Image]) -> list[ImageInputs]:
        """Preprocess images of equal size, which have equal numbers of tokens: the first of a size tells it."""
        size = images[0].size
        if size not in self._num_tokens:
            self._num_tokens[size] = self._count_tokens(images[0])
        batch = self._processor.image_processor(images, return_tensors="pt")
        if any(len(tensor) != len(images) for tensor in batch.values()):
            raise ValueError("the processor does not give one row per image")
        return [
            ImageInputs({name: tensor[row : row + 1] for name, tensor in batch.items()}, self._num_tokens[size])
            for row in range(len(images))
        ]

    def _count_tokens(self, image: Image.Image) -> int:
        """Return the number of tokens that the processor, which joins tokenizer and image processor, puts in."""
        batch = self._processor(text=self._processor.image_token, images=image, return_tensors="pt")
        alone = self._processor.image_processor(image, return_tensors="pt")
        if any(name not in batch or not torch.equal(batch[name], tensor) for name, tensor in alone.items()):
            raise ValueError("the processor changes what its image processor gives")
        return int((batch["input_ids"] == self._image_token_id).sum())

    def _keep(self, key: str, inputs: ImageInputs | str) -> None:
        if key in self._inputs or isinstance(inputs, str):
            return
        self._inputs[key] = inputs
        self._num_bytes += inputs.num_bytes
        self.largest = max(self.largest, inputs.num_bytes)
        while self._num_bytes > CACHED_BYTES:
            self._num_bytes -= self._inputs.popitem(last=False)[1].num_bytes


class PromptBuilder:
    """Renders messages with the model's chat template and expands image tokens as its processor does."""

    def __init__(self, processor: Any, image_token_id: int, context_length: int = sys.maxsize) -> None:
        self._processor = processor
        self._image_token_id = image_token_id
        self._context_length = context_length
        self._expand_ids = self._expansion_is_local()
        self._latest: tuple[tuple[int, int], bytes, str] = (0, 0), b"", ""  # size, pixels and hash
        self.images = ImageStore(processor, image_token_id)

    def look(self, messages: Messages) -> tuple[Draft, dict[str, Image.Image]]:
        """Return what is to be rendered, and the images in RGB, by content hash.

        Args:
            messages: Hugging Face chat schema with PIL images inside: `{"type": "image", "image": image}`.

        Raises:
            ValueError and other DOCUMENT_ERRORS: an image is broken.
        """
        images = [self._rgb_and_hash(part["image"]) for part in _image_parts(messages)]
        return Draft(_without_pixels(messages), tuple(key for key, _ in images)), dict(images)

    def render(self, drafts: Sequence[Draft]) -> list[Prompt | str]:
        """Render drafts together; a line of error stands where the chat template can't, or loses an image."""
        texts = self._texts([draft.chat for draft in drafts])
        return [self._rendered(draft, text) for draft, text in zip(drafts, texts, strict=True)]

    def _rendered(self, draft: Draft, text: str | Exception) -> Prompt | str:
        if isinstance(text, Exception):
            return one_line(text)
        keys = draft.images
        placeholders = text.count(self._processor.image_token)
        if placeholders != len(keys):
            return f"ValueError: the prompt holds {placeholders} image tokens for {len(keys)} images"
        image_hash = keys[0] if len(keys) == 1 else content_hash(keys) if keys else ""
        return Prompt(text, keys, content_hash(text), image_hash)

    def _texts(self, chats: list[list[dict[str, Any]]]) -> list[str | Exception]:
        """Return each rendered chat: one call for all takes half as long per chat, and what fails is tried alone."""
        try:
            template = self._processor.apply_chat_template
            return template(chats, tokenize=False, add_generation_prompt=True) if chats else []
        except DOCUMENT_ERRORS as error:
            return [error] if len(chats) == 1 else [self._texts([chat])[0] for chat in chats]

    def _rgb_and_hash(self, image: Image.Image) -> tuple[str, Image.Image]:
        if not isinstance(image, Image.Image):
            raise ValueError(f"an image was expected, not {type(image).__name__}")
        require_size(image)
        rgb = to_rgb(image)
        if reason := marked_reason(rgb):
            raise ValueError(f"unreadable when the mirror was made: {reason}")
        return self._hash(rgb), rgb

    def _hash(self, rgb: Image.Image) -> str:
        """Return `pixel_hash`; questions about one image mostly follow each other, and comparing is faster."""
        pixels = rgb.tobytes()
        if (rgb.size, pixels) != self._latest[:2]:
            self._latest = rgb.size, pixels, hash_of_pixels(rgb.size, pixels)
        return self._latest[2]

    def encode(self, prompts: Sequence[Prompt], images: Images) -> list[Encoded | str]:
        """Tokenise prompts together; a line of error stands where one has no room, no token, or a broken image.

        Args:
            prompts: from `render`.
            images: their images, from `ImageStore.take`.
        """
        rows = self._token_ids([prompt.text for prompt in prompts])
        return [self._encoded(prompt, ids, images) for prompt, ids in zip(prompts, rows, strict=True)]

    def _encoded(self, prompt: Prompt, ids: list[int] | str, images: Images) -> Encoded | str:
        if isinstance(ids, str):
            return ids
        counts = []
        for key in prompt.images:
            inputs = images[key]
            if isinstance(inputs, str):
                return inputs
            counts.append(inputs.num_tokens)
        ids = self._repeat(ids, counts) if self._expand_ids else self._expanded_text_ids(prompt.text, counts)
        if not ids:
            return "ValueError: the prompt is empty"
        room = self._context_length - len(ids)
        if room < 1:
            return f"ValueError: a prompt of {len(ids)} tokens leaves no room in the context of {self._context_length}"
        prefix_length = max((i + 1 for i, token in enumerate(ids) if token == self._image_token_id), default=0)
        return Encoded(tuple(ids), prefix_length, prompt.images, room)

    def _token_ids(self, texts: list[str]) -> list[list[int] | str]:
        """Return the token ids of each text, or the error of one that has none (a lone surrogate, say)."""
        try:
            return self._processor.tokenizer(texts)["input_ids"] if texts else []
        except DOCUMENT_ERRORS as error:
            if len(texts) == 1:
                return [one_line(error)]
            return [self._token_ids([text])[0] for text in texts]

    def _expanded_text_ids(self, text: str, counts: list[int]) -> list[int]:
        token = self._processor.image_token
        first, *rest = text.split(token)
        expanded = first + "".join(token * count + piece for count, piece in zip(counts, rest, strict=True))
        return self._processor.tokenizer(expanded)["input_ids"]

    def _repeat(self, ids: list[int], counts: list[int]) -> list[int]:
        expanded: list[int] = []
        left = iter(counts)
        for token in ids:
            expanded += [token] * (next(left, 1) if token == self._image_token_id else 1)
        return expanded

    def _expansion_is_local(self) -> bool:
        """Tell whether repeating an image token's id is the same as repeating it in the text, which takes longer."""
        token = self._processor.image_token
        once, thrice = self._processor.tokenizer([f"a{token}\nb {token} c", f"a{token * 3}\nb {token} c"])["input_ids"]
        return self._repeat(once, [3, 1]) == thrice


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
