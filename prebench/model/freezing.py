"""Which parts of the model learn in a stage."""

from __future__ import annotations

from collections.abc import Collection

from torch import nn
from transformers import LlavaForConditionalGeneration

PARTS = ("vision_tower", "multi_modal_projector", "language_model")


def part_modules(model: LlavaForConditionalGeneration, part: str) -> list[nn.Module]:
    """Return the modules of a part; the LM head belongs to the language model."""
    modules: list[nn.Module] = [getattr(model.model, part)]
    return [*modules, model.lm_head] if part == "language_model" else modules


def _freeze_unused(model: LlavaForConditionalGeneration) -> None:
    """Freeze the tower's final norm: LLaVA reads hidden states before it, and DDP waits for unused gradients."""
    norm = getattr(model.model.vision_tower, "post_layernorm", None)
    if norm is not None:
        norm.requires_grad_(False)


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
