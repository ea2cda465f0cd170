"""Predictive Regularization (PRe): middle-layer visual tokens predict the tokens that entered the LLM.

L_PRe = - (1 / N_p) * sum_i cos(f_pred(h_{v,i}^l), stopgrad(h_{v,i}^0)), averaged over images; f_pred is a two-layer MLP
that exists in training only (arXiv 2603.20808, section on Predictive Regularization). Of several layers the mean is
taken, and each has a predictor of its own.

Shape suffixes: M visual tokens of all images together, D the LM's width, A the anchor's width, I images.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import LlavaForConditionalGeneration

from prebench.model.visual_states import VisualStates
from prebench.schema import PredictiveConfig
from prebench.train.features import FeatureCache
from prebench.train.regularizers.anchors import FrozenProjector, of_previous_image
from prebench.train.regularizers.base import Regularizer, token_shares


class PredictiveRegularizer(Regularizer):
    """The predictor f_pred of every layer and its loss; at weight 0 predictors are fitted on detached states.

    Args:
        config: the variant's regularizer block.
        hidden_size: D, the LM's width.
        anchor_size: A, the width of what is predicted.
        depth: L, the LM's number of layers.
        generator: source of the predictors' initial weights, so that the global random state is never touched.
        external: features of the anchor "external", by image.
    """

    config_class = PredictiveConfig
    config: PredictiveConfig

    def __init__(
        self,
        config: PredictiveConfig,
        *,
        hidden_size: int,
        anchor_size: int,
        depth: int,
        generator: torch.Generator,
        external: FeatureCache | None = None,
    ) -> None:
        super().__init__(config, depth=depth)
        sizes = (hidden_size, config.hidden_size or hidden_size, anchor_size)
        self.predictors = nn.ModuleList(_predictor(*sizes, generator) for _ in self.regularised_layers)
        self._stage_start: FrozenProjector | None = None
        self._external = external

    def begin_stage(self, model: LlavaForConditionalGeneration) -> None:
        """Take the copy of the projector that the anchor "frozen_copy" reads in this stage."""
        if self.config.anchor == "frozen_copy":
            self._stage_start = FrozenProjector(model.model.multi_modal_projector)

    def loss(
        self, states: VisualStates, vision_features: Tensor, image_of_token: Tensor, image_ids: Sequence[str]
    ) -> Tensor:
        """Return L_PRe summed over images and averaged over layers (a scalar; divide by the number of images).

        Args:
            states: hidden states of this forward pass at `layers`.
            vision_features: [I, N_p, D_v], the vision tower's output; the anchors "pre_projector" and "frozen_copy"
                read it, "shuffled" only counts its images.
            image_of_token: [M], which image each visual token belongs to, 0..I-1.
            image_ids: of the I images; the anchor "external" is looked up by them.

        Raises:
            TrainingError: the anchor is "shuffled" and there is one image alone.
        """
        anchor_MA = self._anchor(states, vision_features, image_ids)
        share_M = token_shares(image_of_token)
        weight_M = share_M
        if self.config.level == "global":
            anchor_MA = pool_by_image(anchor_MA, image_of_token, share_M)
            weight_M = torch.ones_like(share_M[: len(anchor_MA)])
        losses = []
        for predictor, hidden_MD in zip(self.predictors, self.regularised(states), strict=True):
            if self.config.level == "global":
                hidden_MD = pool_by_image(hidden_MD, image_of_token, share_M)
            cosine_M = F.cosine_similarity(predictor(hidden_MD).float(), anchor_MA.float(), dim=-1)
            losses.append(-(cosine_M * weight_M).sum())
        return torch.stack(losses).mean()

    def _anchor(self, states: VisualStates, vision_features: Tensor, image_ids: Sequence[str]) -> Tensor:
        """Return what is predicted, [M, A], without gradient."""
        match self.config.anchor:
            case "external":
                assert self._external is not None, "an external anchor is built with its features"
                return self._external.get(image_ids).to(vision_features.device).flatten(0, 1).float()
            case "pre_projector":
                return vision_features.flatten(0, 1).detach()
            case "frozen_copy":
                assert self._stage_start is not None, "begin_stage comes before the first forward pass"
                return self._stage_start(vision_features)
            case "shuffled":
                return of_previous_image(states.at(0).detach(), len(vision_features))
        return states.at(0).detach()


def _predictor(hidden_size: int, width: int, anchor_size: int, generator: torch.Generator) -> nn.Sequential:
    """Return f_pred: two layers with GELU between them."""
    first = nn.utils.skip_init(nn.Linear, hidden_size, width)
    second = nn.utils.skip_init(nn.Linear, width, anchor_size)
    for linear in (first, second):
        bound = linear.in_features**-0.5
        nn.init.uniform_(linear.weight, -bound, bound, generator=generator)
        nn.init.zeros_(linear.bias)
    return nn.Sequential(first, nn.GELU(), second)


def pool_by_image(tokens_MD: Tensor, image_of_token: Tensor, share_M: Tensor) -> Tensor:
    """Return the mean token of each image, [I, D]."""
    images = int(image_of_token.max()) + 1 if len(image_of_token) else 0
    pooled = tokens_MD.new_zeros((images, tokens_MD.shape[-1]))
    return pooled.index_add(0, image_of_token, tokens_MD * share_M.to(tokens_MD.dtype).unsqueeze(-1))


@torch.no_grad()
def anchor_statistics(anchor_MD: Tensor) -> dict[str, float | None]:
    """Return the health of the anchor: what a trivial solution would exploit.

    `anchor_norm` is the mean L2 norm; `anchor_rank` the participation ratio (sum of eigenvalues)^2 / sum of squared
    eigenvalues of the covariance; `constant_cosine` the mean cosine that the best constant predictor reaches, which is
    the length of the mean unit vector. All are None without visual tokens.
    """
    if not len(anchor_MD):
        return dict.fromkeys(("anchor_norm", "anchor_rank", "constant_cosine"))
    tokens = anchor_MD.float()
    centred = tokens - tokens.mean(0)
    covariance = centred.T @ centred / max(1, len(tokens) - 1)
    trace = covariance.diagonal().sum()
    rank = trace.square() / covariance.square().sum().clamp(min=1e-12)
    constant = F.normalize(tokens, dim=-1).mean(0).norm()
    return {
        "anchor_norm": tokens.norm(dim=-1).mean().item(),
        "anchor_rank": rank.item(),
        "constant_cosine": constant.item(),
    }
