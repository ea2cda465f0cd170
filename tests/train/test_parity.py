"""Two variants differ by the regularizer alone: bit for bit where it is promised (README)."""

from __future__ import annotations

import math

import pytest
import torch

from prebench.config import diff, load_preset, load_suite, load_variant
from prebench.data.collator import ExampleOrder
from prebench.model.builder import build_model
from prebench.schema import NormPenaltyConfig, PredictiveConfig, StageConfig, StudyConfig, TrainConfig
from prebench.train.batches import MicroBatches, TrainingInputs
from prebench.train.loop import build_accelerator, build_regularizer
from prebench.train.objective import Objective
from prebench.train.packing import packed_attention
from tests.conftest import TINY
from tests.train.conftest import RECIPE

WEIGHT_ZERO = PredictiveConfig(weight=0.0)
PRE = PredictiveConfig(weight=0.5)
EVERY_TYPE_AT_ZERO = [
    WEIGHT_ZERO,
    PredictiveConfig(weight=0.0, anchor="shuffled"),
    PredictiveConfig(weight=0.0, anchor="frozen_copy"),
    NormPenaltyConfig(weight=0.0),
]


def parameters(model):
    return {name: p.detach() for name, p in model.named_parameters()}


@pytest.mark.parametrize("config", EVERY_TYPE_AT_ZERO, ids=repr)
def test_weight_zero_equals_no_regularizer(run_training, config):
    plain, plain_log = run_training(None)
    zero, zero_log = run_training(config)
    for name, tensor in parameters(plain).items():
        assert torch.equal(tensor, parameters(zero)[name]), name
    for a, b in zip(plain_log, zero_log, strict=True):
        assert (a["lm_loss"], a["grad_norm"], a["batch_hash"]) == (b["lm_loss"], b["grad_norm"], b["batch_hash"])
    assert plain_log[0]["pre_loss"] is None
    penalty = config.type == "norm_penalty"
    assert all(line["pre_loss"] > 0 if penalty else -1 <= line["pre_loss"] <= 1 for line in zero_log)
    assert all((line["predictor_grad_norm"] is None) == penalty for line in zero_log)


@pytest.mark.parametrize("config", EVERY_TYPE_AT_ZERO[1:], ids=repr)
def test_every_control_changes_the_model_at_a_weight(run_training, config):
    zero, _ = run_training(config)
    felt, _ = run_training(config.model_copy(update={"weight": 0.5}))
    assert any(not torch.equal(p, parameters(zero)[name]) for name, p in parameters(felt).items())


def test_regularized_run_starts_alike_and_then_differs(run_training):
    zero, zero_log = run_training(WEIGHT_ZERO)
    pre, pre_log = run_training(PRE)
    assert pre_log[0]["lm_loss"] == zero_log[0]["lm_loss"]
    assert pre_log[0]["pre_loss"] == zero_log[0]["pre_loss"]
    assert pre_log[0]["grad_norm"] != zero_log[0]["grad_norm"]
    assert [line["batch_hash"] for line in pre_log] == [line["batch_hash"] for line in zero_log]
    assert any(not torch.equal(p, parameters(zero)[name]) for name, p in parameters(pre).items())
    assert parameters(pre).keys() == parameters(zero).keys()


def test_same_seed_repeats_and_another_seed_differs(run_training):
    _, first = run_training(PRE)
    _, again = run_training(PRE)
    _, other = run_training(PRE, seed=1)
    keep = ("lm_loss", "pre_loss", "grad_norm", "predictor_grad_norm", "batch_hash", "anchor_rank")
    assert [[line[k] for k in keep] for line in first] == [[line[k] for k in keep] for line in again]
    assert first[0]["lm_loss"] != other[0]["lm_loss"]
    assert first[0]["batch_hash"] != other[0]["batch_hash"]


