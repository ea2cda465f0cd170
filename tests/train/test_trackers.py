"""Training curves in trackers: the numbers of train.jsonl, by accelerate's own classes, and never a part of a run."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest
from accelerate import PartialState
from click.testing import CliRunner

from prebench.cli import main
from prebench.errors import ConfigError
from prebench.schema import StageConfig, TrainConfig
from prebench.train import trackers
from prebench.train.trackers import VARIABLE, chosen_trackers, tracked

STAGE = {"steps": 3, "batch_size": 4, "learning_rate": 0.01}
RECIPE = TrainConfig(align=StageConfig(**STAGE), instruct=StageConfig(**STAGE))
LINES = [
    {"stage": "align", "step": 0, "lm_loss": 3.5, "pre_loss": None, "batch_hash": "a", "seconds": 0.25},
    {"stage": "instruct", "step": 1, "lm_loss": 2.5, "pre_loss": -0.5, "batch_hash": "b", "seconds": 0.5},
    {"kind": "validation", "stage": "instruct", "step": 2, "lm_loss": 2.0, "accuracy": {"color": 0.75}, "n": 8},
]


def follow(folder: Path) -> list[dict[str, object]]:
    seen: list[dict[str, object]] = []
    PartialState(cpu=True)  # accelerate's trackers ask for it; a training has it from its Accelerator
    with tracked(seen.append, folder, RECIPE) as log:
        for line in LINES:
            log(dict(line))
    return seen


@pytest.fixture
def run_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name in (VARIABLE, "WANDB_MODE", "TRACKIO_DIR"):
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    folder = tmp_path / "study" / "runs" / "pre-s0"
    folder.mkdir(parents=True)
    return folder


def test_without_a_tracker_nothing_is_written(run_folder):
    assert follow(run_folder) == LINES
    assert not list(run_folder.iterdir())


def test_tensorboard_holds_the_numbers_of_the_log(run_folder, monkeypatch):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    monkeypatch.setenv(VARIABLE, "tensorboard")
    assert follow(run_folder) == LINES
    events = EventAccumulator(str(run_folder / "tensorboard")).Reload()
    found = {tag: [(e.step, e.value) for e in events.Scalars(tag)] for tag in events.Tags()["scalars"]}
    assert found == {
        "train/lm_loss": [(1, 3.5), (5, 2.5)],
        "train/pre_loss": [(5, -0.5)],
        "train/seconds": [(1, 0.25), (5, 0.5)],
        "validation/lm_loss": [(6, 2.0)],
        "validation/accuracy/color": [(6, 0.75)],
        "validation/n": [(6, 8.0)],
    }


@pytest.mark.slow
def test_wandb_writes_offline_below_the_run(run_folder, monkeypatch):
    monkeypatch.setenv(VARIABLE, "wandb")
    assert follow(run_folder) == LINES
    (recorded,) = (run_folder / "wandb").glob("offline-run-*/run-*.wandb")
    content = recorded.read_bytes()
    assert b"train/lm_loss" in content and b"validation/accuracy/color" in content


def test_a_missing_package_is_one_line_with_the_command(run_folder, monkeypatch):
    found = importlib.util.find_spec
    monkeypatch.setattr(trackers.importlib.util, "find_spec", lambda name: None if name == "trackio" else found(name))
    monkeypatch.setenv(VARIABLE, "tensorboard,trackio")
    with pytest.raises(ConfigError, match=r"--tracker trackio: .* pip install trackio"):
        chosen_trackers()
    monkeypatch.setenv(VARIABLE, "tensorbord")
    with pytest.raises(ConfigError, match="did you mean 'tensorboard'"):
        chosen_trackers()


def test_the_command_passes_the_choice_on_and_no_configuration_holds_it(tmp_path, monkeypatch):
    monkeypatch.setenv(VARIABLE, "")
    arguments = ["run", "--suite", "smoke", "--tracker", "wandb", "--results", str(tmp_path), "--dry-run"]
    result = CliRunner().invoke(main, arguments)
    assert result.exit_code == 0, result.output
    assert chosen_trackers() == ("wandb",)
    assert "tracker" not in json.dumps(TrainConfig.model_json_schema())
