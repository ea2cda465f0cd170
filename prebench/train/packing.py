"""Micro-batches without padding: all sequences one after another in one row, and attention that stays within each.

A decoder's products, norms and activations work on tokens, whichever sequence these belong to; attention alone has to
know where one ends. transformers recognises a packed row by position ids that begin again, so the result is right with
each of its attention implementations; without a CUDA kernel for it, however, they mask the scores of every token with
every other. The implementation here runs causal `scaled_dot_product_attention` without a mask instead: on a CPU once
per sequence, so that nothing is computed twice or in vain; on a GPU, where starting kernels costs more than computing
padding, once for all sequences, padded for this one operation (`in_one_call`).

Shape suffixes: B sequences padded to T, N tokens of all sequences together, D the LM's width.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AttentionInterface, LlavaForConditionalGeneration
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from prebench.data.encoding import IGNORE_INDEX
from prebench.errors import TrainingError
from prebench.model.builder import encoded_images
from prebench.model.visual_states import language_model

IMPLEMENTATION = "prebench_packed"
"""The attention's name in transformers. No mask is registered with it, so that none is made."""


@dataclass(frozen=True)
class Packed:
    """B sequences in one row of N tokens."""

    input_ids: Tensor
    """[1, N]"""
    position_ids: Tensor
    """[1, N], from 0 on in every sequence."""
    next_ids: Tensor
    """[N], what is to be predicted behind each token; IGNORE_INDEX where nothing is."""
    lengths: Tensor
    """[B] tokens per sequence, on the CPU: from there kernels are started."""

    def slots(self) -> tuple[Tensor, Tensor]:
        """Return which token stands in each of the padded places, [B, T] (N: none), and each token's place, [N]."""
        lengths_B1 = self.lengths[:, None]
        place_T = torch.arange(int(self.lengths.max()))
        token_BT = lengths_B1.cumsum(dim=0) - lengths_B1 + place_T
        is_token_BT = place_T < lengths_B1
        token_BT[~is_token_BT] = int(self.lengths.sum())
        place_N = is_token_BT.flatten().nonzero().flatten()
        device = self.input_ids.device
        return token_BT.to(device, non_blocking=True), place_N.to(device, non_blocking=True)

    @property
    def sequence_of_token(self) -> Tensor:
        """Return which sequence each token belongs to, [N]."""
        return torch.arange(len(self.lengths)).repeat_interleave(self.lengths).to(self.input_ids.device)


def pack(input_ids_BT: Tensor, attention_mask_BT: Tensor, labels_BT: Tensor) -> Packed:
    """Return padded sequences without their padding; labels stand at their own tokens, as in transformers."""
    real_BT = attention_mask_BT.bool()
    position_BT = real_BT.cumsum(dim=1) - 1
    next_BT = F.pad(labels_BT[:, 1:], (0, 1), value=IGNORE_INDEX)
    return Packed(
        input_ids=input_ids_BT[real_BT][None],
        position_ids=position_BT[real_BT][None],
        next_ids=next_BT[real_BT],
        lengths=real_BT.sum(dim=1).cpu(),
    )


def last_states(model: LlavaForConditionalGeneration, packed: Packed, projected: Tensor) -> Tensor:
    """Run the decoder and return its last hidden states, behind the final norm, [N, D].

    Args:
        model: unwrapped.
        packed: its sequences.
        projected: the projector's output for their pictures, in order, [I, N_p, D].
    """
    states: Tensor = model.model(
        input_ids=packed.input_ids,
        position_ids=packed.position_ids,
        sequence_lengths=packed.lengths,
        slots=packed.slots() if in_one_call(packed.input_ids.device) else None,
        mm_encoder_outputs=encoded_images(projected),
        use_cache=False,
    ).last_hidden_state
    return states[0]


def in_one_call(device: torch.device) -> bool:
    """Tell whether a device attends to all sequences of a row in one call: starting a kernel for each costs more there.

    With a call per sequence, a small model's step took 1.5 to 1.7 times as long as transformers' Trainer on an H200.
    """
    return device.type != "cpu"


@contextmanager
def packed_attention(model: LlavaForConditionalGeneration) -> Iterator[None]:
    """Let the decoder attend within the sequences of packed rows inside the block; it then takes such rows alone.

    Backward passes belong into the block, too: activation checkpointing runs the attention again. A decoder with a
    sliding window keeps the implementation that it has.
    """
    config: Any = language_model(model).config
    before = config._attn_implementation
    if getattr(config, "sliding_window", None) is None:
        config._attn_implementation = IMPLEMENTATION
    try:
        yield
    finally:
        config._attn_implementation = before


@torch.compiler.disable  # a compiled layer would be compiled anew for every set of lengths
def _attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    sequence_lengths: Tensor | None = None,
    slots: tuple[Tensor, Tensor] | None = None,
    **options: Any,
) -> tuple[Tensor, None]:
    """Attend within sequences; query, key and value are [1, heads, N, d], the result is [1, N, heads, d]."""
    if sequence_lengths is None:
        raise TrainingError("inside packed_attention a decoder takes packed sequences with their lengths alone")

    def attend(states: Iterable[Tensor]) -> Tensor:
        return sdpa_attention_forward(module, *states, attention_mask=None, **options)[0]

    if slots is not None:
        token_of_slot, slot_of_token = slots
        # Padding stands on the right, where a causal decoder never looks.
        attended = attend(_padded((query, key, value), token_of_slot, slot_of_token))
        return _Rearranged.apply(attended.flatten(0, 1), slot_of_token, token_of_slot.flatten())[None], None
    lengths = sequence_lengths.tolist()
    # Split and concatenated, not sliced: the gradient of a slice is as large as the whole, once per sequence.
    sequences = zip(*(states.split(lengths, dim=2) for states in (query, key, value)), strict=True)
    return torch.cat([attend(one) for one in sequences], dim=1), None


def _padded(states: Sequence[Tensor], token_of_slot: Tensor, slot_of_token: Tensor) -> tuple[Tensor, ...]:
    """Return each [1, heads, N, d] as [B, heads, T, d], zeros behind each sequence's end; all are moved at once."""
    together = torch.cat([one[0].transpose(0, 1) for one in states], dim=1)
    rows = _Rearranged.apply(together, token_of_slot.flatten(), slot_of_token)
    heads = [one.shape[1] for one in states]
    return rows.unflatten(0, token_of_slot.shape).transpose(1, 2).split(heads, dim=1)


class _Rearranged(torch.autograd.Function):
    """Rows in another order, some of them zeros.

    Each row goes to one place at most, so that the gradient is read from there; the gradient of plain indexing would
    be a sum over places, which a GPU has to sort if it is to repeat.
    """

    @staticmethod
    def forward(ctx: Any, rows: Tensor, index: Tensor, inverse: Tensor) -> Tensor:
        """Return rows[index]; an index of len(rows) gives zeros. `inverse` says where each row went."""
        ctx.save_for_backward(inverse)
        return _rows(rows, index)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        """Return the gradient of rows."""
        return _rows(gradients[0], ctx.saved_tensors[0]), None, None


def _rows(rows: Tensor, index: Tensor) -> Tensor:
    return torch.cat([rows, rows.new_zeros((1, *rows.shape[1:]))])[index]


AttentionInterface.register(IMPLEMENTATION, _attend)
