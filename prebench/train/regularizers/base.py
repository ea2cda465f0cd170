"""What the loop knows of a regularizer: a module that reads hidden states and returns a loss."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers import LlavaForConditionalGeneration

from prebench.model.visual_states import VisualStates, resolve_layer
from prebench.schema import RegularizerConfig


class Regularizer(nn.Module):
    """A loss on the visual tokens of one decoder layer. At weight 0 it reads detached states: logged, felt by nothing.

    Args:
        config: the variant's regularizer block.
        depth: L, the LM's number of layers.
    """

    config: RegularizerConfig

    def __init__(self, config: RegularizerConfig, *, depth: int) -> None:
        super().__init__()
        self.config = config
        self.layer = resolve_layer(config.layer, depth)

    @property
    def layers(self) -> tuple[int, ...]:
        """Return the decoder layers whose visual tokens are read: 0 (the anchor) and l."""
        return (0, self.layer)

    @property
    def random_neighbours(self) -> bool:
        """Tell whether the images of a micro-batch must stand side by side at random, not by length."""
        return False

    def begin_stage(self, model: LlavaForConditionalGeneration) -> None:
        """Be told that a training stage starts with this model, already on its device; most types need nothing."""

    def regularised(self, states: VisualStates) -> Tensor:
        """Return the visual tokens at l that the loss acts on, [M, D]; detached at weight 0."""
        hidden_MD = states.at(self.layer)
        return hidden_MD.detach() if self.config.weight == 0 else hidden_MD

    def forward(self, states: VisualStates, vision_features: Tensor, image_of_token: Tensor) -> Tensor:
        """Return the loss summed over images (a scalar; divide by the number of images).

        Args:
            states: hidden states of this forward pass at `layers`.
            vision_features: [I, N_p, D_v], the vision tower's output.
            image_of_token: [M], which image each visual token belongs to, 0..I-1.
        """
        raise NotImplementedError


def token_shares(image_of_token: Tensor) -> Tensor:
    """Return 1 / N_p of each token's image, [M] float32: a weighted sum over tokens is then a sum of image means."""
    counts = torch.bincount(image_of_token)
    return counts.clamp(min=1).float().reciprocal()[image_of_token]