def test_resolved_configs_differ_in_the_regularizer_alone():
    suite = load_suite("full")
    study = StudyConfig(
        name="s",
        preset=load_preset("embedded"),
        suite=suite,
        variants=(load_variant("baseline"), load_variant("pre")),
        seeds=(0,),
    )
    lines = list(diff(study.run_config("baseline", 0), study.run_config("pre", 0)))
    assert lines == ["regularizer.weight: 0.0 -> 0.5"]


@pytest.mark.parametrize(("batch_size", "accumulation"), [(8, 1), (8, 2), (8, 8)])
def test_accumulation_does_not_change_the_loss(run_training, batch_size, accumulation):
    stage = RECIPE["instruct"] | {"batch_size": batch_size, "steps": 3}
    _, whole = run_training(PRE, align=RECIPE["align"] | {"steps": 0}, instruct=stage)
    parts = stage | {"gradient_accumulation_steps": accumulation}
    _, split = run_training(PRE, align=RECIPE["align"] | {"steps": 0}, instruct=parts)
    for a, b in zip(whole, split, strict=True):
        assert a["num_targets"] == b["num_targets"]
        assert math.isclose(a["lm_loss"], b["lm_loss"], abs_tol=1e-5)
        assert math.isclose(a["pre_loss"], b["pre_loss"], abs_tol=1e-5)
        assert math.isclose(a["grad_norm"], b["grad_norm"], rel_tol=1e-3)


def test_loss_and_gradients_are_those_of_transformers_with_its_mask(inputs):
    """The decoder gets packed sequences and no mask: none must see another one, and nothing be lost with padding."""
    ours, theirs = losses_and_gradients(inputs, TrainConfig.model_validate(RECIPE))
    torch.testing.assert_close(ours.pop("loss"), theirs.pop("loss"), rtol=0, atol=1e-5)
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)


def losses_and_gradients(inputs: TrainingInputs, recipe: TrainConfig) -> list[dict[str, torch.Tensor]]:
    """Return `loss` and gradients by parameter of one micro-batch as prebench computes them, and as transformers."""
    device = torch.device(recipe.device)
    model = build_model(TINY, inputs.processor.tokenizer, 0).to(device)
    order = ExampleOrder(inputs.data, recipe.instruct, "instruct", 0)
    batch = MicroBatches(order, inputs, build_accelerator(recipe))[0].to(device)
    assert (batch.attention_mask == 0).any()
    found = []
    for ours in (True, False):
        model.zero_grad()
        if ours:
            with packed_attention(model):
                loss = Objective(model, None)(batch).total(batch.num_targets, 1, 0.0)
        else:
            texts = {"input_ids": batch.input_ids, "attention_mask": batch.attention_mask, "labels": batch.labels}
            loss = model(**texts, pixel_values=batch.pixel_values).loss
        loss.backward()
        found.append({"loss": loss.detach()} | {n: p.grad for n, p in model.named_parameters() if p.grad is not None})
    return found


@pytest.mark.parametrize("zero", EVERY_TYPE_AT_ZERO, ids=repr)
def test_gradients_of_the_model_ignore_a_weight_of_zero(inputs, zero):
    gradients = []
    for config in (None, zero):
        model = build_model(TINY, inputs.processor.tokenizer, 0)
        term = build_regularizer(config, model, 0)
        if term is not None:
            term.begin_stage(model)
        objective = Objective(model, term)
        recipe = TrainConfig.model_validate(RECIPE)
        stage = StageConfig.model_validate(RECIPE["instruct"])
        order = ExampleOrder(inputs.data, stage, "instruct", 0)
        batch = MicroBatches(order, inputs, build_accelerator(recipe))[0]
        objective(batch).total(batch.num_targets, len(batch.image_ids), 0.0).backward()
        gradients.append({n: p.grad for n, p in model.named_parameters()})
    for name, gradient in gradients[0].items():
        other = gradients[1][name]
        assert (gradient is None) == (other is None), name
        assert gradient is None or torch.equal(gradient, other), name
