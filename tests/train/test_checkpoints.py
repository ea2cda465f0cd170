"""A run that was stopped anywhere ends with the bytes of the undisturbed one; what is damaged is found and said."""

from __future__ import annotations

import errno
import json
import math
import random
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from prebench.errors import InterruptedRunError, StoreError, TrainingError
from prebench.model.builder import build_model
from prebench.schema import NormPenaltyConfig, PredictiveConfig, TrainConfig
from prebench.train import checkpoint, stage
from prebench.train.checkpoint import Checkpoints
from prebench.train.log import RunLog
from prebench.train.loop import build_regularizer, train
from prebench.train.random_state import random_state, restore_random_state
from tests.conftest import TINY
from tests.train.conftest import RECIPE

PRE = PredictiveConfig(weight=0.5)
SLOW = pytest.mark.slow
EVERY_TYPE = [
    pytest.param(None, marks=SLOW),
    PredictiveConfig(weight=0.5, anchor="frozen_copy"),
    pytest.param(PRE, marks=SLOW),
    pytest.param(PredictiveConfig(weight=0.5, anchor="pre_projector", level="global"), marks=SLOW),
    pytest.param(PredictiveConfig(weight=0.0, anchor="shuffled"), marks=SLOW),
    pytest.param(NormPenaltyConfig(weight=0.5), marks=SLOW),
]
STEPS = RECIPE["align"]["steps"] + RECIPE["instruct"]["steps"]


class Killed(BaseException):
    """Nothing in the training code catches it."""


class Trial:
    """Training of the tiny model in a folder; as often as one likes."""

    def __init__(self, folder: Path, inputs: Any, regularizer: Any = PRE, **changes: Any) -> None:
        self.folder = folder
        self.inputs = inputs
        self.regularizer = regularizer
        self.config = TrainConfig.model_validate({**RECIPE, "checkpoint_every": 1, **changes})

    def run(self, kill_at: int | None = None, stop_at: int | None = None, **key: Any) -> Any:
        """Train; die while the log line of a step is written, or be asked to stop in a step (over both stages)."""
        model = build_model(TINY, self.inputs.processor.tokenizer, 0)
        term = build_regularizer(self.regularizer, model, 0)
        log = RunLog(self.folder / "train.jsonl")
        checkpoints = Checkpoints(self.folder / "checkpoints", {"config_hash": "c", **key}, log)
        asked = []

        def write(line: dict[str, Any]) -> None:
            step = line["step"] + (0 if line["stage"] == "align" else self.config.align.steps)
            if step == kill_at:
                raise Killed
            log.write(line)

        def stop() -> bool:
            asked.append(True)
            return stop_at is not None and len(asked) > stop_at

        try:
            train(model, term, self.config, self.inputs, 0, write, checkpoints, stop)
        finally:
            log.close()
        return model

    def lines(self) -> list[dict[str, Any]]:
        found = [json.loads(line) for line in (self.folder / "train.jsonl").read_text().splitlines()]
        return [{name: value for name, value in line.items() if name != "seconds"} for line in found]

    def saved(self) -> list[str]:
        return sorted(path.name for path in (self.folder / "checkpoints").iterdir())


def assert_equal(one: Any, other: Any) -> None:
    for name, tensor in one.state_dict().items():
        assert torch.equal(tensor, other.state_dict()[name]), name


@pytest.mark.parametrize("regularizer", EVERY_TYPE, ids=repr)
def test_a_run_killed_in_both_stages_ends_as_the_undisturbed_one(tmp_path, inputs, run_training, regularizer):
    plain, lines = run_training(regularizer)
    trial = Trial(tmp_path, inputs, regularizer)
    for step in (1, 2, 4):
        with pytest.raises(Killed):
            trial.run(kill_at=step)
    assert_equal(trial.run(), plain)
    assert [{k: v for k, v in line.items() if k != "seconds"} for line in lines] == trial.lines()
    assert [(line["stage"], line["step"]) for line in trial.lines()] == [("align", i) for i in range(2)] + [
        ("instruct", i) for i in range(4)
    ]


