"""Which parts of the model learn in a stage."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from torch import nn
from transformers import LlavaForConditionalGeneration

PARTS = ("vision_tower", "multi_modal_projector", "language_model")


def part_modules(model: LlavaForConditionalGeneration, part: str) -> list[nn.Module]:
    """Return the modules of a part; the LM head belongs to the language model."""
    modules: list[nn.Module] = [getattr(model.model, part)]
    return [*modules, model.lm_head] if part == "language_model" else modules


def _freeze_unused(model: LlavaForConditionalGeneration) -> None:
    """Freeze what lies behind the hidden state that LLaVA reads: DDP would wait for gradients that never come."""
    tower: Any = model.model.vision_tower
    norm = getattr(tower, "post_layernorm", None)
    if norm is not None:
        norm.requires_grad_(False)
    layer = model.config.vision_feature_layer
    assert isinstance(layer, int)
    if layer < -1:
        for block in tower.encoder.layers[layer + 1 :]:
            block.requires_grad_(False)


def freeze_for_stage(model: LlavaForConditionalGeneration, trainable: Collection[str]) -> dict[str, int]:
    """Set `requires_grad` so that exactly the named parts learn; return each part's number of trainable weights."""
    counts = {}
    for part in PARTS:
        parameters = [p for module in part_modules(model, part) for p in module.parameters()]
        for parameter in parameters:
            parameter.requires_grad_(part in trainable)
        if part == "vision_tower":
            _freeze_unused(model)
        counts[part] = sum(p.numel() for p in parameters if p.requires_grad)
    return counts
