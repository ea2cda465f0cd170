"""What a plan says, against real models and steps: parameters, operations, kept bytes, peaks.

Parameters and matrix products are exact. Of what autograd keeps, the estimate leaves out indices, masks of a byte per
token and rotary tables: 3%. Peaks are those of all tensors alive in steps on the CPU; what a GPU's allocator adds can
only be seen there.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterable
from typing import Any

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from prebench.config import load_variant
from prebench.costs import formulas
from prebench.costs.stages import Machine, memory, stage_counts, vocabulary
from prebench.model.builder import build_model, model_processor
from prebench.model.freezing import freeze_for_stage
from prebench.train.loop import build_regularizer
from prebench.train.packing import packed_attention
from tests.costs import real_steps
from tests.costs.real_steps import ALIGN, EXAMPLES, INSTRUCT, TUNED
from tests.model.published_parts import tiny_preset

CLIP, SIGLIP = PAIRS = list(real_steps.PUBLISHED)
STAGES = {"align": ALIGN, "instruct": INSTRUCT, "tuned": TUNED}
VARIANTS = ["baseline", "pre"]
SWITCH = [False, True]


def cases(quick: set[tuple[Any, ...]], *axes: Iterable[Any]) -> list[Any]:
    """Return all combinations of pair, stage and so on; those that are not named as quick are slow."""
    found = itertools.product(PAIRS, STAGES, *axes)
    return [pytest.param(*case, marks=() if case in quick else pytest.mark.slow) for case in found]


def block(variant: str) -> Any:
    return load_variant(variant).regularizer


@pytest.mark.parametrize(
    "name", [pytest.param("llava15-vicuna7b-tuned-encoder", marks=pytest.mark.slow), "siglip2-qwen25-0.5b"]
)
def test_parameters_are_those_of_the_built_model(tmp_path, name):
    preset = tiny_preset(name, tmp_path)
    processor: Any = model_processor(preset.model)
    model = build_model(preset.model, processor.tokenizer, seed=0)
    rows = vocabulary(preset.model, len(processor.tokenizer))
    assert rows == len(model.get_input_embeddings().weight)  # type: ignore[arg-type]
    for stage in (preset.train.align, preset.train.instruct):
        freeze_for_stage(model, stage.trainable)
        tower: Any = model.model.vision_tower
        for variant in ("pre", "pre-layers-several", "pre-anchor-encoder", "norm-penalty"):
            described = real_steps.setup(preset.model, stage.trainable, block(variant), False, False)[0]
            counts = stage_counts(dataclasses.replace(described, vocabulary=rows))
            regularizer = build_regularizer(block(variant), model, 0)
            assert regularizer is not None
            assert counts.total["predictor"] == sum(p.numel() for p in regularizer.parameters())
            assert sum(counts.total.values()) - counts.total["predictor"] == sum(p.numel() for p in model.parameters())
            learn = [p.numel() for p in model.parameters() if p.requires_grad]
            assert sum(counts.trained.values()) - counts.total["predictor"] == sum(learn)
            assert counts.trained["vision_tower"] == sum(p.numel() for p in tower.parameters() if p.requires_grad)


@pytest.mark.parametrize(
    ("pair", "stage", "checkpointing", "variant"),
    cases({(CLIP, "align", True, "baseline"), (SIGLIP, "tuned", True, "pre")}, SWITCH, VARIANTS),
)
def test_operations_are_those_of_a_real_step(pair, stage, checkpointing, variant):
    _compare_operations(pair, STAGES[stage], checkpointing, variant)


@pytest.mark.slow
@pytest.mark.parametrize("variant", ["pre-layers-several", "pre-level-global", "pre-frozen-copy", "pre-anchor-encoder"])
def test_operations_of_other_regularizers_are_counted(variant):
    _compare_operations(CLIP, INSTRUCT, False, variant)


def _compare_operations(pair: str, trainable: tuple[str, ...], checkpointing: bool, variant: str) -> None:
    config = real_steps.small(pair)
    model, given = real_steps.objective(config, trainable, block(variant)), real_steps.batch(config)
    if checkpointing:
        real_steps.checkpoint(model)
    described, micro = real_steps.setup(config, trainable, block(variant), checkpointing, False)
    work = formulas.operations(described, micro)
    # The counter knows the products inside attention in this kernel alone.
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH), packed_attention(model.model):
        terms = model(given)
        forward = counter.get_total_flops()
        terms.total(given.num_targets, EXAMPLES, 0.5).backward()
    assert sum(part.forward for part in work.values()) == forward
    assert sum(part.total for part in work.values()) == counter.get_total_flops()


@pytest.mark.parametrize(
    ("pair", "stage", "half", "variant"),
    cases({(CLIP, "align", True, "pre"), (SIGLIP, "tuned", True, "baseline")}, SWITCH, VARIANTS),
)
def test_kept_bytes_are_those_of_a_real_forward_pass(pair, stage, half, variant):
    config = real_steps.small(pair)
    model = real_steps.objective(config, STAGES[stage], block(variant))
    described, micro = real_steps.setup(config, STAGES[stage], block(variant), False, half)
    expected = real_steps.kept_bytes(model, real_steps.batch(config), half)
    estimate = real_steps.kept_estimate(described, micro) + formulas.half_weight_bytes(described)
    assert estimate == pytest.approx(expected, rel=0.03)


@pytest.mark.parametrize(("pair", "stage"), cases({(CLIP, "instruct")}))
def test_kept_bytes_with_checkpointing(pair, stage):
    config, trainable = real_steps.small(pair), STAGES[stage]
    model = real_steps.objective(config, trainable, block("pre"))
    real_steps.checkpoint(model)
    described, micro = real_steps.setup(config, trainable, block("pre"), True, False)
    expected = real_steps.kept_bytes(model, real_steps.batch(config), False)
    assert real_steps.kept_estimate(described, micro) == pytest.approx(expected, rel=0.03)


@pytest.mark.parametrize(
    ("pair", "stage", "checkpointing", "half", "accumulation"),
    cases({(CLIP, "instruct", True, True, 2), (SIGLIP, "align", False, True, 1)}, SWITCH, SWITCH, (1, 2)),
)
def test_the_peak_is_that_of_real_steps(pair, stage, checkpointing, half, accumulation):
    config, trainable = real_steps.small(pair), STAGES[stage]
    described, micro = real_steps.setup(config, trainable, block("pre"), checkpointing, half)
    counts = stage_counts(described)
    estimate = memory(described, counts, Machine(1, half=half), micro, accumulation)
    seen = _steps(config, trainable, checkpointing, half, accumulation)
    assert estimate.weights == seen["weights"] and estimate.gradients == seen["gradients"]
    assert estimate.optimizer == pytest.approx(seen["optimizer"], rel=0.01)  # there is a step count for each tensor
    projector = 4 * counts.total["multi_modal_projector"]  # the stage's copy of it is not made here
    inside = [size for name, size in estimate.moments.items() if name != "optimiser's step"]
    assert 0.97 < (max(inside) - projector) / seen["peak"] < 1.15
    assert estimate.moments["optimiser's step"] - projector == pytest.approx(seen["step"], rel=0.05)


def _steps(config: Any, trainable: Any, checkpointing: bool, half: bool, accumulation: int) -> dict[str, int]:
    """Make two optimiser steps as training does and return the bytes of what is alive."""
    model, given = real_steps.objective(config, trainable, block("pre")), real_steps.batch(config)
    if checkpointing:
        real_steps.checkpoint(model)
    learn = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(learn, foreach=True)  # as on a GPU
    live = real_steps.LiveBytes()
    for parameter in model.parameters():
        live.add(parameter)
    seen = {"weights": live.now}
    with live, packed_attention(model.model):
        for _ in range(2):
            terms: list[Any] = []
            live.peak = live.now
            for index in range(accumulation):
                with torch.autocast("cpu", dtype=torch.bfloat16, enabled=half):
                    found = model(given)
                    found.total(given.num_targets, EXAMPLES, 0.5).backward()
                terms.append(found.detached(with_anchor=index == accumulation - 1))
                del found
            seen |= {"peak": live.peak, "gradients": sum(p.grad.nbytes for p in learn if p.grad is not None)}
            live.peak = live.now
            optimizer.step()
            seen["step"] = live.peak
            seen["optimizer"] = sum(v.nbytes for state in optimizer.state.values() for v in state.values())
            optimizer.zero_grad(set_to_none=True)
    return seen