@pytest.mark.slow
def test_accumulation_validation_and_a_trained_tower_go_on_exactly(tmp_path, inputs):
    everything = ["vision_tower", "multi_modal_projector", "language_model"]
    changes = {
        "instruct": RECIPE["instruct"]
        | {"gradient_accumulation_steps": 2, "trainable": everything, "weight_decay": 0.1},
        "validate_every": 2,
        "validation_images": 2,
        "checkpoint_every": 2,
    }
    plain = Trial(tmp_path / "plain", inputs, **changes)
    trial = Trial(tmp_path / "killed", inputs, **changes)
    expected = plain.run()
    for step in (3, 5):
        with pytest.raises(Killed):
            trial.run(kill_at=step)
    assert_equal(trial.run(), expected)
    assert trial.lines() == plain.lines()
    assert sum(line.get("kind") == "validation" for line in trial.lines()) == 3


def test_being_asked_to_stop_saves_this_step_and_says_so(tmp_path, inputs, run_training):
    trial = Trial(tmp_path, inputs, checkpoint_every=0)
    with pytest.raises(InterruptedRunError, match=r"interrupted after step 4 of 6, which is saved; the same command"):
        trial.run(stop_at=3)
    assert trial.saved() == ["step-00000004"] and len(trial.lines()) == 4
    plain, _ = run_training(PRE)
    assert_equal(trial.run(), plain)
    assert InterruptedRunError.exit_code not in (0, 2)


def test_two_checkpoints_are_kept_and_none_is_made_after_the_last_step(tmp_path, inputs):
    trial = Trial(tmp_path, inputs)
    trial.run()
    assert trial.saved() == ["step-00000004", "step-00000005"]
    names = {path.name for path in (tmp_path / "checkpoints" / "step-00000005").iterdir()}
    assert all(name.endswith((".safetensors", ".json")) for name in names), "no pickle"


FILES = ["weights", "model_optimizer", "predictor_optimizer", "stage_start", "random_state_0", "checkpoint"]


@pytest.mark.parametrize("name", [pytest.param(n, marks=[SLOW] if n != "weights" else []) for n in FILES])
def test_a_flipped_byte_is_found_and_the_checkpoint_before_is_taken(tmp_path, inputs, run_training, name, capsys):
    trial = Trial(tmp_path, inputs)
    with pytest.raises(Killed):
        trial.run(kill_at=4)
    assert trial.saved() == ["step-00000003", "step-00000004"]
    [path] = (tmp_path / "checkpoints" / "step-00000004").glob(f"{name}.*")
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(bytes(content))
    with pytest.raises(Killed):
        trial.run(kill_at=3)
    said = capsys.readouterr().err
    assert "WARNING" in said and "step-00000004: damaged checkpoint" in said and "goes on after step 3" in said
    plain, _ = run_training(PRE)
    assert_equal(trial.run(), plain)
    assert len(trial.lines()) == STEPS


@pytest.mark.slow
def test_where_no_checkpoint_is_intact_the_run_starts_again_loudly(tmp_path, inputs, run_training, capsys):
    trial = Trial(tmp_path, inputs)
    with pytest.raises(Killed):
        trial.run(kill_at=4)
    for path in (tmp_path / "checkpoints").glob("*/weights.safetensors"):
        path.write_bytes(path.read_bytes()[:-1])
    plain, _ = run_training(PRE)
    assert_equal(trial.run(), plain)
    assert "no intact checkpoint; the run starts again" in capsys.readouterr().err
    assert len(trial.lines()) == STEPS


def test_a_full_disk_leaves_the_checkpoint_before_and_says_so_in_one_line(tmp_path, inputs, run_training, monkeypatch):
    trial = Trial(tmp_path, inputs)
    save = checkpoint.save_file
    calls = []

    def full(tensors: Any, path: Path) -> None:
        calls.append(path)
        if len(calls) > 14:  # in the middle of the third checkpoint
            path.write_bytes(b"half")
            raise OSError(errno.ENOSPC, "No space left on device")
        save(tensors, path)

    monkeypatch.setattr(checkpoint, "save_file", full)
    with pytest.raises(
        StoreError, match=r"step 3 can't be written \(No space left on device\); kept: step-00000002; mak"
    ):
        trial.run()
    assert trial.saved() == ["step-00000001", "step-00000002"]
    monkeypatch.undo()
    plain, _ = run_training(PRE)
    assert_equal(trial.run(), plain)


def opened(folder: Path) -> Checkpoints:
    """Return the checkpoints of a run whose log has one line."""
    log = RunLog(folder / "train.jsonl")
    checkpoints = Checkpoints(folder / "checkpoints", {}, log)
    checkpoints.open()
    log.write({"step": 0})
    return checkpoints


