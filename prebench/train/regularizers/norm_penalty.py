"""Control of PRe: hold the length of the middle-layer visual tokens and ask nothing about their content.

L_norm = (1 / N_p) * sum_i (log ||h_{v,i}^l|| - log stopgrad ||h_{v,i}^0||)^2, averaged over images. It acts on the
states that PRe acts on, but knows of the image only how long its tokens are. Formula and purpose: docs/regularizers.md.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from prebench.model.visual_states import VisualStates
from prebench.schema import NormPenaltyConfig
from prebench.train.regularizers.base import Regularizer, token_shares

SMALLEST_NORM = 1e-6
"""Below this length a token counts as this long, so that a zero vector gives a finite loss."""


class NormPenaltyRegularizer(Regularizer):
    """The squared log ratio of the tokens' lengths. It has no parameters.

    Args:
        config: the variant's regularizer block.
        depth: L, the LM's number of layers.
    """

    config_class = NormPenaltyConfig
    config: NormPenaltyConfig

    def loss(
        self, states: VisualStates, vision_features: Tensor, image_of_token: Tensor, image_ids: Sequence[str]
    ) -> Tensor:
        """Return L_norm summed over images and averaged over layers; `vision_features` are not read."""
        anchor_M = _log_norm(states.at(0).detach())
        share_M = token_shares(image_of_token)
        losses = [((_log_norm(h) - anchor_M).square() * share_M).sum() for h in self.regularised(states)]
        return torch.stack(losses).mean()


def _log_norm(tokens_MD: Tensor) -> Tensor:
    return torch.linalg.vector_norm(tokens_MD.float(), dim=-1).clamp_min(SMALLEST_NORM).log()
