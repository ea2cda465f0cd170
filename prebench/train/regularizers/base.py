"""What the loop knows of a regularizer: a module that reads hidden states and returns a loss."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from transformers import LlavaForConditionalGeneration

from prebench.errors import ModelError
from prebench.model.visual_states import VisualStates, resolve_layer
from prebench.schema import RegularizerConfig, layer_names


class Regularizer(nn.Module):
    """A loss on the visual tokens of decoder layers. At weight 0 it reads detached states: logged, felt by nothing.

    Args:
        config: the variant's regularizer block.
        depth: L, the LM's number of layers.

    Raises:
        ModelError: a layer lies outside the model, or two of the block's names are one and the same layer of it.
    """

    config: RegularizerConfig

    def __init__(self, config: RegularizerConfig, *, depth: int) -> None:
        super().__init__()
        self.config = config
        self.regularised_layers = tuple(resolve_layer(layer, depth) for layer in layer_names(config.layer))
        """The decoder layers l that the loss acts on, in the order of the block."""
        if len(set(self.regularised_layers)) < len(self.regularised_layers):
            named = ", ".join(map(str, layer_names(config.layer)))
            raise ModelError(
                f"regularizer.layer: {named} are layers {', '.join(map(str, self.regularised_layers))} of {depth}: "
                "name each once"
            )

    @property
    def layers(self) -> tuple[int, ...]:
        """Return the decoder layers whose visual tokens are read: 0 (the anchor) and every l."""
        return (0, *self.regularised_layers)

    @property
    def random_neighbours(self) -> bool:
        """Tell whether the images of a micro-batch must stand side by side at random, not by length."""
        return False

    def begin_stage(self, model: LlavaForConditionalGeneration) -> None:
        """Be told that a training stage starts with this model, already on its device; most types need nothing."""

    def regularised(self, states: VisualStates) -> list[Tensor]:
        """Return the visual tokens that the loss acts on, [M, D] of every layer l; detached at weight 0."""
        found = [states.at(layer) for layer in self.regularised_layers]
        return [hidden_MD.detach() for hidden_MD in found] if self.config.weight == 0 else found

    def forward(
        self, states: VisualStates, vision_features: Tensor, image_of_token: Tensor, image_ids: Sequence[str] = ()
    ) -> Tensor:
        """Return the loss summed over images and averaged over layers (a scalar; divide by the number of images).

        Args:
            states: hidden states of this forward pass at `layers`.
            vision_features: [I, N_p, D_v], the vision tower's output.
            image_of_token: [M], which image each visual token belongs to, 0..I-1.
            image_ids: of the I images, for anchors that were computed before.
        """
        raise NotImplementedError


def token_shares(image_of_token: Tensor) -> Tensor:
    """Return 1 / N_p of each token's image, [M] float32: a weighted sum over tokens is then a sum of image means."""
    counts = torch.bincount(image_of_token)
    return counts.clamp(min=1).float().reciprocal()[image_of_token]
