"""Decoding of many suffixes from shared prefixes, greedy or sampled.

A prefix (system prompt + image) runs once; its key-value cache is repeated for each question. Suffixes are padded on
the right, with explicit position ids and an attention mask over cache and suffix, so that each row sees exactly what
it would see alone: the answers are those of `model.generate` at batch size 1.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers import (
    DynamicCache,
    LogitsProcessorList,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from prebench.evaluation.generation import Sampling

STOP_CHECK_EVERY = 8
"""Steps between two looks for stop strings: text beyond one is cut off anyway, so this only saves time."""


class Sampler:
    """Draws one document's tokens as transformers' `generate` does, from a generator of its own."""

    def __init__(self, sampling: Sampling, seed: int) -> None:
        self._generator = torch.Generator().manual_seed(seed)
        warpers: list[Any] = [TemperatureLogitsWarper(sampling.temperature)]
        if sampling.top_k > 0:
            warpers.append(TopKLogitsWarper(sampling.top_k))
        if sampling.top_p < 1:
            warpers.append(TopPLogitsWarper(sampling.top_p))
        self._warp = LogitsProcessorList(warpers)

    def __call__(self, logits_V: Tensor) -> int:
        """Draw a token."""
        scores: Any = self._warp(torch.empty((1, 0), dtype=torch.long), logits_V[None].float())
        return int(torch.multinomial(scores.softmax(dim=-1).cpu(), 1, generator=self._generator))


@dataclass
class Row:
    """One continuation: what is fed after the prefix, and when it ends."""

    suffix: Sequence[int]
    """At least one token."""
    limit: int
    """The largest number of new tokens, at least one."""
    sampler: Sampler | None = None
    """None: greedy."""
    stopped: Callable[[list[int]], bool] | None = None
    """Tells whether the tokens so far contain a stop string."""
    new: list[int] = field(default_factory=list)
    """The new tokens, EOS included."""

    def add(self, token: int, eos_ids: Collection[int]) -> bool:
        """Append a token, and tell whether the row goes on."""
        self.new.append(token)
        if token in eos_ids or len(self.new) >= self.limit:
            return False
        return self.stopped is None or len(self.new) % STOP_CHECK_EVERY != 0 or not self.stopped(self.new)


def choose(logits_BV: Tensor, rows: Sequence[Row | None]) -> list[int]:
    """Return the next token of each row: the most probable one, or what its sampler draws; None stands for padding."""
    tokens = logits_BV.argmax(dim=-1).tolist()
    for index, row in enumerate(rows):
        if row is not None and row.sampler is not None:
            tokens[index] = row.sampler(logits_BV[index])
    return tokens


@dataclass(frozen=True)
class Prefixes:
    """Prefixes that have run."""

    cache: DynamicCache
    last_states: Tensor
    """[N, D] of the last position, which tell the next token."""

    def select(self, rows: Sequence[int]) -> DynamicCache:
        """Return a new cache whose row i is that of prefix `rows[i]`; this one stays as it is."""
        chosen = copy.copy(self.cache)
        chosen.layers = [copy.copy(layer) for layer in self.cache.layers]
        chosen.batch_select_indices(torch.tensor(rows, device=self.last_states.device))
        return chosen


@torch.inference_mode()
def run_prefixes(model: Any, ids: Sequence[Sequence[int]], features: Mapping[str, Tensor]) -> Prefixes:
    """Run prefixes of equal length through the decoder.

    Args:
        model: a LLaVA-type model in evaluation mode.
        ids: token ids, N rows of equal length.
        features: the image inputs of all rows, concatenated in row order (`pixel_values`, ...).
    """
    cache = DynamicCache(config=model.config.get_text_config())
    input_ids = torch.tensor(ids, device=model.device)
    output = model.model(input_ids=input_ids, past_key_values=cache, use_cache=True, **features)
    return Prefixes(cache, output.last_hidden_state[:, -1])


@torch.inference_mode()
def decode(model: Any, cache: DynamicCache, prefix_length: int, rows: Sequence[Row], eos_ids: Collection[int]) -> None:
    """Continue rows until all have ended; the tokens are added to `Row.new`.

    Args:
        model: as in `run_prefixes`.
        cache: one row per continuation, `prefix_length` positions (0: an empty cache); consumed.
        prefix_length: P.
        rows: the continuations.
        eos_ids: tokens that end a row.
    """
    batch = _Batch(model, cache, prefix_length, [row.suffix for row in rows])
    places: list[Row | None] = list(rows)  # the row that each place of the batch belongs to; None: it has ended
    logits = batch.prefill()
    while True:
        tokens = choose(logits, places)
        for place, (row, token) in enumerate(zip(places, tokens, strict=True)):
            if row is not None and not row.add(token, eos_ids):
                places[place] = None
        alive = [place for place, row in enumerate(places) if row is not None]
        if not alive:
            return
        if 2 * len(alive) <= len(places):
            batch.keep(alive)
            tokens, places = [tokens[place] for place in alive], [places[place] for place in alive]
        logits = batch.advance(tokens)


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
        """Run the suffixes and return the logits of each row's next token, [B, V]."""
        kept, index = torch.unique(self._last, return_inverse=True)  # the head runs on last positions alone
        logits = self._forward(self._ids, self._positions, kept)
        return logits[torch.arange(len(index), device=index.device), index]

    def advance(self, tokens: list[int]) -> Tensor:
        """Append one token per row and return the logits of the next, [B, V]."""
        self._mask = torch.cat([self._mask, self._mask.new_ones((len(tokens), 1))], dim=1)
        ids = torch.tensor(tokens, device=self._next.device)
        logits = self._forward(ids[:, None], self._next[:, None], 1)
        self._next = self._next + 1
        return logits[:, -1]

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
