"""A variant: one regularizer block."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, model_validator

from prebench.schema.base import Name, StrictModel, require_distinct

NAMED_LAYERS = ("quarter", "half", "three_quarters", "last")


def _a_layer_or_several(value: Any) -> Any:
    """Check by hand: pydantic would report a union once per member."""
    several = list(value) if isinstance(value, list | tuple) else [value]
    known = [name in NAMED_LAYERS or type(name) is int for name in several]
    if not several or not all(known):
        raise ValueError(f"write {', '.join(NAMED_LAYERS)}, a number from 1 on, or a list of these")
    require_distinct("layer", [str(name) for name in several])
    return value


LayerName = Literal["quarter", "half", "three_quarters", "last"] | int
"""Decoder layer l: a fraction of the depth, or 1..L."""
Layer = Annotated[LayerName | tuple[LayerName, ...], BeforeValidator(_a_layer_or_several)]
"""One layer, or a list of several: their losses are averaged."""


def layer_names(layer: Layer) -> tuple[LayerName, ...]:
    """Return the layers of a regularizer block as they are written there, one or several."""
    return layer if isinstance(layer, tuple) else (layer,)


class PredictiveConfig(StrictModel):
    """Predictive Regularization (arXiv 2603.20808), its ablations and two of its controls."""

    type: Literal["predictive"] = "predictive"
    weight: float = Field(0.0, ge=0)
    """lambda in L_LM + lambda * L_PRe; 0 is the baseline, which only logs the loss of a detached predictor."""
    layer: Layer = "half"
    """Decoder layer l whose input is predicted from; of several, each has a predictor of its own."""
    anchor: Literal["pre_llm", "pre_projector", "external", "shuffled", "frozen_copy"] = "pre_llm"
    """What is predicted, never with gradient: h_v^0 (the projector's output), the vision tower's output, that of
    another vision model (`anchor_model`), h_v^0 of another image of the micro-batch, or h_v^0 as the projector of the
    stage's start makes it."""
    anchor_model: str | None = Field(None, exclude_if=lambda value: value is None)
    """Folder of a Hugging Face vision model, for the anchor "external" alone."""
    level: Literal["patch", "global"] = "patch"
    """Cosine per visual token, or of their mean."""
    hidden_size: int | None = Field(None, gt=0)
    """Width of the predictor's hidden layer; the LM's width where null."""
    learning_rate: float = Field(1e-3, gt=0)
    """Of the predictor's own optimiser (constant)."""
    max_grad_norm: float = Field(1.0, gt=0)
    """Clipping of the predictor's gradients, apart from the model's."""

    @model_validator(mode="after")
    def _a_model_for_the_external_anchor(self) -> PredictiveConfig:
        if (self.anchor == "external") != (self.anchor_model is not None):
            raise ValueError(
                "anchor external and anchor_model belong together: the folder of a Hugging Face vision model, such as "
                "DINOv2's"
            )
        return self


class NormPenaltyConfig(StrictModel):
    """A penalty on the same states that knows nothing of the image: control of PRe. It has no predictor."""

    type: Literal["norm_penalty"] = "norm_penalty"
    weight: float = Field(0.0, ge=0)
    """lambda in L_LM + lambda * L_norm; 0 only logs the loss."""
    layer: Layer = "half"
    """Decoder layer l whose input's length is held."""

    @model_validator(mode="before")
    @classmethod
    def _no_option_of_the_predictor(cls, values: Any) -> Any:
        given = set(values) if isinstance(values, Mapping) else set()
        meaningless = [name for name in PredictiveConfig.model_fields if name in given - set(cls.model_fields)]
        if meaningless:
            raise ValueError(
                f"{', '.join(meaningless)}: no meaning for type norm_penalty; leave them out, and don't extend a "
                "variant of another type"
            )
        return values


_REGULARIZERS: dict[str, type[StrictModel]] = {"predictive": PredictiveConfig, "norm_penalty": NormPenaltyConfig}


def _of_its_type(values: Any) -> Any:
    """Build the block's own class; pydantic's tagged unions would put the tag into the path of every error."""
    if isinstance(values, StrictModel):
        return values
    if not isinstance(values, Mapping):
        raise ValueError("a mapping with type, weight and layer is expected")
    kind = values.get("type", "predictive")
    if not isinstance(kind, str) or kind not in _REGULARIZERS:
        raise ValueError(f"unknown type {kind!r}; known: {', '.join(_REGULARIZERS)}")
    return _REGULARIZERS[kind].model_validate(values)


RegularizerConfig = Annotated[NormPenaltyConfig | PredictiveConfig, BeforeValidator(_of_its_type)]
"""The one block in which variants differ; `type` decides which of the two it is."""


class VariantConfig(StrictModel):
    """A training objective: a name and its regularizer (null: none at all, not even logged)."""

    name: Name
    description: str = ""
    regularizer: RegularizerConfig | None
    seed_offset: int = Field(0, ge=0)
    """The same objective with other randomness: seed s trains with s + offset in initialisation and data order."""
