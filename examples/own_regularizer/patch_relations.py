"""A regularizer of one's own for prebench: keep which patches of an image are alike (docs/own_regularizer.md).

L = (1 / N^2) * sum_ij (cos(W h_i^l, W h_j^l) - stopgrad cos(h_i^0, h_j^0))^2, summed over images; W is learned.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Self

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from prebench.model.visual_states import VisualStates, num_layers
from prebench.schema import LearnedRegularizerConfig
from prebench.train.regularizers.base import Regularizer


class PatchRelationsConfig(LearnedRegularizerConfig):
    """The block of a variant's file: type, weight, layer, learning_rate, max_grad_norm, and what is added here."""

    rank: int = Field(16, gt=0)
    """Rows of W."""


class PatchRelations(Regularizer):
    """Holds the cosines between the tokens of an image, of every layer through a map of its own."""

    config_class = PatchRelationsConfig
    config: PatchRelationsConfig

    @classmethod
    def build(cls, config: PatchRelationsConfig, model: nn.Module) -> Self:
        """Return the regularizer for a model."""
        return cls(config, depth=num_layers(model), width=model.config.text_config.hidden_size)

    def __init__(self, config: PatchRelationsConfig, *, depth: int, width: int) -> None:
        super().__init__(config, depth=depth)
        self.maps = nn.ModuleList(nn.Linear(width, config.rank, bias=False) for _ in self.regularised_layers)

    def loss(
        self, states: VisualStates, vision_features: Tensor, image_of_token: Tensor, image_ids: Sequence[str]
    ) -> Tensor:
        """Return the loss summed over images and averaged over layers."""
        images, tokens = vision_features.shape[:2]
        wanted_INN = relations(states.at(0).detach().unflatten(0, (images, tokens)))
        losses = []
        for linear, hidden_MD in zip(self.maps, self.regularised(states), strict=True):
            found_INN = relations(linear(hidden_MD).unflatten(0, (images, tokens)))
            losses.append((found_INN - wanted_INN).square().mean(dim=(1, 2)).sum())
        return torch.stack(losses).mean()


def relations(tokens_IND: Tensor) -> Tensor:
    """Return the cosine of every pair of an image's tokens, [I, N, N]."""
    unit_IND = F.normalize(tokens_IND.float(), dim=-1)
    return unit_IND @ unit_IND.transpose(1, 2)
