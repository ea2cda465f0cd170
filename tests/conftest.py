"""Shared fixtures: a tiny random LLaVA with the real classes, exported as a plain Hugging Face folder."""

from __future__ import annotations

import fcntl
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, settings

from prebench.model.builder import build_model, build_processor
from prebench.model.tokenizer import train_tokenizer
from prebench.schema import ModelConfig
from prebench.store import write_json
from tests.tiny_study import ALONE, call, run_command

# Deterministic, and no time limits on a shared machine.
settings.register_profile("prebench", derandomize=True, deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("prebench")

LONGEST = (
    "train/test_survival.py",
    "test_repetition.py",
    "test_bad_input.py",
    "test_end_to_end.py",
    "test_ablation.py",
    "test_cluster.py",
    "test_offline.py",
    "evaluation/test_processes.py",
    "evaluation/test_kill.py",
    "test_training_files.py",
    "test_examples.py",
    "train/test_sharding.py",
    "train/test_own_regularizer.py",
)
"""Files whose tests take a minute or more: with them first, no worker is left with one of them in the end."""

WORDS = ["is there a red circle?", "what color is the circle?", "yes no red blue circle square", "describe the image."]
TINY = ModelConfig.model_validate(
    {
        "vision_tower": {
            "pretrained": None,
            "hidden_size": 32,
            "num_hidden_layers": 2,
            "intermediate_size": 64,
            "image_size": 64,
            "patch_size": 8,
        },
        "language_model": {"hidden_size": 32, "num_hidden_layers": 4, "intermediate_size": 64},
    }
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Put the longest files first; xdist hands files out in this order."""
    here = Path(__file__).parent
    rank = {here / name: number for number, name in enumerate(LONGEST)}
    items.sort(key=lambda item: rank.get(item.path, len(LONGEST)))


@pytest.fixture(autouse=True, scope="session")
def _two_threads() -> None:
    torch.set_num_threads(min(2, torch.get_num_threads()))


@pytest.fixture(autouse=True)
def _denormals() -> None:
    """Undo what training in the same process left behind: hypothesis refuses floats without subnormal numbers."""
    torch.set_flush_denormal(False)


@pytest.fixture(scope="session")
def tiny_tokenizer():
    return train_tokenizer(WORDS * 20, vocab_size=320)


@pytest.fixture(scope="session")
def tiny_export(tmp_path_factory: pytest.TempPathFactory, tiny_tokenizer) -> Path:
    """A tiny random model as `prebench export` would leave it (4 decoder layers, 64 visual tokens)."""
    folder = tmp_path_factory.mktemp("export") / "model"
    build_model(TINY, tiny_tokenizer, seed=0).save_pretrained(folder)
    build_processor(TINY.vision_tower, tiny_tokenizer).save_pretrained(folder)
    manifest = {
        "variant": "pre",
        "seed": 0,
        "num_layers": 4,
        "regularizer_layer": 2,
        "config_hash": "c",
        "weights_hash": "w",
        "parts_hash": "p",
        "dtype": "float32",
    }
    write_json(folder / "prebench.json", manifest)
    return folder


@pytest.fixture(scope="session")
def tiny_results(tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> Path:
    """The results of a finished tiny study, made by one worker of the test run for all: copy it to change it."""
    base = tmp_path_factory.getbasetemp()
    folder = (base.parent if hasattr(request.config, "workerinput") else base) / "tiny-results"
    finished = folder / "finished"
    with folder.with_suffix(".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not finished.exists():
            done = call(run_command(folder, *ALONE))
            assert done.returncode == 0, done.stderr[-3000:]
            finished.touch()
    return folder
