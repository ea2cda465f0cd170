"""Anchors of PRe's controls: h_v^0 of another image, and h_v^0 that does not move (docs/regularizers.md)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from prebench.errors import TrainingError
from prebench.train.sharding import whole_copy


def of_previous_image(anchor_MA: Tensor, num_images: int) -> Tensor:
    """Return each token's anchor taken from the image before it in the micro-batch, at the same position, [M, A].

    Args:
        anchor_MA: the tokens of all images one after another, the same number for each.
        num_images: I.

    Raises:
        TrainingError: a single image has no other one.
    """
    if num_images == 1:
        raise TrainingError(
            "regularizer.anchor shuffled: a micro-batch of one image has no other image; choose batch_size / "
            "gradient_accumulation_steps of at least 2 in every stage"
        )
    return anchor_MA.roll(len(anchor_MA) // max(1, num_images), dims=0)


class FrozenProjector:
    """The projector as it was when this object was made.

    On purpose no nn.Module: the copy must reach no optimiser, no wrapper and no state dict.

    Args:
        projector: the live projector, which stays as it is.
    """

    def __init__(self, projector: nn.Module) -> None:
        self._copy = whole_copy(projector).requires_grad_(False).eval()

    @torch.no_grad()
    def __call__(self, vision_features: Tensor) -> Tensor:
        """Return h_v^0 of all images' tokens one after another, [M, D], of vision features [I, N_p, D_v]."""
        projected: Tensor = self._copy(vision_features)
        return projected.flatten(0, 1)
