"""FSDP2 as accelerate does it, on the CPU: the losses, weights and checkpoints of one process.

Only a GPU can show that accelerate chooses FSDP by itself, NCCL, bfloat16 at speed, and how much memory it saves.
"""

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
from safetensors.torch import load_file
from transformers import AutoModelForImageTextToText

from tests.data.tiny_conversations import good_records, write_records
from tests.train.fsdp import train_case

ROOT = Path(__file__).parents[2]
STAGE = {"batch_size": 8, "learning_rate": 1e-3, "gradient_accumulation_steps": 2}
RECIPE = {
    "align": STAGE | {"steps": 3},
    "instruct": STAGE | {"steps": 7},
    "log_every": 1,
    "device": "cpu",
    "dtype": "float32",
}
PRE = {"type": "predictive", "weight": 0.5}
LOSSES = ("lm_loss", "pre_loss", "grad_norm", "predictor_grad_norm", "anchor_drift")


def cases(data: Path) -> dict[str, dict[str, Any]]:
    """Return recipes that every way through the loop is part of."""
    short = RECIPE | {"align": STAGE | {"steps": 1}, "instruct": STAGE | {"steps": 3}}
    all_parts = {"trainable": ["vision_tower", "multi_modal_projector", "language_model"]}
    thawed = short | {"instruct": short["instruct"] | all_parts, "gradient_checkpointing": True}
    curves = {"validate_every": 2, "validation_images": 2}
    plain = {"recipe": RECIPE, "regularizer": PRE, "data": str(data)}
    return {
        "plain": plain,
        "resumed": plain | {"stops": [2, 5]},
        "frozen_copy": plain | {"recipe": thawed, "regularizer": PRE | {"anchor": "frozen_copy"}},
        "norm": {"recipe": short | curves, "regularizer": {"type": "norm_penalty", "weight": 0.1}, "data": None},
        "bf16": plain | {"recipe": short | {"dtype": "bfloat16"}},
    }


@pytest.fixture(scope="module")
def sharded(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, dict[str, Any]]]:
    """Train all cases in one launch of two processes."""
    folder = tmp_path_factory.mktemp("sharded")
    data = write_records(tmp_path_factory.mktemp("data"), good_records(24, every_text_only=2))
    chosen = cases(data)
    launch(folder, chosen, num_processes=2)
    return folder, chosen


def launch(folder: Path, chosen: dict[str, dict[str, Any]], num_processes: int) -> None:
    """Train cases in one launch, each in its own folder of `folder`."""
    (folder / "job.json").write_text(json.dumps(chosen))
    command = ["-m", "accelerate.commands.launch", "--config_file", str(ROOT / "examples/fsdp2.yaml")]
    script = [str(ROOT / "tests/train/fsdp.py"), str(folder / "job.json")]
    path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    subprocess.run(
        [sys.executable, *command, "--num_processes", str(num_processes), *script],
        check=True,
        timeout=400,
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": path},
    )


def log_of(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "train.jsonl").read_text().splitlines()]


pytestmark = pytest.mark.slow


def test_every_weight_is_spread_and_layers_are_units_of_their_own(sharded):
    folder, _ = sharded
    seen = json.loads((folder / "seen.json").read_text())
    assert len(seen) == 5 * 2 + 2
    for stage in seen:
        assert stage["kind"] == "FSDP" and stage["sharded"]
        assert 0.4 < stage["share"] < 0.6
        assert stage["units"] >= 1 + 4 + 2  # all, decoder layers, layers of the tower


@pytest.mark.parametrize("name", ["plain", "frozen_copy", "norm"])
def test_sharded_losses_are_those_of_one_process(sharded, tmp_path, name):
    folder, chosen = sharded
    two, one = log_of(folder / name), train_case(chosen[name], tmp_path)
    assert len(one) == len(two)
    for number, (a, b) in enumerate(zip(one, two, strict=True)):
        assert a.keys() == b.keys()
        for key in LOSSES:
            if a.get(key) is not None:
                assert math.isclose(a[key], b[key], abs_tol=1e-5, rel_tol=1e-5), (number, key, a[key], b[key])
    expected, found = (load_file(p / "model/model.safetensors") for p in (tmp_path, folder / name))
    assert expected.keys() == found.keys()
    for key, value in expected.items():
        torch.testing.assert_close(found[key], value, atol=1e-4, rtol=0)
    snapshot = load_file(folder / name / "snapshot/model.safetensors")  # written while the weights were sharded
    assert snapshot.keys() == found.keys() and all(torch.equal(snapshot[key], value) for key, value in found.items())
    model = AutoModelForImageTextToText.from_pretrained(folder / name / "model")
    assert type(model).__name__ == "LlavaForConditionalGeneration"


def test_a_sharded_run_that_goes_on_ends_with_the_same_bytes(sharded):
    folder, _ = sharded
    names = ("batch_hash", "lm_loss", "pre_loss", "grad_norm", "predictor_grad_norm", "anchor_drift", "learning_rate")
    plain, resumed = ([[line[n] for n in names] for line in log_of(folder / case)] for case in ("plain", "resumed"))
    assert plain == resumed
    weights = [(folder / case / "model/model.safetensors").read_bytes() for case in ("plain", "resumed")]
    assert weights[0] == weights[1]


def test_sharded_bfloat16_stays_close_to_float32(sharded, tmp_path):
    folder, chosen = sharded
    case = chosen["bf16"] | {"recipe": chosen["bf16"]["recipe"] | {"dtype": "float32"}}
    for a, b in zip(train_case(case, tmp_path), log_of(folder / "bf16"), strict=True):
        assert math.isclose(a["lm_loss"], b["lm_loss"], rel_tol=0.02)
        assert math.isclose(a["grad_norm"], b["grad_norm"], rel_tol=0.2)
        assert a["lm_loss"] != b["lm_loss"]
