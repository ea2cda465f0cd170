"""A regularizer of an installed package: checked, trained, stopped and gone on with, compared and refused like ours."""

from __future__ import annotations

import math
import os
import sys
from pathlib import Path

import pytest
import torch

from prebench.config import dump_yaml, load_preset, load_suite, load_variant, read_yaml, validate
from prebench.errors import ConfigError, TrainingError
from prebench.model.builder import build_model
from prebench.model.visual_states import VisualStates
from prebench.records import content_hash
from prebench.schema import RegularizerConfig, StudyConfig
from prebench.store import read_json
from prebench.train.loop import build_regularizer
from tests.conftest import TINY
from tests.own_package import EXAMPLE, declare, install_example
from tests.tiny_study import assert_refused, call, command, finished, run_command
from tests.train.test_checkpoints import Killed, Trial, assert_equal

BROKEN = """
import torch
from prebench.schema import RegularizerConfig
from prebench.train.regularizers.base import Regularizer


class NoConfig(Regularizer):
    pass


class NoRegularizer:
    config_class = RegularizerConfig


class Unlearned(Regularizer):
    config_class = RegularizerConfig

    def __init__(self, config, *, depth):
        super().__init__(config, depth=depth)
        self.scale = torch.nn.Parameter(torch.ones(1))


class PerImage(Regularizer):
    config_class = RegularizerConfig

    def loss(self, states, vision_features, image_of_token, image_ids):
        return vision_features.sum((1, 2))


class Undetached(Regularizer):
    config_class = RegularizerConfig

    def loss(self, states, vision_features, image_of_token, image_ids):
        return states.at(0).square().sum() + states.hidden(2).square().sum()
"""
BROKEN_TYPES = {
    "gone": "no_such_module:Class",
    "gone_class": "broken:Missing",
    "no_config": "broken:NoConfig",
    "no_regularizer": "broken:NoRegularizer",
    "unlearned": "broken:Unlearned",
    "per_image": "broken:PerImage",
    "undetached": "broken:Undetached",
    "predictive": "broken:PerImage",
}


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = install_example(tmp_path / "site")
    monkeypatch.syspath_prepend(folder)
    return folder


@pytest.fixture
def broken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = declare(tmp_path / "broken", "broken-package", BROKEN_TYPES)
    (folder / "broken.py").write_text(BROKEN)
    monkeypatch.syspath_prepend(folder)
    yield
    sys.modules.pop("broken", None)


def variant(folder: Path, text: str) -> Path:
    path = folder / "v.yaml"
    path.write_text(text)
    return path


def block(weight: float, **more: object) -> RegularizerConfig:
    found = load_variant(str(EXAMPLE / "relations.yaml")).regularizer
    assert found is not None
    return type(found).model_validate(found.model_dump() | {"weight": weight, **more})


def test_its_fields_are_part_of_the_resolved_configuration(package, tmp_path):
    chosen = load_variant(str(EXAMPLE / "relations.yaml"))
    values = {"name": "s", "preset": load_preset("smoke"), "suite": load_suite("smoke"), "seeds": (0,)}
    study = validate(StudyConfig, values | {"variants": (load_variant("baseline"), chosen)}, "study")
    (tmp_path / "study.yaml").write_text(dump_yaml(study))
    again = validate(StudyConfig, read_yaml(tmp_path / "study.yaml"), "study.yaml")
    assert again == study and hash(again) == hash(study)
    assert study.run_config("relations", 0)["regularizer"] == {
        "type": "patch_relations",
        "weight": 0.5,
        "layer": "half",
        "learning_rate": 1e-3,
        "max_grad_norm": 1.0,
        "rank": 16,
    }
    other = validate(
        StudyConfig, values | {"variants": (chosen.model_copy(update={"regularizer": block(0.5, rank=8)}),)}, "s"
    )
    assert content_hash(other.run_config("relations", 0)) != content_hash(study.run_config("relations", 0))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{type: patch_relations, rnak: 3}", "unknown key 'regularizer.rnak' (did you mean 'rank'?"),
        ("{type: patch_relations, rank: 0}", "regularizer.rank: Input should be greater than 0 (got 0)"),
        ("{type: patch_relations, weight: -1}", "regularizer.weight: Input should be greater than or equal to 0"),
        ("{type: patch_relations, weight: .inf}", "regularizer.weight: Input should be a finite number"),
        ("{type: patch_relations, layer: middle}", "regularizer.layer: write quarter, half, three_quarters, last"),
        ("{type: patch_relation}", "unknown type 'patch_relation'; known: predictive, norm_penalty, patch_relations;"),
        ("{type: patch_relations:PatchRelations}", "unknown type 'patch_relations:PatchRelations'; known: "),
        ("{type: [a]}", "unknown type ['a']; known: "),
    ],
)
def test_impossible_blocks_are_refused_in_one_line(package, tmp_path, text, message):
    path = variant(tmp_path, f"regularizer: {text}")
    with pytest.raises(ConfigError) as caught:
        load_variant(str(path))
    assert str(caught.value).startswith(f"{path}: ") and message in str(caught.value)


