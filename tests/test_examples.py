"""The examples for trainers of one's own, each started as a user starts it; what they save is a plain model."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file

EXAMPLES = Path(__file__).parents[1] / "examples"
pytestmark = pytest.mark.slow


@pytest.mark.parametrize("command", ["own_loop.py", "trainer.py", "sft_trainer.py", "sft_trainer.py --lora"])
def test_example_trains_and_saves_a_plain_model(tmp_path, command):
    script, *options = command.split()
    done = subprocess.run(
        [sys.executable, str(EXAMPLES / script), *options, "--steps", "4", "--output", str(tmp_path)],
        capture_output=True,
        text=True,
        check=False,
        timeout=400,
        env=os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found = {}
    for name in ("lm_loss", "pre_loss"):
        found[name] = [float(value) for value in re.findall(rf"{name}'?:? '?(-?[0-9.]+)", done.stdout)]
        assert len(found[name]) == 4, done.stdout
        assert found[name][-1] < found[name][0], f"{name} does not fall: {found[name]}"
    weights = load_file(tmp_path / ("adapter_model.safetensors" if "--lora" in options else "model.safetensors"))
    assert weights and not any("predictor" in name for name in weights)
    if script != "own_loop.py":
        assert (tmp_path / "checkpoint-4" / "prebench_predictor.safetensors").is_file()
