"""Greedy decoding of many suffixes from shared prefixes.

A prefix (system prompt + image) runs once; its key-value cache is repeated for each question. Suffixes are padded on
the right, with explicit position ids and an attention mask over cache and suffix, so that each row sees exactly what
it would see alone: the answers are those of `model.generate` at batch size 1.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache

STOP_CHECK_EVERY = 8
"""Steps between two looks for stop strings: text beyond one is cut off anyway, so this only saves time."""


@torch.inference_mode()
def run_prefixes(model: Any, ids: Sequence[Sequence[int]], features: Mapping[str, Tensor]) -> DynamicCache:
    """Run prefixes of equal length P through the decoder and return their cache (batch = number of prefixes).

    Args:
        model: a LLaVA-type model in evaluation mode.
        ids: token ids, N rows of P.
        features: the image inputs of all rows, concatenated in row order (`pixel_values`, ...).
    """
    cache = DynamicCache(config=model.config.get_text_config())
    input_ids = torch.tensor(ids, device=model.device)
    model.model(input_ids=input_ids, past_key_values=cache, use_cache=True, **features)
    return cache


def select_rows(cache: DynamicCache, rows: Sequence[int]) -> DynamicCache:
    """Return a new cache whose row i is `cache`'s row `rows[i]`; `cache` stays as it is."""
    chosen = copy.copy(cache)
    chosen.layers = [copy.copy(layer) for layer in cache.layers]
    device = cache.layers[0].keys.device
    chosen.batch_select_indices(torch.tensor(rows, device=device))
    return chosen


@torch.inference_mode()
def greedy(
    model: Any,
    cache: DynamicCache,
    prefix_length: int,
    suffixes: Sequence[Sequence[int]],
    limits: Sequence[int],
    eos_ids: frozenset[int],
    stopped: Callable[[int, list[int]], bool] | None = None,
) -> list[list[int]]:
    """Continue suffixes greedily and return the new token ids of each row (its EOS included).

    Args:
        model: as in `run_prefixes`.
        cache: one row per suffix, `prefix_length` positions (0: an empty cache); consumed.
        prefix_length: P.
        suffixes: token ids of each row, at least one.
        limits: the largest number of new tokens of each row.
        eos_ids: tokens that end a row.
        stopped: tells whether row i's tokens so far contain a stop string.
    """
    batch = _Batch(model, cache, prefix_length, suffixes)
    answers: list[list[int]] = [[] for _ in suffixes]
    rows = list(range(len(suffixes)))  # the answer that each row of the batch belongs to
    step = 0
    tokens = batch.prefill()
    while True:
        step += 1
        look = stopped if stopped is not None and step % STOP_CHECK_EVERY == 0 else None
        alive = []
        for position, (row, token) in enumerate(zip(rows, tokens.tolist(), strict=True)):
            if row < 0:
                continue
            answer = answers[row]
            answer.append(token)
            if token in eos_ids or len(answer) >= limits[row] or (look is not None and look(row, answer)):
                rows[position] = -1
            else:
                alive.append(position)
        if not alive:
            return answers
        if 2 * len(alive) <= len(rows):
            batch.keep(alive)
            tokens = tokens[alive]
            rows = [rows[position] for position in alive]
        tokens = batch.advance(tokens)


class _Batch:
    """The tensors of one decoding batch: cache, attention mask and next positions."""

    def __init__(self, model: Any, cache: DynamicCache, prefix_length: int, suffixes: Sequence[Sequence[int]]) -> None:
        self._model, self._cache = model, cache
        device = model.device
        lengths = torch.tensor([len(suffix) for suffix in suffixes])
        width = int(lengths.max())
        ids = torch.zeros((len(suffixes), width), dtype=torch.long)  # padding is masked: any token will do
        for row, suffix in enumerate(suffixes):
            ids[row, : len(suffix)] = torch.tensor(suffix)
        real = torch.arange(width)[None] < lengths[:, None]
        seen = torch.ones((len(suffixes), prefix_length), dtype=torch.bool)
        self._ids = ids.to(device)
        self._last = (lengths - 1).to(device)
        self._mask = torch.cat([seen, real], dim=1).long().to(device)
        self._positions = (prefix_length + torch.arange(width)).expand(len(suffixes), width).to(device)
        self._next = (prefix_length + lengths).to(device)

    def prefill(self) -> Tensor:
        """Run the suffixes and return the first new token of each row, [B]."""
        kept, index = torch.unique(self._last, return_inverse=True)  # the head runs on last positions alone
        logits = self._forward(self._ids, self._positions, kept)
        return logits[torch.arange(len(index), device=index.device), index].argmax(dim=-1)

    def advance(self, tokens: Tensor) -> Tensor:
        """Append one token per row, [B], and return the next, [B]."""
        self._mask = torch.cat([self._mask, self._mask.new_ones((len(tokens), 1))], dim=1)
        logits = self._forward(tokens[:, None], self._next[:, None], 1)
        self._next = self._next + 1
        return logits[:, -1].argmax(dim=-1)

    def keep(self, positions: list[int]) -> None:
        """Drop all other rows."""
        index = torch.tensor(positions, device=self._mask.device)
        self._cache.batch_select_indices(index)
        self._mask, self._next = self._mask[index], self._next[index]

    def _forward(self, ids: Tensor, positions: Tensor, logits_to_keep: Tensor | int) -> Tensor:
        output = self._model(
            input_ids=ids,
            position_ids=positions,
            attention_mask=self._mask,
            past_key_values=self._cache,
            use_cache=True,
            logits_to_keep=logits_to_keep,
        )
        return output.logits
