"""PRe's gradient is the same however the model is computed: the tolerance is float32's rounding.

Only a GPU can show bf16 at speed, memory saved by sharding, NCCL, and accelerate's own choice of FSDP.
"""

from __future__ import annotations

import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from prebench.config import diff, load_preset, load_suite, load_variant
from prebench.errors import TrainingError
from prebench.schema import PredictiveConfig, StudyConfig, TrainConfig
from prebench.train import packing
from prebench.train.execution import execution
from prebench.train.regularizers.predictive import PredictiveRegularizer
from tests.train.conftest import RECIPE
from tests.train.gradients import gradients, objective

ROOT = Path(__file__).parents[2]
TOLERANCE = {"atol": 1e-6, "rtol": 1e-4}


@pytest.fixture(scope="module")
def plain() -> dict[str, torch.Tensor]:
    found = gradients(objective())
    assert any(name.startswith("regularizer.") for name in found)
    assert all(value.abs().sum() > 0 for name, value in found.items() if "vision" not in name)
    return found


def assert_equal(found: dict[str, torch.Tensor], plain: dict[str, torch.Tensor]) -> None:
    assert found.keys() == plain.keys()
    for name, value in plain.items():
        torch.testing.assert_close(found[name], value, msg=lambda text, name=name: f"{name}: {text}", **TOLERANCE)


def switched(**switches: bool) -> dict[str, torch.Tensor]:
    term = objective()
    config = TrainConfig.model_validate(RECIPE | switches)
    with execution(term.model, config):
        return gradients(term)


def test_the_regularizer_reaches_the_layers_before_it_alone(plain):
    """The tolerance can fail: PRe's share of the gradient is far larger than it."""
    term = objective()
    term.regularizer.config = term.regularizer.config.model_copy(update={"weight": 0.0})
    without = gradients(term)
    moved = {n for n, g in plain.items() if (g - without[n]).abs().max() > 1e-4}
    layers = {int(n.split("layers.")[1].split(".")[0]) for n in moved if "language_model.layers." in n}
    assert layers == {0, 1}


def test_activation_checkpointing_keeps_the_gradient(plain):
    term = objective()
    config = TrainConfig.model_validate(RECIPE | {"gradient_checkpointing": True})
    calls = []
    layer = term.model.model.language_model.layers[1]
    layer.mlp.register_forward_pre_hook(lambda *_: calls.append(True))
    with execution(term.model, config):
        assert_equal(gradients(term), plain)
        assert len(calls) == 2, "activations were kept"
    gradients(term)
    assert len(calls) == 3, "the switch outlives the block"


@pytest.mark.parametrize("checkpointing", [False, True])
def test_attention_in_one_call_keeps_the_gradient(plain, checkpointing, monkeypatch):
    """As on a GPU."""
    monkeypatch.setattr(packing, "in_one_call", lambda _device: True)
    assert_equal(switched(gradient_checkpointing=checkpointing), plain)


def test_an_operation_whose_sums_do_not_repeat_is_refused_unless_it_is_allowed(run_training, monkeypatch):
    def forward(_self: Any, states: Any, *_rest: Any) -> torch.Tensor:
        seen = states.at(0).flatten()[:1]
        return torch.zeros(1).put_(torch.tensor([0]), seen).sum()

    monkeypatch.setattr(PredictiveRegularizer, "forward", forward)
    pre = PredictiveConfig(weight=0.5)
    with pytest.raises(TrainingError, match=r"put_ does not have .*; --set train\.deterministic=false lets it pass"):
        run_training(pre)
    assert torch.is_deterministic_algorithms_warn_only_enabled()
    _, lines = run_training(pre, deterministic=False)
    assert len(lines) == RECIPE["align"]["steps"] + RECIPE["instruct"]["steps"]


def test_a_run_with_the_switch_has_the_losses_of_one_without(run_training):
    _, plain_log = run_training(PredictiveConfig(weight=0.5))
    model, log = run_training(PredictiveConfig(weight=0.5), gradient_checkpointing=True)
    for a, b in zip(plain_log, log, strict=True):
        for name in ("lm_loss", "pre_loss", "grad_norm"):
            assert math.isclose(a[name], b[name], rel_tol=1e-5, abs_tol=1e-5)
    assert not model.is_gradient_checkpointing


def test_switches_are_part_of_what_decides_a_run_and_the_checkpoints_rhythm_is_not():
    def run_config(*overrides: str) -> dict[str, object]:
        suite, variant = load_suite("smoke"), load_variant("pre")
        preset = load_preset("smoke", overrides)
        return StudyConfig(name="s", preset=preset, suite=suite, variants=(variant,), seeds=(0,)).run_config("pre", 0)

    plain_config = run_config()
    assert run_config("train.checkpoint_every=7") == plain_config
    assert list(diff(plain_config, run_config("train.gradient_checkpointing=true", "train.torch_compile=true"))) == [
        "train.gradient_checkpointing: (absent) -> True",
        "train.torch_compile: (absent) -> True",
    ]


@pytest.mark.slow
def test_compiled_layers_keep_the_gradient(plain):
    compiled = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    assert_equal(switched(torch_compile=True), plain)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] > compiled


@pytest.mark.slow
def test_compiled_and_checkpointed_layers_keep_the_gradient(plain):
    assert_equal(switched(torch_compile=True, gradient_checkpointing=True), plain)


def test_lora_adapters_get_their_share_of_the_plain_gradient(plain):
    """At the start B is 0: the model is the plain one, and dL/dB = scale * dL/dW A^T, dL/dA = 0."""
    peft = pytest.importorskip("peft")
    term = objective()
    config = peft.LoraConfig(r=4, lora_alpha=8, lora_dropout=0.0, target_modules=["q_proj", "v_proj"])
    peft.inject_adapter_in_model(config, term.model.model.language_model)
    found = gradients(term)
    shared = {name for name in plain if "projector" in name or name.startswith("regularizer.")}
    assert shared and shared <= found.keys()
    for name in shared:
        torch.testing.assert_close(found[name], plain[name], **TOLERANCE)
    adapters = [name for name in found if "lora_B" in name]
    assert len(adapters) == 8
    parameters = dict(term.named_parameters())
    for name in adapters:
        a = parameters[name.replace("lora_B", "lora_A")].detach()
        weight = plain[name.replace(".lora_B.default", "")]
        torch.testing.assert_close(found[name], 2.0 * weight @ a.T, **TOLERANCE)
        assert found[name.replace("lora_B", "lora_A")].abs().max() == 0


@pytest.mark.slow
def test_two_processes_sum_to_the_plain_gradient_copied_or_sharded(plain, tmp_path):
    launcher = ["-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone"]
    subprocess.run(
        [sys.executable, *launcher, str(ROOT / "tests/train/sharded.py"), str(tmp_path)],
        check=True,
        timeout=300,
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
    )
    for name in ("ddp", "fully_shard"):
        assert_equal(load_file(tmp_path / f"{name}.safetensors"), plain)
