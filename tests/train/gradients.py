"""One objective and one batch whose gradients are taken in several ways."""

from __future__ import annotations

from functools import cache

import torch

from prebench.data.collator import Batch
from prebench.model.builder import build_model
from prebench.model.tokenizer import train_tokenizer
from prebench.schema import PredictiveConfig
from prebench.train.loop import build_regularizer
from prebench.train.objective import Objective
from tests.conftest import TINY, WORDS

WEIGHT = 0.5
EXAMPLES, TEXT, PATCHES = 4, 12, 64


def objective(anchor: str = "pre_llm") -> Objective:
    """Return the tiny model with PRe, all of it trainable but the tower's unused norm."""
    model = build_model(TINY, train_tokenizer(WORDS * 20, vocab_size=320), 0)
    model.model.vision_tower.requires_grad_(False)
    term = build_regularizer(PredictiveConfig(weight=WEIGHT, anchor=anchor), model, 0)
    return Objective(model, term).train()


def batch() -> Batch:
    """Return four examples, a picture each; the last tokens are padding of different length."""
    generator = torch.Generator().manual_seed(3)
    model = TINY.language_model
    words = torch.randint(5, 300, (EXAMPLES, TEXT), generator=generator)
    image = torch.full((EXAMPLES, PATCHES), _image_token())
    input_ids = torch.cat([image, words], dim=1)
    attention_mask = torch.ones_like(input_ids)
    labels = input_ids.clone()
    labels[:, : PATCHES + 2] = -100
    for row in range(EXAMPLES):
        attention_mask[row, len(input_ids[0]) - row :] = 0
        labels[row, len(input_ids[0]) - row :] = -100
    pixels = torch.randn(EXAMPLES, 3, 64, 64, generator=generator)
    assert model.hidden_size == 32
    return Batch(input_ids, attention_mask, labels, tuple(map(str, range(EXAMPLES))), pixels)


def parts(number: int) -> list[Batch]:
    """Return the batch in equal parts."""
    whole = batch()
    size = EXAMPLES // number
    cut = [slice(i * size, (i + 1) * size) for i in range(number)]
    return [
        Batch(whole.input_ids[s], whole.attention_mask[s], whole.labels[s], whole.image_ids[s], whole.pixel_values[s])
        for s in cut
    ]


def counts() -> tuple[int, int]:
    """Return target tokens and images of the whole batch."""
    return batch().num_targets, EXAMPLES


def gradients(term: Objective) -> dict[str, torch.Tensor]:
    """Return the gradients of the whole batch by parameter."""
    term.zero_grad(set_to_none=True)
    term(batch()).total(*counts(), WEIGHT).backward()
    return {name: p.grad.clone() for name, p in term.named_parameters() if p.grad is not None}


@cache
def _image_token() -> int:
    return int(train_tokenizer(WORDS * 20, vocab_size=320).convert_tokens_to_ids("<image>"))
