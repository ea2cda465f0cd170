"""Snapshots of a run: where they were asked for, whole models, and without any effect on the run itself."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForImageTextToText

from prebench.errors import ConfigError
from prebench.model.builder import build_model
from prebench.pipeline import is_trained
from prebench.schema import PredictiveConfig, StudyConfig
from prebench.store import read_json
from prebench.study import Run, runs, snapshots
from prebench.train.loop import build_regularizer, train
from prebench.train_runs import train_run
from tests.analysis.conftest import study_config
from tests.conftest import TINY
from tests.train.conftest import RECIPE


def tiny_study(shares: tuple[float, ...]) -> StudyConfig:
    """A study of one regularised run of the tiny model: 2 align and 4 instruct steps."""
    config = study_config(["pre"], [0]).model_dump(mode="json")
    config["preset"] |= {"model": TINY.model_dump(mode="json"), "train": RECIPE | {"snapshots": shares}}
    return StudyConfig.model_validate(config)


def trained(folder: Path, inputs: Any, *shares: float) -> tuple[Run, StudyConfig]:
    config = tiny_study(shares)
    run = runs(folder, config)[0]
    train_run(run, config, inputs, lambda done, note: None)
    return run, config


def test_the_run_is_the_same_byte_for_byte_with_and_without(tmp_path, inputs):
    plain, config = trained(tmp_path / "plain", inputs)
    watched, same = trained(tmp_path / "watched", inputs, 0.25, 0.5, 0.9)
    assert snapshots(plain, config) == [] and not (plain.folder / "snapshots").exists()
    names = {path.name for path in plain.model_dir.iterdir()}
    assert names == {path.name for path in watched.model_dir.iterdir()} and "model.safetensors" in names
    for name in names - {"prebench.json"}:  # which holds the seconds of the training
        assert (plain.model_dir / name).read_bytes() == (watched.model_dir / name).read_bytes(), name
    hashes = [read_json(run.model_dir / "prebench.json")["config_hash"] for run in (plain, watched)]
    assert hashes[0] == hashes[1], "snapshots decide no weight"
    assert is_trained(watched, same)


def test_a_snapshot_is_the_model_of_its_step(tmp_path, inputs):
    run, config = trained(tmp_path, inputs, 0.5, 0.25)
    found = snapshots(run, config)
    assert [(s.step, s.folder.name, s.name) for s in found] == [
        (1, "step-1", "pre-s0 after step 1"),
        (2, "step-2", "pre-s0 after step 2"),
    ]
    assert all(is_trained(snapshot, config) for snapshot in found)
    assert [read_json(s.model_dir / "prebench.json")["step"] for s in found] == [1, 2]

    states: dict[int, dict[str, torch.Tensor]] = {}
    model = build_model(TINY, inputs.processor.tokenizer, 0)
    term = build_regularizer(PredictiveConfig(weight=0.5), model, 0)

    def note(stage: str, done: int) -> None:
        if stage == "instruct":
            states[done] = {name: value.clone() for name, value in model.state_dict().items()}

    train(model, term, config.preset.train, inputs, 0, lambda line: None, after_step=note)
    for snapshot in found:
        loaded = AutoModelForImageTextToText.from_pretrained(snapshot.model_dir).state_dict()
        assert loaded.keys() == states[snapshot.step].keys()
        assert all(torch.equal(value, states[snapshot.step][name]) for name, value in loaded.items())
    assert not all(torch.equal(value, states[1][name]) for name, value in states[2].items())


def test_steps_follow_from_shares_and_never_name_the_end():
    recipe = tiny_study((0.5, 0.49, 0.9, 0.01)).preset.train
    assert recipe.snapshot_steps == (1, 2)  # 0.9 of 4 steps is the end: the model itself
    for wrong in (0.0, 1.0, 25):
        with pytest.raises(ValueError, match="snapshots"):
            tiny_study((wrong,))


def test_the_command_line_takes_a_list_and_refuses_what_is_none():
    from prebench.config import load_preset

    assert load_preset("smoke", ["train.snapshots=[0.25, 0.5]"]).train.snapshot_steps == (6, 12)
    with pytest.raises(ConfigError, match=r"train\.snapshots"):
        load_preset("smoke", ["train.snapshots=25%"])
    with pytest.raises(ConfigError, match=r"train\.snapshots\.0"):
        load_preset("smoke", ["train.snapshots=[25]"])
