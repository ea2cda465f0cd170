"""Examples to tensors: tokens, label mask, pictures, padding, and the order in which a run sees generated data.

The batch at a position is a pure function of (seed, stage, position): two variants with one seed see the same bytes in
the same order.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from prebench.data.chat_templates import chat_template
from prebench.data.encoding import IGNORE_INDEX, encode_example
from prebench.data.examination import truncate
from prebench.data.examples import Example, TrainingData
from prebench.data.visual_tokens import image_tokens
from prebench.errors import DataError
from prebench.runtime import derive_seed
from prebench.schema import DataConfig, StageConfig


@dataclass(frozen=True)
class Batch:
    """One micro-batch: B sequences of length T, I images in the order of their placeholders."""

    input_ids: Tensor
    """[B, T]"""
    attention_mask: Tensor
    """[B, T]; 0 where a sequence is padded, on the right."""
    labels: Tensor
    """[B, T]; IGNORE_INDEX where nothing is to be predicted."""
    image_ids: tuple[str, ...]
    pixel_values: Tensor | None = None
    """[I, 3, H, W], or None where cached features are given."""
    vision_features: Tensor | None = None
    """[I, N_p, D_v], the frozen tower's output."""

    @property
    def num_targets(self) -> int:
        """Return the number of tokens that carry loss."""
        return int((self.labels[:, 1:] != IGNORE_INDEX).sum())

    @property
    def hash(self) -> str:
        """Return a content hash of what the model reads, for the parity of data order."""
        digest = hashlib.sha256(self.input_ids.numpy(force=True).tobytes())
        digest.update(self.labels.numpy(force=True).tobytes())
        digest.update("\n".join(self.image_ids).encode())
        return digest.hexdigest()[:16]

    def to(self, device: torch.device) -> Batch:
        """Return the batch on a device."""
        return Batch(
            self.input_ids.to(device),
            self.attention_mask.to(device),
            self.labels.to(device),
            self.image_ids,
            None if self.pixel_values is None else self.pixel_values.to(device),
            None if self.vision_features is None else self.vision_features.to(device),
        )


@dataclass(frozen=True)
class Encoded:
    """One example as tokens."""

    input_ids: list[int]
    labels: list[int]
    image_ids: tuple[str, ...]


class Features(Protocol):
    """Cached outputs of the frozen tower."""

    def get(self, image_ids: Sequence[str]) -> Tensor:
        """Return the features of these images, [len(image_ids), N_p, D_v]."""


class Pictures(Protocol):
    """Whatever has pictures by name, and the configuration that says how long an example may be."""

    config: DataConfig

    def image(self, image_id: str) -> Image.Image:
        """Return a picture in RGB."""


class Collator:
    """Examples of any source to micro-batches.

    Args:
        processor: the study's.
        data: where the pictures are.
        features: the frozen tower's outputs; None reads and resizes the pictures.
    """

    def __init__(self, processor: Any, data: Pictures, features: Features | None = None) -> None:
        self._processor = processor
        self._data = data
        self._features = features
        self._num_image_tokens = image_tokens(processor)

    def encode(self, example: Example) -> Encoded:
        """Return an example's tokens, cut off at the data's maximum length.

        Raises:
            DataError: the example does not fit the chat template, or the cut would take visual tokens.
        """
        processor = self._processor
        template = chat_template(processor, example.prompt)
        input_ids, labels = encode_example(processor, example.messages, self._num_image_tokens, template)
        kept = truncate(input_ids, labels, self._data.config.max_length, processor.image_token_id)
        return Encoded(*kept, example.image_ids)

    def __call__(self, encoded: Sequence[Encoded]) -> Batch:
        """Return a micro-batch; one without pictures has none in `pixel_values`, [0, 3, H, W], or features."""
        processor = self._processor
        sequences = [(item.input_ids, item.labels) for item in encoded]
        input_ids, attention_mask, labels = pad(sequences, processor.tokenizer.pad_token_id)
        image_ids = tuple(image_id for item in encoded for image_id in item.image_ids)
        if self._features is not None:
            return Batch(input_ids, attention_mask, labels, image_ids, None, self._features.get(image_ids))
        images = [self._data.image(i) for i in image_ids] or [Image.new("RGB", (8, 8))]
        pixel_values = processor.image_processor(images, return_tensors="pt")["pixel_values"][: len(image_ids)]
        return Batch(input_ids, attention_mask, labels, image_ids, pixel_values)


def pad(sequences: Sequence[tuple[list[int], list[int]]], pad_token_id: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return (input_ids, attention_mask, labels), [B, T] each, padded on the right to the longest."""
    length = max(len(ids) for ids, _ in sequences)
    input_ids = torch.full((len(sequences), length), pad_token_id)
    attention_mask = torch.zeros((len(sequences), length), dtype=torch.long)
    labels = torch.full((len(sequences), length), IGNORE_INDEX)
    for row, (ids, targets) in enumerate(sequences):
        input_ids[row, : len(ids)] = torch.tensor(ids)
        attention_mask[row, : len(ids)] = 1
        labels[row, : len(ids)] = torch.tensor(targets)
    return input_ids, attention_mask, labels


def target_logits(lm_head: Any, hidden: Tensor, next_ids: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Apply the LM head where something is to be predicted only; the rest of the logits would be thrown away.

    Args:
        lm_head: from hidden states to logits.
        hidden: last hidden states, [..., D].
        next_ids: the token to be predicted behind each position, [...]; IGNORE_INDEX where none is.

    Returns:
        logits [n, V], their targets [n], and where they stand, [...] bool.
    """
    is_target = next_ids != IGNORE_INDEX
    return lm_head(hidden[is_target]), next_ids[is_target], is_target


def answered_right(logits: Tensor, targets: Tensor, sequence_of_target: Tensor, num_sequences: int) -> Tensor:
    """Return per sequence whether every target token is the most probable one, [B] bool.

    Args:
        logits: [n, V].
        targets: [n].
        sequence_of_target: [n], 0..B-1.
        num_sequences: B.
    """
    wrong = torch.zeros(num_sequences, device=logits.device)
    wrong.index_add_(0, sequence_of_target, (logits.argmax(-1) != targets).float())
    return wrong == 0


class ExampleOrder:
    """The examples of one stage of one run, by position."""

    def __init__(self, data: TrainingData, stage: StageConfig, stage_name: str, seed: int) -> None:
        self.data = data
        self.stage = stage
        self._seed = derive_seed("order", stage_name, seed)
        self._epochs: dict[int, np.ndarray] = {}
        captioned = [i for i in data.image_ids if data.caption(i) is not None] if stage.caption_share > 0 else []
        self._captioned = captioned
        if stage.caption_share > 0 and not captioned:
            raise DataError(f"train.{stage_name}.caption_share: no source of this preset has captions; set it to 0")

    def __getitem__(self, position: int) -> Example:
        """Return the example at a position of the stage."""
        rng = np.random.default_rng([self._seed, position])
        if rng.random() < self.stage.caption_share:
            caption = self.data.caption(self._captioned[self._draw(position, len(self._captioned))])
            assert caption is not None
            return caption
        image_ids = self.data.image_ids
        return self.data.conversation(image_ids[self._draw(position, len(image_ids))], rng)

    def _draw(self, position: int, size: int) -> int:
        epoch, offset = divmod(position, size)
        key = epoch * 2 + (size == len(self._captioned))
        if key not in self._epochs:
            self._epochs[key] = np.random.default_rng([self._seed, 1, key]).permutation(size)
        return int(self._epochs[key][offset])
