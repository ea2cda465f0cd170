"""Micro-batches without padding: all sequences one after another in one row, and attention that stays within each.

A decoder's products, norms and activations work on tokens, whichever sequence these belong to; attention alone has to
know where one ends. transformers recognises a packed row by position ids that begin again, so the result is right with
each of its attention implementations; without a CUDA kernel for it, however, they mask the scores of every token with
every other. The implementation here runs one causal `scaled_dot_product_attention` per sequence instead.

Shape suffixes: B sequences padded to T, N tokens of all sequences together, D the LM's width.
"""

from __future__ import annotations

from collections.abc import Iterator
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
        mm_encoder_outputs=encoded_images(projected),
        use_cache=False,
    ).last_hidden_state
    return states[0]


@contextmanager
def packed_attention(model: LlavaForConditionalGeneration) -> Iterator[None]:
    """Let the decoder's attention run sequence by sequence inside the block; it then takes packed rows alone.

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
    **options: Any,
) -> tuple[Tensor, None]:
    """Attend within sequences; query, key and value are [1, heads, N, d], the result is [1, N, heads, d]."""
    if sequence_lengths is None:
        raise TrainingError("inside packed_attention a decoder takes packed sequences with their lengths alone")
    lengths = sequence_lengths.tolist()
    # Split and concatenated, not sliced: the gradient of a slice is as large as the whole, once per sequence.
    sequences = zip(*(states.split(lengths, dim=2) for states in (query, key, value)), strict=True)
    attended = [sdpa_attention_forward(module, *one, attention_mask=None, **options)[0] for one in sequences]
    return torch.cat(attended, dim=1), None


AttentionInterface.register(IMPLEMENTATION, _attend)