def test_a_checkpoint_holds_its_step_whatever_changes_while_it_is_written(tmp_path, monkeypatch):
    save, may_write = checkpoint.save_file, threading.Event()
    monkeypatch.setattr(checkpoint, "save_file", lambda *args: (may_write.wait(), save(*args)))
    checkpoints = opened(tmp_path)
    weights, state = torch.zeros(3), {"rates": [0.5]}
    checkpoints.save(1, {"weights": {"w": weights}}, state)
    weights += 1  # training goes on
    state["rates"][0] = 0.25
    position = checkpoints.log.position()
    checkpoints.log.write({"step": 1})
    assert not list((tmp_path / "checkpoints").glob("step-*"))
    may_write.set()
    checkpoints.wait()
    found = checkpoints.read(1)
    assert found.tensors["weights"]["w"].tolist() == [0, 0, 0]
    assert (found.state["rates"], found.state["log_bytes"]) == ([0.5], position)


def test_checkpoints_are_written_one_after_the_other(tmp_path, monkeypatch):
    save, writing, most = checkpoint.save_file, [], []

    def slow(*args: Any) -> None:
        writing.append(True)
        most.append(len(writing))
        time.sleep(0.02)
        save(*args)
        writing.pop()

    monkeypatch.setattr(checkpoint, "save_file", slow)
    checkpoints = opened(tmp_path)
    for step in (1, 2, 3):
        checkpoints.save(step, {"weights": {"w": torch.full((2,), float(step))}}, {})
        saved = [path.name for path in (tmp_path / "checkpoints").glob("step-*")]
        assert step == 1 or f"step-{step - 1:08d}" in saved, "the one before is not on the disk"
    checkpoints.close()
    assert most == [1, 1, 1]
    assert [path.name for path in sorted((tmp_path / "checkpoints").iterdir())] == ["step-00000002", "step-00000003"]


def test_a_step_that_a_stopped_process_can_not_save_is_not_called_saved(tmp_path, inputs, monkeypatch):
    def full(_tensors: Any, _path: Path) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(checkpoint, "save_file", full)
    trial = Trial(tmp_path, inputs, checkpoint_every=0)
    with pytest.raises(StoreError, match=r"step 4 can't be written \(No space left on device\); kept: none before it"):
        trial.run(stop_at=3)


def test_plain_values_that_were_edited_are_found(tmp_path, capsys):
    checkpoints = opened(tmp_path)
    for step in (1, 2):
        checkpoints.save(step, {"weights": {"w": torch.ones(2)}}, {"step": step})
    checkpoints.close()
    path = tmp_path / "checkpoints" / "step-00000002" / "checkpoint.json"
    path.write_text(path.read_text().replace('"step": 2', '"step": 7'))
    assert Checkpoints(tmp_path / "checkpoints", {}, RunLog(tmp_path / "train.jsonl")).open() == 1
    assert "checkpoint.json differs from its hash" in capsys.readouterr().err


def test_a_checkpoint_with_more_log_than_there_is_is_not_taken(tmp_path, capsys):
    checkpoints = opened(tmp_path)
    for step in (1, 2):
        checkpoints.save(step, {"weights": {"w": torch.ones(2)}}, {})
        checkpoints.log.write({"step": step})
    checkpoints.close()
    path = tmp_path / "train.jsonl"
    path.write_text(path.read_text().splitlines(keepends=True)[0])
    assert Checkpoints(tmp_path / "checkpoints", {}, RunLog(path)).open() == 1
    assert "train.jsonl is shorter than when it was made" in capsys.readouterr().err


def test_the_time_of_earlier_processes_counts_without_the_steps_that_were_lost(tmp_path, monkeypatch):
    now = [100.0]
    monkeypatch.setattr(checkpoint, "time", SimpleNamespace(perf_counter=lambda: now[0]))
    checkpoints = opened(tmp_path)
    now[0] += 30
    checkpoints.save(1, {"weights": {"w": torch.ones(2)}}, {})
    now[0] += 7  # lost
    checkpoints.close()
    again = Checkpoints(tmp_path / "checkpoints", {}, RunLog(tmp_path / "train.jsonl"))
    assert again.open() == 1
    now[0] += 5
    assert again.seconds == 35


