"""One process against two, one accumulation step against eight: the same losses and weights, pictures or none."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import DistributedType
from safetensors.torch import load_file

from prebench.errors import ConfigError
from prebench.train.processes import join_processes, require_supported
from prebench.train.sharding import sharding_plugin
from tests.data.tiny_conversations import good_records, write_records
from tests.train.several import train_tiny

ROOT = Path(__file__).parents[2]
STAGE = {"steps": 5, "batch_size": 8, "learning_rate": 1e-3}
RECIPE = {"align": STAGE, "instruct": STAGE | {"steps": 50}, "log_every": 1, "device": "cpu", "dtype": "float32"}
LOSSES = ("lm_loss", "pre_loss", "grad_norm", "predictor_grad_norm")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Records of which every second has no picture: with micro-batches of one, every second is without."""
    return write_records(tmp_path_factory.mktemp("data"), good_records(24, every_text_only=2))


def of_two_processes(folder: Path, data: Path, recipe: dict[str, Any]) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    job = {
        "data": str(data),
        "recipe": recipe,
        "log": str(folder / "log.json"),
        "weights": str(folder / "weights.safetensors"),
    }
    (folder / "job.json").write_text(json.dumps(job))
    launcher = ["-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone"]
    subprocess.run(
        [sys.executable, *launcher, str(ROOT / "tests/train/several.py"), str(folder / "job.json")],
        check=True,
        timeout=300,
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
    )
    return load_file(folder / "weights.safetensors"), json.loads((folder / "log.json").read_text())


@pytest.mark.slow
def test_two_processes_have_the_losses_of_one(tmp_path, data):
    model, one = train_tiny(data, RECIPE)
    weights, two = of_two_processes(tmp_path, data, RECIPE)
    assert len(one) == len(two) == 55
    for number, (a, b) in enumerate(zip(one, two, strict=True)):
        tolerance = 1e-5 if number < 10 else 1e-3
        assert a["num_targets"] == b["num_targets"]
        for name in ("lm_loss", "pre_loss"):
            assert math.isclose(a[name], b[name], abs_tol=tolerance), (number, name, a[name], b[name])
    named = dict(model.named_parameters())
    assert named.keys() == weights.keys() and any(name.startswith("regularizer.") for name in weights)
    for name, tensor in weights.items():
        torch.testing.assert_close(named[name].detach(), tensor, atol=2e-3, rtol=0)


@pytest.mark.parametrize("weight", [0.5, 0.0])
def test_eight_accumulation_steps_have_the_losses_of_one(data, weight):
    """Normalised by the global batch's target tokens and images: a mean of micro-batch means would differ."""
    whole = RECIPE | {"align": STAGE | {"steps": 0}, "instruct": STAGE | {"steps": 3, "learning_rate": 1e-4}}
    parts = whole | {"instruct": whole["instruct"] | {"gradient_accumulation_steps": 8}}
    _, one = train_tiny(data, whole, weight)
    _, eight = train_tiny(data, parts, weight)
    for a, b in zip(one, eight, strict=True):
        assert a["num_targets"] == b["num_targets"]
        for name in LOSSES:
            assert math.isclose(a[name], b[name], rel_tol=1e-6, abs_tol=1e-6), (name, a[name], b[name])


def test_what_the_loop_was_never_seen_to_train_with_is_refused(monkeypatch):
    with pytest.raises(ConfigError, match=r"accelerate chose MULTI_XPU, but .* `accelerate launch --multi_gpu`"):
        require_supported(DistributedType.MULTI_XPU)
    for name in ("DEEPSPEED", "MEGATRON_LM"):
        with monkeypatch.context() as patch:
            patch.setenv(f"ACCELERATE_USE_{name}", "true")
            with pytest.raises(ConfigError, match=f"the launcher asks for {name}, which clips .* --fsdp_version 2"):
                join_processes("cpu")
    require_supported(DistributedType.MULTI_CPU)
    with monkeypatch.context() as patch:
        patch.setenv("ACCELERATE_USE_PARALLELISM_CONFIG", "true")
        with pytest.raises(ConfigError, match=r"use_parallelism_config: .* leave it out"):
            join_processes("cpu")
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    with pytest.raises(ConfigError, match="accelerate shards on GPUs alone and chose MULTI_CPU"):
        require_supported(DistributedType.MULTI_CPU)
    require_supported(DistributedType.FSDP)
    for name, value, remedy in (
        ("VERSION", "1", "set fsdp_version: 2"),
        ("OFFLOAD_PARAMS", "true", "fsdp_offload_params: false"),
        ("ACTIVATION_CHECKPOINTING", "true", "train.gradient_checkpointing"),
        ("AUTO_WRAP_POLICY", "SIZE_BASED_WRAP", "TRANSFORMER_BASED_WRAP"),
    ):
        with monkeypatch.context() as patch:
            patch.setenv("FSDP_VERSION", "2")
            patch.setenv(f"FSDP_{name}", value)
            with pytest.raises(ConfigError, match=f"the launcher's fsdp_{name.lower()} {value}: .*{remedy}"):
                sharding_plugin(bf16=False)
