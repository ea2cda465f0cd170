"""The one place where the loss is made: loss = lm_loss + weight * pre_loss, for every variant."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import LlavaForConditionalGeneration

from prebench.data.collator import Batch, target_logits
from prebench.model.builder import encode_images, vision_features
from prebench.model.visual_states import VisualStates, capture, language_model
from prebench.train.packing import last_states, pack
from prebench.train.regularizers.base import Regularizer


@dataclass(frozen=True)
class LossTerms:
    """Sums over one micro-batch, to be divided by the counts of the whole global batch."""

    lm_sum: Tensor
    """Cross-entropy summed over target tokens (nats)."""
    pre_sum: Tensor | None
    """The regularizer's loss summed over images, whatever its type; None without one."""
    anchor: Tensor
    """h_v^0, [M, D], detached: for the log."""

    def total(self, num_targets: int, num_images: int, weight: float) -> Tensor:
        """Return lm_loss + weight * pre_loss for this micro-batch's share of the global batch.

        At weight 0 pre_sum comes from detached states, so adding it trains the predictor, if there is one, and changes
        nothing else: the model's gradients are those of lm_loss bit for bit.
        """
        lm_loss = self.lm_sum / max(1, num_targets)
        if self.pre_sum is None:
            return lm_loss
        # Without any image the sum is 0, but the predictor stays in the graph: processes wait for its gradients.
        return lm_loss + (weight if weight > 0 else 1.0) * self.pre_sum / max(1, num_images)

    def detached(self, with_anchor: bool) -> LossTerms:
        """Return the sums alone, to be kept until the step's end: no graph, and an empty anchor unless it is wanted."""
        pre_sum = None if self.pre_sum is None else self.pre_sum.detach()
        anchor = self.anchor if with_anchor else self.anchor.new_empty(0)
        return LossTerms(self.lm_sum.detach(), pre_sum, anchor)


class Objective(nn.Module):
    """Model and regularizer as one module, so that accelerate wraps, shards and synchronises them together."""

    def __init__(self, model: LlavaForConditionalGeneration, regularizer: Regularizer | None) -> None:
        super().__init__()
        self.model = model
        self.regularizer = regularizer
        stacks: list[Any] = [language_model(model).layers, model.model.vision_tower.encoder.layers]
        self._no_split_modules = list(dict.fromkeys(type(block).__name__ for blocks in stacks for block in blocks))
        """Classes of which accelerate shards each instance on its own."""

    def forward(self, batch: Batch) -> LossTerms:
        """Run the decoder once and return the loss sums of a micro-batch.

        The decoder computes no padding, and the LM head is applied to positions that have a target only: the rest of
        the logits would be thrown away.
        """
        features = batch.vision_features
        if features is None:
            features = self._encode(batch.pixel_values)
        projected = self.model.model.multi_modal_projector(features)
        layers = {0, *(self.regularizer.layers if self.regularizer is not None else ())}
        packed = pack(batch.input_ids, batch.attention_mask, batch.labels)
        with capture(self.model, packed.input_ids, layers) as states:
            hidden_ND = last_states(self.model, packed, projected)
        logits, targets, _ = target_logits(self.model.lm_head, hidden_ND, packed.next_ids)
        lm_sum = F.cross_entropy(logits.float(), targets, reduction="sum")
        if not len(projected):
            # Without pictures the projector had no part in the loss; every parameter needs a gradient, if of zeros.
            lm_sum = lm_sum + projected.sum()
        return LossTerms(lm_sum, self._pre_sum(states, features, batch.image_ids), states.at(0).detach())

    def _encode(self, pixel_values: Tensor | None) -> Tensor:
        assert pixel_values is not None
        learning = any(p.requires_grad for p in self.model.model.vision_tower.parameters())
        encode = encode_images if learning else vision_features
        if not len(pixel_values):
            # No tower takes a batch of nothing. Of a black picture nothing is kept, but weights that learn have a part.
            return encode(self.model, pixel_values.new_zeros((1, *pixel_values.shape[1:])))[:0]
        return encode(self.model, pixel_values)

    def _pre_sum(self, states: VisualStates, features: Tensor, image_ids: Sequence[str]) -> Tensor | None:
        if self.regularizer is None:
            return None
        images, tokens = features.shape[:2]
        image_of_token = torch.arange(images, device=features.device).repeat_interleave(tokens)
        result: Tensor = self.regularizer(states, features, image_of_token, image_ids)
        return result