KILLED_IN_WRITING = """
import os, sys
from pathlib import Path
import torch
from prebench.train import checkpoint
from prebench.train.log import RunLog

log = RunLog(Path(sys.argv[1]) / "train.jsonl")
checkpoints = checkpoint.Checkpoints(Path(sys.argv[1]) / "checkpoints", {}, log)
checkpoints.open()
for step in (1, 2):
    log.write({"step": step})
    checkpoints.save(step, {"weights": {"w": torch.full((9,), float(step))}, "rest": {"w": torch.ones(1)}}, {})
    checkpoints.wait()
save = checkpoint.save_file

def half(tensors, path):
    save(tensors, path)
    os.kill(os.getpid(), 9)

checkpoint.save_file = half
checkpoints.save(3, {"weights": {"w": torch.zeros(9)}, "rest": {"w": torch.ones(1)}}, {})
checkpoints.wait()
"""


@pytest.mark.slow
def test_a_process_killed_while_it_writes_leaves_the_checkpoints_before(tmp_path):
    done = subprocess.run([sys.executable, "-c", KILLED_IN_WRITING, str(tmp_path)], check=False, timeout=300)
    assert done.returncode == -signal.SIGKILL
    assert len(list((tmp_path / "checkpoints").glob(f"{checkpoint.UNFINISHED}*"))) == 1
    checkpoints = Checkpoints(tmp_path / "checkpoints", {}, RunLog(tmp_path / "train.jsonl"))
    assert checkpoints.open() == 2
    assert checkpoints.read(2).tensors["weights"]["w"].tolist() == [2.0] * 9
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == ["step-00000001", "step-00000002"]


@pytest.mark.slow
def test_a_checkpoint_of_another_run_is_refused(tmp_path, inputs):
    trial = Trial(tmp_path, inputs)
    with pytest.raises(Killed):
        trial.run(kill_at=4, processes=1)
    with pytest.raises(StoreError, match=r"step-00000004: made with processes 1, but here it is 2: .* or delete"):
        trial.run(processes=2)
    assert trial.saved() == ["step-00000003", "step-00000004"]


@pytest.mark.slow
def test_halves_that_a_kill_left_behind_are_removed(tmp_path, inputs, run_training):
    trial = Trial(tmp_path, inputs)
    with pytest.raises(Killed):
        trial.run(kill_at=4)
    (tmp_path / "checkpoints" / f"{checkpoint.UNFINISHED}x").mkdir()
    with (tmp_path / "train.jsonl").open("a") as log:
        log.write('{"stage": "inst')
    plain, _ = run_training(PRE)
    assert_equal(trial.run(), plain)
    assert trial.saved() == ["step-00000004", "step-00000005"] and len(trial.lines()) == STEPS


def test_a_loss_that_is_not_finite_names_the_step_and_the_examples_and_moves_nothing(inputs, monkeypatch):
    changes = {"instruct": RECIPE["instruct"] | {"gradient_accumulation_steps": 2}}
    config = TrainConfig.model_validate({**RECIPE, **changes})
    model = build_model(TINY, inputs.processor.tokenizer, 0)
    forward, calls, seen = stage.Objective.forward, [], {}

    def broken(self: Any, batch: Any) -> Any:
        calls.append(batch)
        term = forward(self, batch)
        if len(calls) != 6:  # the second half of instruct step 1
            return term
        seen.update({name: p.detach().clone() for name, p in model.named_parameters()})
        return stage.LossTerms(term.lm_sum * math.nan, term.pre_sum, term.anchor)

    monkeypatch.setattr(stage.Objective, "forward", broken)
    with pytest.raises(TrainingError) as caught:
        train(model, build_regularizer(PRE, model, 0), config, inputs, 0, lambda line: None)
    text = str(caught.value)
    assert text.startswith("instruct step 1: lm_loss is nan; stopped before the optimiser's step")
    assert calls[5].hash in text and all(image in text for image in calls[5].image_ids)
    assert calls[4].hash not in text
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, seen[name]), name


def test_random_states_come_back():
    random.gauss(0, 1)
    np.random.standard_normal()
    device = torch.device("cpu")
    state = random_state(device)

    def draw() -> list[float]:
        python = [random.gauss(0, 1), random.random()]  # noqa: S311
        return [*python, *np.random.standard_normal(3), *torch.rand(3).tolist()]

    first = draw()
    restore_random_state(state, device)
    assert draw() == first
