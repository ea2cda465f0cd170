"""Packed rows: every sequence gets the states that it would get alone, whatever stands beside it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import MistralConfig

from prebench.costs.stages import shape_model
from prebench.data.collator import Batch
from prebench.data.encoding import IGNORE_INDEX
from prebench.errors import TrainingError
from prebench.model.visual_states import language_model
from prebench.train import packing
from prebench.train.packing import IMPLEMENTATION, last_states, pack, packed_attention
from tests.costs import real_steps
from tests.train.gradients import batch, objective

PAIRS = list(real_steps.PUBLISHED)
"""Vicuna's decoder and Qwen's: the latter has fewer keys than queries."""


def padded(lengths: list[int]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return ids, mask and labels of sequences of text; the second half of each is learnt."""
    ids = torch.arange(len(lengths) * max(lengths)).reshape(len(lengths), -1) % 400
    mask = (torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]).long()
    learnt = torch.arange(max(lengths)) >= torch.tensor(lengths)[:, None] // 2
    return ids, mask, ids.masked_fill(~(learnt & mask.bool()), IGNORE_INDEX)


@settings(max_examples=50, deadline=None)
@given(st.lists(st.integers(1, 9), min_size=1, max_size=5))
def test_a_row_holds_the_sequences_one_after_another(lengths):
    ids, mask, labels = padded(lengths)
    packed = pack(ids, mask, labels)
    assert packed.input_ids.shape == packed.position_ids.shape == (1, sum(lengths))
    assert packed.lengths.tolist() == lengths
    place = 0
    for row, length in enumerate(lengths):
        part = slice(place, place + length)
        assert torch.equal(packed.input_ids[0, part], ids[row, :length])
        assert packed.position_ids[0, part].tolist() == list(range(length))
        assert packed.next_ids[part].tolist() == [*labels[row, 1:length].tolist(), IGNORE_INDEX]
        assert (packed.sequence_of_token[part] == row).all()
        place += length


@pytest.mark.parametrize("pair", PAIRS)
@pytest.mark.parametrize("attention", ["call per sequence", "one call", "transformers' own"])
def test_states_and_gradients_are_those_of_each_sequence_alone(pair, attention, monkeypatch):
    monkeypatch.setattr(packing, "in_one_call", lambda _device: attention == "one call")
    model = _decoder(pair)
    ids, mask, labels = padded([7, 1, 12, 4])
    nothing = torch.zeros((0, 16, 64))
    before = language_model(model).config._attn_implementation
    with packed_attention(model):
        if attention == "transformers' own":
            language_model(model).config._attn_implementation = before
        together = last_states(model, pack(ids, mask, labels), nothing)
        together.square().sum().backward()
    found = _taken_gradients(model)
    place = 0
    for row, length in enumerate([7, 1, 12, 4]):
        alone = model.model(input_ids=ids[row : row + 1, :length], use_cache=False).last_hidden_state[0]
        torch.testing.assert_close(together[place : place + length], alone, atol=1e-5, rtol=1e-5)
        alone.square().sum().backward()
        place += length
    for name, gradient in _taken_gradients(model).items():
        torch.testing.assert_close(found[name], gradient, atol=1e-3, rtol=1e-3, msg=name)


@settings(max_examples=50, deadline=None)
@given(st.lists(st.integers(1, 9), min_size=1, max_size=5))
def test_every_token_has_a_place_and_padding_none(lengths):
    packed = pack(*padded(lengths))
    token_of_slot, slot_of_token = packed.slots()
    assert token_of_slot.shape == (len(lengths), max(lengths))
    assert token_of_slot.flatten()[slot_of_token].tolist() == list(range(sum(lengths)))
    assert (token_of_slot == sum(lengths)).sum() == token_of_slot.numel() - sum(lengths)


def test_in_one_call_the_number_of_operations_does_not_grow_with_the_number_of_sequences(monkeypatch):
    """What a step of a small model costs on a GPU is the number of kernels that it starts."""
    monkeypatch.setattr(packing, "in_one_call", lambda _device: True)
    model, nothing = _decoder(PAIRS[0]), torch.zeros((0, 16, 64))

    def operations(lengths: list[int]) -> int:
        packed = pack(*padded(lengths))
        with packed_attention(model), Operations() as seen:
            last_states(model, packed, nothing).square().sum().backward()
        return seen.number

    assert operations([7, 1]) == operations([7, 1, 12, 4, 9, 3])


class Operations(torch.utils._python_dispatch.TorchDispatchMode):
    """Counts the operations of torch inside the block."""

    def __init__(self) -> None:
        super().__init__()
        self.number = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.number += 1
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("in_one_call", [True, False])
def test_no_matrix_of_all_tokens_is_made(in_one_call, monkeypatch):
    """The row's attention costs what its sequences cost, not the square of their sum."""
    monkeypatch.setattr(packing, "in_one_call", lambda _device: in_one_call)
    term, largest = objective(), 0

    class Largest(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            nonlocal largest
            out = func(*args, **(kwargs or {}))
            for value in out if isinstance(out, tuple | list) else [out]:
                if isinstance(value, torch.Tensor):
                    largest = max(largest, value.untyped_storage().nbytes())
            return out

    term.regularizer, half = None, batch()
    given = Batch(
        half.input_ids.repeat(2, 1),
        half.attention_mask.repeat(2, 1),
        half.labels.repeat(2, 1),
        half.image_ids * 2,
        half.pixel_values.repeat(2, 1, 1, 1),
    )
    tokens = int(given.attention_mask.sum())
    with packed_attention(term.model), Largest():
        term(given)
    assert largest < tokens**2


def test_an_unpacked_pass_is_refused_inside_the_block_and_the_same_as_ever_behind_it():
    model = _decoder(PAIRS[0])
    ids = padded([5])[0]
    before = model.model(input_ids=ids).last_hidden_state
    with packed_attention(model):
        assert language_model(model).config._attn_implementation == IMPLEMENTATION
        with pytest.raises(TrainingError, match="packed sequences with their lengths alone"):
            model.model(input_ids=ids)
    assert torch.equal(model.model(input_ids=ids).last_hidden_state, before)


def test_a_decoder_with_a_sliding_window_keeps_its_own_attention():
    model = _decoder(PAIRS[0])
    config = language_model(model).config
    config.sliding_window = MistralConfig().sliding_window
    before = config._attn_implementation
    with packed_attention(model):
        assert config._attn_implementation == before


def _decoder(pair: str) -> Any:
    torch.manual_seed(0)
    return shape_model(real_steps.small(pair), real_steps.ROWS, "cpu").train()


def _taken_gradients(model: Any) -> dict[str, torch.Tensor]:
    found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad(set_to_none=True)
    return found
