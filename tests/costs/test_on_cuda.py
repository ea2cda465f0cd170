"""What a plan says of a real preset's memory, against CUDA's allocator: `pytest -m cuda` on a machine with a large GPU.

Random weights in the preset's own shape; the longest examples that the preset allows.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

from prebench.config import load_preset, load_variant
from prebench.costs.formulas import MicroBatch, Setup
from prebench.costs.stages import Machine, memory, stage_counts, vocabulary
from prebench.train.packing import packed_attention
from tests.costs import real_steps

pytestmark = pytest.mark.cuda
EXAMPLES, LENGTH, TARGETS, ACCUMULATION = 4, 2048, 1000, 2


@pytest.mark.parametrize("checkpointing", [True, False])
@pytest.mark.parametrize("trainable", [real_steps.ALIGN, real_steps.INSTRUCT], ids=["align", "instruct"])
def test_the_planned_peak_is_what_cuda_allocates(trainable, checkpointing, record_property):
    config, block = load_preset("siglip2-qwen25-0.5b").model, load_variant("pre").regularizer
    rows, visual = vocabulary(config, None), config.vision_tower.num_tokens
    size = config.language_model.hidden_size
    setup = Setup(config, rows, frozenset(trainable), False, checkpointing, True, block, size)
    micro = MicroBatch(EXAMPLES, LENGTH, EXAMPLES, EXAMPLES * TARGETS)
    planned = memory(setup, stage_counts(setup), Machine(1), micro, ACCUMULATION)
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated()
    model = real_steps.objective(config, trainable, block, rows, "cuda")
    if checkpointing:
        real_steps.checkpoint(model)
    given = real_steps.batch(config, rows, EXAMPLES, LENGTH - visual, TARGETS).to(torch.device("cuda"))
    peak = _peak_of_steps(model, given) - before
    record_property("planned GB", round(planned.peak / 1e9, 2))
    record_property("allocated GB", round(peak / 1e9, 2))
    assert 0.95 < planned.peak / peak < 1.15


def _peak_of_steps(model: Any, given: Any) -> int:
    """Make two optimiser steps as training does and return the most bytes that were allocated."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad])
    torch.cuda.reset_peak_memory_stats()
    with packed_attention(model.model):
        for _ in range(2):
            for _part in range(ACCUMULATION):
                with torch.autocast("cuda", dtype=torch.bfloat16):
                    terms = model(given)
                    terms.total(given.num_targets * ACCUMULATION, EXAMPLES * ACCUMULATION, 0.5).backward()
                del terms
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
    return torch.cuda.max_memory_allocated()
