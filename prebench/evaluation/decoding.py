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
    Cache,
    DynamicCache,
    LogitsProcessorList,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)
from transformers.cache_utils import DynamicLayer

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


class RoomyLayer(DynamicLayer):
    """A cache layer with room for tokens to come: they are written behind those that are there, which stay in place.

    transformers' own copies all keys and values at each token, which takes as long as a small model's arithmetic.
    """

    def __init__(self, layer: DynamicLayer, rows: Tensor, room: int) -> None:
        """Take rows of another layer's keys and values, each as often as it is named."""
        super().__init__()
        assert layer.keys is not None and layer.values is not None
        self.dtype, self.device, self.is_initialized = layer.dtype, layer.device, True
        self._buffers = [_with_room(states, rows, room) for states in (layer.keys, layer.values)]
        self._show(layer.keys.shape[-2])

    def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        """Append keys and values, [B, H, T, D], and return all."""
        start, more = self.get_seq_length(), key_states.shape[-2]
        if start + more > self._buffers[0].shape[-2]:
            everyone = torch.arange(len(key_states), device=key_states.device)
            self._buffers = [_with_room(states, everyone, start + more) for states in (self.keys, self.values)]
        for buffer, states in zip(self._buffers, (key_states, value_states), strict=True):
            buffer[:, :, start : start + more] = states
        return self._show(start + more)

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep these rows alone."""
        room = self._buffers[0].shape[-2] - self.get_seq_length()
        self._buffers = [_with_room(states, indices, room) for states in (self.keys, self.values)]
        self._show(self.get_seq_length())

    def _show(self, length: int) -> tuple[Tensor, Tensor]:
        self.keys, self.values = (buffer[:, :, :length] for buffer in self._buffers)
        return self.keys, self.values


def _with_room(states: Tensor, rows: Tensor, room: int) -> Tensor:
    """Return rows of keys or values, [B, H, T, D], at the start of a tensor with `room` more positions."""
    batch, heads, length, size = len(rows), *states.shape[1:]
    buffer = states.new_empty((batch, heads, length + room, size))
    torch.index_select(states, 0, rows, out=buffer[:, :, :length])
    return buffer


@dataclass(frozen=True)
class Prefixes:
    """Prefixes that have run."""

    cache: DynamicCache
    last_states: Tensor
    """[N, D] of the last position, which tell the next token."""

    def select(self, rows: Sequence[int], room: int) -> Cache:
        """Return a new cache whose row i is that of prefix `rows[i]`, with room for more tokens."""
        indices = torch.tensor(rows, device=self.last_states.device)
        if all(type(layer) is DynamicLayer for layer in self.cache.layers):
            return Cache(layers=[RoomyLayer(layer, indices, room) for layer in self.cache.layers])
        chosen = copy.copy(self.cache)  # a sliding window, say
        chosen.layers = [copy.copy(layer) for layer in self.cache.layers]
        chosen.batch_select_indices(indices)
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


def next_logits(model: Any, states_BD: Tensor) -> Tensor:
    """Apply the LM head to the states of one position per row and return [B, V]."""
    return model.get_output_embeddings()(states_BD)


@torch.inference_mode()
def decode(model: Any, cache: Cache, prefix_length: int, rows: Sequence[Row], eos_ids: Collection[int]) -> None:
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

    def __init__(self, model: Any, cache: Cache, prefix_length: int, suffixes: Sequence[Sequence[int]]) -> None:
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
        states = self._forward(self._ids, self._positions)
        return next_logits(self._model, states[torch.arange(len(states), device=states.device), self._last])

    def advance(self, tokens: list[int]) -> Tensor:
        """Append one token per row and return the logits of the next, [B, V]."""
        self._mask = torch.cat([self._mask, self._mask.new_ones((len(tokens), 1))], dim=1)
        ids = torch.tensor(tokens, device=self._next.device)
        states = self._forward(ids[:, None], self._next[:, None])
        self._next = self._next + 1
        return next_logits(self._model, states[:, -1])

    def keep(self, positions: list[int]) -> None:
        """Drop all other rows."""
        index = torch.tensor(positions, device=self._mask.device)
        self._cache.batch_select_indices(index)
        self._mask, self._next = self._mask[index], self._next[index]

    def _forward(self, ids: Tensor, positions: Tensor) -> Tensor:
        output = self._model.model(
            input_ids=ids,
            position_ids=positions,
            attention_mask=self._mask,
            past_key_values=self._cache,
            use_cache=True,
        )
        return output.last_hidden_state
