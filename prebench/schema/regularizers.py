"""Regularizer blocks: prebench's own, and those of installed packages (docs/own_regularizer.md)."""

from __future__ import annotations

from collections.abc import Mapping
from importlib.metadata import EntryPoint, entry_points
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, SerializeAsAny, model_validator

from prebench.schema.base import StrictModel, require_distinct

GROUP = "prebench.regularizers"
"""Entry points of this group name a type and its class, a `prebench.train.regularizers.base.Regularizer`."""
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


class RegularizerConfig(StrictModel):
    """What every regularizer block has; `type` decides which class it is."""

    type: str
    weight: float = Field(0.0, ge=0, allow_inf_nan=False)
    """lambda in L_LM + lambda * L_reg; 0 only logs the loss, which nothing of the model feels."""
    layer: Layer = "half"
    """Decoder layer l whose input the loss acts on."""

    def __hash__(self) -> int:
        """Return a hash: a type of another package may have fields of which pydantic makes none."""
        return hash(self.model_dump_json())


class LearnedRegularizerConfig(RegularizerConfig):
    """The block of a regularizer that has parameters of its own."""

    learning_rate: float = Field(1e-3, gt=0, allow_inf_nan=False)
    """Of their own optimiser (AdamW, constant)."""
    max_grad_norm: float = Field(1.0, gt=0)
    """Clipping of their gradients, apart from the model's."""


class PredictiveConfig(LearnedRegularizerConfig):
    """Predictive Regularization (arXiv 2603.20808), its ablations and two of its controls.

    At weight 0 the predictor is fitted on detached states. Of several layers each has a predictor of its own.
    """

    type: Literal["predictive"] = "predictive"
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

    @model_validator(mode="after")
    def _a_model_for_the_external_anchor(self) -> PredictiveConfig:
        if (self.anchor == "external") != (self.anchor_model is not None):
            raise ValueError(
                "anchor external and anchor_model belong together: the folder of a Hugging Face vision model, such as "
                "DINOv2's"
            )
        return self


class NormPenaltyConfig(RegularizerConfig):
    """A penalty on the same states that knows nothing of the image: control of PRe. It has no predictor."""

    type: Literal["norm_penalty"] = "norm_penalty"


_BUILT_IN: dict[str, type[RegularizerConfig]] = {"predictive": PredictiveConfig, "norm_penalty": NormPenaltyConfig}


def installed_regularizer(kind: str) -> EntryPoint | None:
    """Return the entry point that declares a type; None for prebench's own types.

    Raises:
        ValueError: no installed package declares it, or several do.
    """
    if kind in _BUILT_IN:
        return None
    found = entry_points(group=GROUP)
    named = [entry for entry in found if entry.name == kind]
    if len(named) == 1:
        return named[0]
    if named:
        raise ValueError(f"type {kind!r} is declared by {' and by '.join(map(package_of, named))}: uninstall one")
    known = ", ".join([*_BUILT_IN, *sorted(found.names - _BUILT_IN.keys())])
    raise ValueError(
        f"unknown type {kind!r}; known: {known}; another one comes with an installed package that declares it "
        f"(entry point in group {GROUP})"
    )


def package_of(entry: EntryPoint) -> str:
    """Return name and version of the package that declares an entry point."""
    return f"{entry.dist.name} {entry.dist.version}" if entry.dist is not None else entry.value


def config_class(kind: str) -> type[RegularizerConfig]:
    """Return the class of a type's block; that of an installed package is imported.

    Raises:
        ValueError: the type is unknown, or its package is not as docs/own_regularizer.md says.
    """
    entry = installed_regularizer(kind)
    if entry is None:
        return _BUILT_IN[kind]
    try:
        found = getattr(entry.load(), "config_class", None)
    except (ImportError, AttributeError) as error:
        raise ValueError(f"type {kind!r}: {entry.value} of {package_of(entry)} can't be imported ({error})") from error
    if not (isinstance(found, type) and issubclass(found, RegularizerConfig)):
        raise ValueError(
            f"type {kind!r}: {entry.value} of {package_of(entry)} needs a class attribute config_class, derived from "
            "prebench.schema.RegularizerConfig"
        )
    return found


def _of_its_type(values: Any) -> Any:
    """Build the block's own class; pydantic's tagged unions would put the tag into the path of every error."""
    if isinstance(values, RegularizerConfig):
        return values
    if not isinstance(values, Mapping):
        raise ValueError("a mapping with type, weight and layer is expected")
    kind = values.get("type", "predictive")
    if not isinstance(kind, str):
        raise ValueError(f"unknown type {kind!r}; known: {', '.join(_BUILT_IN)}")
    config = config_class(kind)
    meaningless = [name for name in PredictiveConfig.model_fields if name in values.keys() - config.model_fields.keys()]
    if meaningless:
        raise ValueError(
            f"{', '.join(meaningless)}: no meaning for type {kind}; leave them out, and don't extend a variant of "
            "another type"
        )
    return config.model_validate({**values, "type": kind})


AnyRegularizer = Annotated[SerializeAsAny[RegularizerConfig], BeforeValidator(_of_its_type)]
"""The one block in which variants differ; `type` decides what it holds."""