def test_fields_of_a_predictor_that_were_inherited_are_named(package, tmp_path):
    path = variant(tmp_path, "extends: baseline\nregularizer: {type: patch_relations}")
    with pytest.raises(ConfigError, match="regularizer: anchor, level: no meaning for type patch_relations; leave"):
        load_variant(str(path))


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("gone", r"type 'gone': no_such_module:Class of broken-package 0\.1\.0 can't be imported \(No module named"),
        ("gone_class", r"broken:Missing of broken-package 0\.1\.0 can't be imported"),
        ("no_config", r"broken:NoConfig of broken-package 0\.1\.0 needs a class attribute config_class, derived from"),
    ],
)
def test_a_package_that_is_not_as_it_should_be_is_named(broken, tmp_path, kind, message):
    with pytest.raises(ConfigError, match=message):
        load_variant(str(variant(tmp_path, f"regularizer: {{type: {kind}}}")))


def test_a_type_that_two_packages_declare_is_refused(package, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(declare(tmp_path / "second", "other-relations", {"patch_relations": "a:B"}, "2.0"))
    with pytest.raises(ConfigError, match=r"declared by other-relations 2\.0 and by patch-relations 0\.1\.0: uninst"):
        load_variant(str(EXAMPLE / "relations.yaml"))


def test_own_types_of_prebench_can_not_be_replaced(broken):
    assert type(load_variant("pre").regularizer).__name__ == "PredictiveConfig"


def test_classes_that_can_not_train_are_refused(broken, inputs, run_training):
    model = build_model(TINY, inputs.processor.tokenizer, 0)
    with pytest.raises(ConfigError, match=r"broken:NoRegularizer of broken-package 0\.1\.0 is no class derived from"):
        build_regularizer(RegularizerConfig(type="no_regularizer"), model, 0)
    with pytest.raises(ConfigError, match="Unlearned has parameters, so its config_class must derive from"):
        run_training(RegularizerConfig(type="unlearned", weight=0.5))
    with pytest.raises(TrainingError, match=r"PerImage.loss: a scalar is expected, the sum over images; got \[4\]"):
        run_training(RegularizerConfig(type="per_image", weight=0.5))


def test_weight_zero_equals_no_regularizer_and_another_weight_is_felt(package, run_training):
    plain, plain_log = run_training(None)
    zero, zero_log = run_training(block(0.0))
    felt, felt_log = run_training(block(0.5))
    assert_equal(plain, zero)
    for a, b in zip(plain_log, zero_log, strict=True):
        assert (a["lm_loss"], a["grad_norm"], a["batch_hash"]) == (b["lm_loss"], b["grad_norm"], b["batch_hash"])
    assert felt_log[0]["pre_loss"] == zero_log[0]["pre_loss"] > 0
    assert all(line["predictor_grad_norm"] > 0 for line in zero_log + felt_log)
    assert any(not torch.equal(p, dict(plain.named_parameters())[name]) for name, p in felt.named_parameters())


def test_weight_zero_is_kept_whatever_the_loss_reads(broken, run_training):
    plain, plain_log = run_training(None)
    zero, zero_log = run_training(RegularizerConfig(type="undetached"))
    assert_equal(plain, zero)
    assert [line["grad_norm"] for line in plain_log] == [line["grad_norm"] for line in zero_log]
    assert zero_log[0]["predictor_grad_norm"] is None and zero_log[0]["pre_loss"] > 0


def test_its_own_parameters_learn_at_their_own_rate(package, run_training):
    still = run_training(block(0.0, learning_rate=1e-12))[1]
    again = run_training(block(0.0, learning_rate=1e-12))[1]
    moved = run_training(block(0.0, learning_rate=1e-1))[1]
    assert [line["pre_loss"] for line in still] == [line["pre_loss"] for line in again]
    assert moved[0]["pre_loss"] == still[0]["pre_loss"] and moved[-1]["pre_loss"] < still[-1]["pre_loss"]


def test_a_killed_run_ends_as_the_undisturbed_one(package, tmp_path, inputs, run_training):
    plain, lines = run_training(block(0.5))
    trial = Trial(tmp_path, inputs, block(0.5))
    for step in (1, 4):
        with pytest.raises(Killed):
            trial.run(kill_at=step)
    assert_equal(trial.run(), plain)
    assert [{k: v for k, v in line.items() if k != "seconds"} for line in lines] == trial.lines()


def test_its_start_depends_on_the_seed_alone(package, inputs):
    model = build_model(TINY, inputs.processor.tokenizer, 0)
    starts = []
    for seed, before in ((0, 1), (0, 2), (1, 1)):
        torch.manual_seed(before)
        state = torch.get_rng_state()
        starts.append(build_regularizer(block(0.5), model, seed).maps[0].weight)
        assert torch.equal(state, torch.get_rng_state())
    assert torch.equal(starts[0], starts[1]) and not torch.equal(starts[0], starts[2])


def test_without_images_the_loss_is_zero_and_all_parameters_have_a_part(package, inputs):
    term = build_regularizer(block(0.5, layer=2), build_model(TINY, inputs.processor.tokenizer, 0), 0)
    states = VisualStates(torch.zeros(2, 5, dtype=torch.bool))
    for layer in term.layers:
        states.record(layer, torch.randn(2, 5, 32, requires_grad=True))
    loss = term(states, torch.zeros(0, 64, 32), torch.zeros(0, dtype=torch.long))
    loss.backward()
    assert loss.item() == 0 and all(p.grad is not None for p in term.parameters())


@pytest.mark.slow
def test_the_example_goes_the_whole_way_through_the_command_line(tmp_path, monkeypatch):
    """Two workers train it; tables and report know it; a changed block, and a missing package, are refused."""
    own = EXAMPLE / "relations.yaml"
    strong = tmp_path / "strong.yaml"
    strong.write_text("regularizer: {type: patch_relations, weight: 2.0}\n")
    run = run_command(tmp_path, "--variants", f"baseline,{own},{strong}", "--jobs", "2", train__instruct__steps=8)
    study = tmp_path / "tiny-smoke"
    assert_refused(call(run), str(own), "unknown type 'patch_relations'")
    assert not study.exists()
    path = os.environ.get("PYTHONPATH", "")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(filter(None, [str(install_example(tmp_path / "site")), path])))
    done = call(run)
    assert done.returncode == 0, done.stderr[-3000:]
    manifest = read_json(study / "runs" / "relations-s0" / "model" / "prebench.json")
    assert manifest["regularizer_package"] == "patch-relations 0.1.0" and manifest["regularizer_layer"] == 2
    assert "regularizer_package" not in read_json(study / "runs" / "baseline-s0" / "model" / "prebench.json")
    assert math.isfinite(manifest["pre_loss"]) and manifest["pre_loss"] > 0
    table = (study / "tables" / "ablation.csv").read_text()
    assert "patch_relations" in table and "rank 16" in table
    assert "strong" in (study / "tables" / "dose_response.csv").read_text()
    assert "patch relations, λ 0.5, layer 1/2, rank 16" in (study / "report.html").read_text()
    before = finished(study)
    assert call(run).returncode == 0 and finished(study) == before
    strong.write_text("regularizer: {type: patch_relations, weight: 2.0, rank: 8}\n")
    assert_refused(call(run), "variant strong.regularizer.rank: 16 -> 8")
    monkeypatch.setenv("PYTHONPATH", path)
    report = command("report", "--results", tmp_path)
    assert_refused(call(report), "study.yaml: variants.1.regularizer: unknown type 'patch_relations'; known: ")
