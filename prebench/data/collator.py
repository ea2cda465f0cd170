"""Examples to tensors: chat template, label mask, padding, and the order in which a run sees its data.

The batch at a position is a pure function of (seed, stage, position): two variants with one seed see the same bytes in
the same order.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from prebench.data.examples import Example, TrainingData
from prebench.errors import DataError
from prebench.runtime import derive_seed
from prebench.schema import StageConfig

IGNORE_INDEX = -100


@dataclass(frozen=True)
class Batch:
    """One micro-batch: B sequences of length T, I images in the order of their placeholders."""

    input_ids: Tensor
    """[B, T]"""
    attention_mask: Tensor
    """[B, T]"""
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


def encode_example(
    processor: Any, messages: Sequence[dict[str, Any]], num_image_tokens: int
) -> tuple[list[int], list[int]]:
    """Return (input_ids, labels) of a conversation; only the assistant's words and its end token carry loss.

    The chat template is rendered up to each assistant turn, so the mask is right for any template whose renderings
    are prefixes of each other.

    Raises:
        DataError: the template's renderings are no prefixes of each other.
    """
    text = processor.apply_chat_template(messages, tokenize=False)
    spans = []
    for index, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        before = processor.apply_chat_template(messages[:index], tokenize=False, add_generation_prompt=True)
        through = processor.apply_chat_template(messages[: index + 1], tokenize=False)
        if not (text.startswith(through) and through.startswith(before)):
            raise DataError("chat template: the rendering of a turn is no prefix of the whole conversation")
        spans.append((len(before), len(through)))
    encoded = processor.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    image_token = processor.image_token_id
    input_ids: list[int] = []
    labels: list[int] = []
    span = 0
    for token, (start, end) in zip(encoded["input_ids"], encoded["offset_mapping"], strict=True):
        while span < len(spans) and start >= spans[span][1]:
            span += 1
        learn = span < len(spans) and spans[span][0] <= start and end <= spans[span][1]
        count = num_image_tokens if token == image_token else 1
        input_ids += [token] * count
        labels += [token if learn else IGNORE_INDEX] * count
    return input_ids, labels


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


def target_logits(lm_head: Any, hidden_BTD: Tensor, labels_BT: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Apply the LM head where something is to be predicted only; the rest of the logits would be thrown away.

    Returns:
        logits [n, V], their targets [n], and where they stand, [B, T - 1] bool.
    """
    targets = labels_BT[:, 1:]
    is_target = targets != IGNORE_INDEX
    return lm_head(hidden_BTD[:, :-1][is_target]), targets[is_target], is_target


def answered_right(logits: Tensor, targets: Tensor, is_target: Tensor) -> Tensor:
    """Return per sequence whether every target token is the most probable one, [B] bool; arguments: `target_logits`."""
    wrong = torch.zeros(len(is_target), device=logits.device)
    wrong.index_add_(0, is_target.nonzero()[:, 0], (logits.argmax(-1) != targets).float())
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

    def batch(self, step: int) -> list[Example]:
        """Return the examples of an optimiser step."""
        first = step * self.stage.batch_size
        return [self[position] for position in range(first, first + self.stage.batch_size)]

    def _draw(self, position: int, size: int) -> int:
        epoch, offset = divmod(position, size)
        key = epoch * 2 + (size == len(self._captioned))
        if key not in self._epochs:
            self._epochs[key] = np.random.default_rng([self._seed, 1, key]).permutation(size)
        return int(self._epochs[key][offset])
