"""What only a GPU can show of training: `pytest -m cuda` on a machine with one (left out of `make test`)."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.state import AcceleratorState
from safetensors.torch import load_file

from prebench.data.order import data_order
from prebench.errors import InterruptedRunError
from prebench.model.builder import build_model
from prebench.schema import PredictiveConfig, TrainConfig
from prebench.train.batches import MicroBatches
from prebench.train.loop import build_accelerator, build_regularizer
from prebench.train.objective import Objective
from prebench.train.packing import packed_attention
from tests.conftest import TINY
from tests.data.tiny_conversations import good_records, write_records
from tests.train.conftest import RECIPE
from tests.train.fsdp import train_case
from tests.train.test_checkpoints import Trial, assert_equal
from tests.train.test_parity import EVERY_TYPE_AT_ZERO, PRE, losses_and_gradients, parameters
from tests.train.test_sharding import LOSSES, cases, launch, log_of

pytestmark = pytest.mark.cuda
CUDA = {"device": "cuda"}
DTYPES = ["float32", "bfloat16"]
CLOSE = {"float32": 1e-4, "bfloat16": 3e-2}
"""Largest difference of a loss from the CPU's in float32, in nats or cosines."""


@pytest.fixture(autouse=True)
def _any_precision() -> None:
    """Let every training choose: in a process accelerate keeps the precision of the first."""
    AcceleratorState._reset_state()


def losses(lines: list[dict[str, Any]], names: Sequence[str] = ("lm_loss", "pre_loss")) -> torch.Tensor:
    """Return losses line by line; NaN, which equals nothing unless that is asked for, where a line has none."""
    return torch.tensor([[float("nan") if line.get(name) is None else line[name] for name in names] for line in lines])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("switch", [{}, {"gradient_checkpointing": True}, {"torch_compile": True}], ids=str)
def test_losses_are_those_of_the_cpu(run_training, dtype, switch):
    _, expected = run_training(PRE)
    AcceleratorState._reset_state()
    _, lines = run_training(PRE, dtype=dtype, **CUDA, **switch)
    torch.testing.assert_close(losses(lines), losses(expected), rtol=0, atol=CLOSE[dtype])
    assert [line["batch_hash"] for line in lines] == [line["batch_hash"] for line in expected]


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_training_repeats_bit_for_bit(run_training, dtype):
    assert_equal(*(run_training(PRE, dtype=dtype, **CUDA)[0] for _ in range(2)))


def test_a_training_that_need_not_repeat_has_the_same_losses(run_training):
    strict, free = (run_training(PRE, dtype="bfloat16", deterministic=repeats, **CUDA)[1] for repeats in (True, False))
    torch.testing.assert_close(losses(free), losses(strict), rtol=0, atol=CLOSE["bfloat16"])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("config", EVERY_TYPE_AT_ZERO, ids=repr)
def test_weight_zero_equals_no_regularizer(run_training, config, dtype):
    plain, plain_log = run_training(None, dtype=dtype, **CUDA)
    zero, zero_log = run_training(config, dtype=dtype, **CUDA)
    for name, tensor in parameters(plain).items():
        assert torch.equal(tensor, parameters(zero)[name]), name
    assert [line["lm_loss"] for line in plain_log] == [line["lm_loss"] for line in zero_log]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("anchor", ["pre_llm", "frozen_copy"])
def test_an_interrupted_run_ends_with_the_same_weights(tmp_path, inputs, dtype, anchor):
    changes = {"dtype": dtype, "instruct": RECIPE["instruct"] | {"gradient_accumulation_steps": 2}, **CUDA}
    regularizer = PredictiveConfig(weight=0.5, anchor=anchor)
    plain = Trial(tmp_path / "plain", inputs, regularizer, **changes)
    trial = Trial(tmp_path / "stopped", inputs, regularizer, **changes)
    expected = plain.run()
    for step in (0, 1):  # one in each stage
        with pytest.raises(InterruptedRunError):
            trial.run(stop_at=step)
    assert_equal(trial.run(), expected)
    assert trial.lines() == plain.lines()


def test_packed_rows_have_the_loss_and_gradients_of_transformers_with_its_mask(inputs):
    found = losses_and_gradients(inputs, TrainConfig.model_validate(RECIPE | CUDA))
    torch.testing.assert_close(*found, rtol=1e-3, atol=1e-5)


def test_autocast_keeps_weights_losses_and_the_regularizer_in_float32(inputs):
    recipe = TrainConfig.model_validate(RECIPE | CUDA | {"dtype": "bfloat16"})
    model = build_model(TINY, inputs.processor.tokenizer, 0)
    accelerator = build_accelerator(recipe)
    objective = Objective(model, build_regularizer(PRE, model, 0)).to(accelerator.device)
    batch = MicroBatches(data_order(inputs.data, recipe.instruct, "instruct", 0), inputs, accelerator)[0]
    with accelerator.autocast(), packed_attention(model):
        terms = objective(batch.to(accelerator.device))
    assert terms.pre_sum is not None
    assert terms.lm_sum.dtype == terms.pre_sum.dtype == torch.float32
    assert all(p.dtype == torch.float32 for p in objective.parameters())


def test_accelerate_chooses_fsdp2_and_trains_and_resumes_with_it(tmp_path):
    """One process, as two can't share a GPU: the choice, DTensors, NCCL, checkpoints and exports are the real ones."""
    data = write_records(tmp_path / "data", good_records(24, every_text_only=2))
    chosen = {name: case for name, case in cases(data).items() if name in ("plain", "resumed")}
    on_gpu = {name: case | {"recipe": case["recipe"] | CUDA} for name, case in chosen.items()}
    launch(tmp_path, on_gpu, num_processes=1)
    assert all(s["kind"] == "FSDP" and s["sharded"] for s in json.loads((tmp_path / "seen.json").read_text()))
    (tmp_path / "cpu").mkdir()
    expected = train_case(chosen["plain"], tmp_path / "cpu")
    found, expected = (losses(lines, LOSSES) for lines in (log_of(tmp_path / "plain"), expected))
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4, equal_nan=True)
    weights = {name: load_file(_weights(tmp_path / name)) for name in ("plain", "resumed")}
    assert all(torch.equal(tensor, weights["resumed"][name]) for name, tensor in weights["plain"].items())


def _weights(folder: Path) -> Path:
    return folder / "model" / "model.safetensors"
