"""What the loop knows of a regularizer: a module that reads hidden states and returns a loss.

Installed packages bring regularizers of their own by deriving from `Regularizer`: docs/own_regularizer.md.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar, Self

import torch
from torch import Tensor, nn
from transformers import LlavaForConditionalGeneration

from prebench.errors import ConfigError, ModelError, TrainingError
from prebench.model.visual_states import VisualStates, num_layers, resolve_layer
from prebench.schema import LearnedRegularizerConfig, RegularizerConfig, layer_names


class Regularizer(nn.Module):
    """A loss on the visual tokens of decoder layers. At weight 0 it reads detached states: logged, felt by nothing.

    A subclass writes `loss`, and `build` where it needs to know more of the model than its depth. What has to outlive
    an interruption is a parameter or a buffer.

    Args:
        config: the variant's regularizer block.
        depth: L, the LM's number of layers.

    Raises:
        ModelError: a layer lies outside the model, or two of the block's names are one and the same layer of it.
    """

    config_class: ClassVar[type[RegularizerConfig]]
    """The class of its block in a variant's file."""
    config: RegularizerConfig

    @classmethod
    def build(cls, config: RegularizerConfig, model: LlavaForConditionalGeneration) -> Self:
        """Return the regularizer for a model, which must not be changed.

        The global random state is that of the run's seed: layers of torch may be made as usual.
        """
        return cls(config, depth=num_layers(model))

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
    def learned(self) -> LearnedRegularizerConfig | None:
        """Return how its own parameters learn; None where it has none.

        Raises:
            ConfigError: it has some, and its block does not say.
        """
        if not any(p.requires_grad for p in self.parameters()):
            return None
        if isinstance(self.config, LearnedRegularizerConfig):
            return self.config
        raise ConfigError(
            f"regularizer.type {self.config.type}: {type(self).__name__} has parameters, so its config_class must "
            "derive from prebench.schema.LearnedRegularizerConfig"
        )

    def begin_stage(self, model: LlavaForConditionalGeneration) -> None:
        """Be told that a training stage starts with this model, already on its device; most types need nothing."""

    def regularised(self, states: VisualStates) -> list[Tensor]:
        """Return the visual tokens that the loss acts on, [M, D] of every layer l."""
        return [states.at(layer) for layer in self.regularised_layers]

    def forward(
        self, states: VisualStates, vision_features: Tensor, image_of_token: Tensor, image_ids: Sequence[str] = ()
    ) -> Tensor:
        """Return `loss`; at weight 0 of states and features without gradient.

        Raises:
            TrainingError: the loss is no scalar.
        """
        if self.config.weight == 0:
            states, vision_features = states.detached(), vision_features.detach()
        loss = self.loss(states, vision_features, image_of_token, image_ids)
        if loss.ndim:
            raise TrainingError(
                f"{type(self).__name__}.loss: a scalar is expected, the sum over images; got {list(loss.shape)}"
            )
        return loss

    def loss(
        self, states: VisualStates, vision_features: Tensor, image_of_token: Tensor, image_ids: Sequence[str]
    ) -> Tensor:
        """Return the loss summed over images and averaged over layers (a scalar; divide by the number of images).

        Args:
            states: hidden states of this forward pass at `layers`.
            vision_features: [I, N_p, D_v], the vision tower's output.
            image_of_token: [M], which image each visual token belongs to, 0..I-1.
            image_ids: of the I images, for anchors that were computed before.

        A micro-batch may have no image (I = M = 0): the loss is then 0, still made of all own parameters, as processes
        wait for each other's gradients.
        """
        raise NotImplementedError


def token_shares(image_of_token: Tensor) -> Tensor:
    """Return 1 / N_p of each token's image, [M] float32: a weighted sum over tokens is then a sum of image means."""
    counts = torch.bincount(image_of_token)
    return counts.clamp(min=1).float().reciprocal()[image_of_token]
