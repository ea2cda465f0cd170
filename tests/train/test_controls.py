"""The controls of PRe: each loss equals its formula, and nothing of them outlives training."""

from __future__ import annotations

import copy
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors import safe_open
from torch import nn

from prebench.analysis.join import Study
from prebench.config import dump_yaml, load_preset, load_suite, load_variant, read_yaml, validate
from prebench.data.collator import ExampleOrder
from prebench.errors import ConfigError, TrainingError
from prebench.export import export, read_manifest
from prebench.model.builder import build_model
from prebench.model.visual_states import VisualStates
from prebench.pipeline import is_trained, train_all
from prebench.schema import NormPenaltyConfig, PredictiveConfig, StageConfig, StudyConfig, TrainConfig
from prebench.study import open_study, runs
from prebench.train.batches import MicroBatches
from prebench.train.loop import build_accelerator, build_regularizer, train
from prebench.train.regularizers.norm_penalty import NormPenaltyRegularizer
from prebench.train.regularizers.predictive import PredictiveRegularizer
from tests.conftest import TINY
from tests.train.conftest import RECIPE

IMAGES, TOKENS, WIDTH, FEATURES = 3, 5, 8, 6
ANCHORS = ("pre_llm", "pre_projector", "shuffled", "frozen_copy")
CONTROLS = ("pre-shuffled", "pre-frozen-copy", "norm-penalty", "baseline-again")


def predictive(anchor, **changes):
    return PredictiveRegularizer(
        PredictiveConfig(weight=0.5, layer=2, anchor=anchor, **changes),
        hidden_size=WIDTH,
        anchor_size=FEATURES if anchor == "pre_projector" else WIDTH,
        depth=4,
        generator=torch.Generator().manual_seed(1),
    )


def random_states(counts=(TOKENS,) * IMAGES):
    generator = torch.Generator().manual_seed(2)
    mask = torch.zeros(len(counts), max(counts) + 4, dtype=torch.bool)
    for row, count in enumerate(counts):
        mask[row, 2 : 2 + count] = True
    states = VisualStates(mask)
    for layer in (0, 2):
        states.record(layer, torch.randn(*mask.shape, WIDTH, generator=generator, requires_grad=True))
    features = torch.randn(len(counts), max(counts), FEATURES, generator=generator, requires_grad=True)
    return states, features, torch.arange(len(counts)).repeat_interleave(torch.tensor(counts))


def minus_cosines(predictor, hidden_MD, anchor_MA):
    predicted = predictor(hidden_MD).detach().double().numpy()
    anchor = anchor_MA.detach().double().numpy()
    dots = (predicted * anchor).sum(-1)
    return -dots / np.linalg.norm(predicted, axis=-1) / np.linalg.norm(anchor, axis=-1)


def test_a_shuffled_anchor_is_that_of_the_image_before():
    term = predictive("shuffled")
    states, features, image_of_token = random_states()
    tokens = states.at(2).unflatten(0, (IMAGES, TOKENS))
    anchors = states.at(0).unflatten(0, (IMAGES, TOKENS))
    shuffled, own = (
        sum(minus_cosines(term.predictors[0], tokens[i], anchors[j]).mean() for i, j in pairs)
        for pairs in (((0, 2), (1, 0), (2, 1)), ((0, 0), (1, 1), (2, 2)))
    )
    assert abs(shuffled - own) > 0.1
    assert term(states, features, image_of_token).item() == pytest.approx(shuffled, abs=1e-5)
    assert predictive("pre_llm")(states, features, image_of_token).item() == pytest.approx(own, abs=1e-5)


def test_a_single_image_cannot_be_shuffled(inputs):
    states, features, image_of_token = random_states((TOKENS,))
    with pytest.raises(TrainingError, match="one image has no other image; choose batch_size"):
        predictive("shuffled")(states, features, image_of_token)
    model = build_model(TINY, inputs.processor.tokenizer, 0)
    before = copy.deepcopy(model.state_dict())
    recipe = TrainConfig.model_validate(RECIPE | {"align": RECIPE["align"] | {"batch_size": 1}})
    lines: list[dict] = []
    with pytest.raises(TrainingError, match="shuffled"):
        train(model, build_regularizer(PredictiveConfig(anchor="shuffled"), model, 0), recipe, inputs, 0, lines.append)
    assert not lines
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_a_frozen_copy_stays_within_a_stage_and_is_taken_again_at_the_next(inputs):
    model = build_model(TINY, inputs.processor.tokenizer, 0)
    term = build_regularizer(PredictiveConfig(weight=0.5, layer=2, anchor="frozen_copy"), model, 0)
    projector = model.model.multi_modal_projector
    width = TINY.language_model.hidden_size
    generator = torch.Generator().manual_seed(3)
    states = VisualStates(torch.ones(IMAGES, TOKENS, dtype=torch.bool))
    for layer in (0, 2):
        states.record(layer, torch.randn(IMAGES, TOKENS, width, generator=generator))
    features = torch.randn(IMAGES, TOKENS, TINY.vision_tower.hidden_size, generator=generator)
    image_of_token = torch.arange(IMAGES).repeat_interleave(TOKENS)
    start = {"align": copy.deepcopy(projector)}
    moved = []

    def log(line):
        with torch.no_grad():
            anchor = start[line["stage"]](features).flatten(0, 1)
            moved.append((anchor - projector(features).flatten(0, 1)).abs().max().item())
            expected = minus_cosines(term.predictors[0], states.at(2), anchor).reshape(IMAGES, TOKENS).mean(1).sum()
            assert term(states, features, image_of_token).item() == pytest.approx(expected, abs=1e-5)
        if line["stage"] == "align":
            start["instruct"] = copy.deepcopy(projector)

    train(model, term, TrainConfig.model_validate(RECIPE), inputs, 0, log)
    assert len(moved) == 6 and min(moved) > 1e-4
    between = start["align"](features) - start["instruct"](features)
    assert between.abs().max() > 1e-4
    assert all(name.startswith("predictors.0.") for name in term.state_dict())
    assert len(list(term.parameters())) == 4


def test_a_frozen_copy_starts_as_the_method_starts(run_training):
    _, frozen = run_training(PredictiveConfig(weight=0.5, anchor="frozen_copy"))
    _, pre = run_training(PredictiveConfig(weight=0.5))
    assert frozen[0]["pre_loss"] == pre[0]["pre_loss"]
    assert frozen[-1]["pre_loss"] != pre[-1]["pre_loss"]


def test_the_norm_penalty_is_its_formula():
    term = NormPenaltyRegularizer(NormPenaltyConfig(weight=0.5, layer=2), depth=4)
    assert list(term.parameters()) == []
    states, features, image_of_token = random_states((5, 2))
    loss = term(states, features, image_of_token)
    hidden, anchor = (states.at(layer).detach().double().numpy() for layer in (2, 0))
    squares = (np.log(np.sqrt((hidden**2).sum(-1))) - np.log(np.sqrt((anchor**2).sum(-1)))) ** 2
    assert loss.item() == pytest.approx(squares[:5].mean() + squares[5:].mean(), rel=1e-5)
    loss.backward()
    assert states.hidden(0).grad is None
    gradient = states.hidden(2).grad
    assert gradient[states.mask_BT].abs().sum() > 0
    assert gradient[~states.mask_BT].abs().sum() == 0


def test_the_norm_penalty_survives_a_zero_vector():
    states = VisualStates(torch.ones(1, 2, dtype=torch.bool))
    states.record(0, torch.ones(1, 2, WIDTH))
    states.record(2, torch.zeros(1, 2, WIDTH, requires_grad=True))
    term = NormPenaltyRegularizer(NormPenaltyConfig(weight=0.5, layer=2), depth=4)
    loss = term(states, torch.empty(1, 2, FEATURES), torch.zeros(2, dtype=torch.long))
    loss.backward()
    assert torch.isfinite(loss) and torch.isfinite(states.hidden(2).grad).all()


@pytest.mark.parametrize("level", ["patch", "global"])
@pytest.mark.parametrize("anchor", ANCHORS)
def test_no_anchor_gets_gradient(anchor, level):
    term = predictive(anchor, level=level)
    projector = nn.Linear(FEATURES, WIDTH)
    term.begin_stage(SimpleNamespace(model=SimpleNamespace(multi_modal_projector=projector)))
    states, features, image_of_token = random_states()
    term(states, features, image_of_token).backward()
    assert states.hidden(0).grad is None and features.grad is None
    assert all(p.grad is None and p.requires_grad for p in projector.parameters())
    assert states.hidden(2).grad.abs().sum() > 0
    assert all(p.grad.abs().sum() > 0 for p in term.parameters())


@pytest.mark.parametrize("name", CONTROLS)
def test_an_export_holds_nothing_of_a_control(run_training, inputs, name, tmp_path):
    model, lines = run_training(load_variant(name).regularizer)
    manifest = {"variant": name, "seed": 0, "config_hash": "c", "parts_hash": "p", "dtype": "float32"}
    export(model, inputs.processor, tmp_path / "model", manifest | {"lm_loss": 1.0, "pre_loss": lines[-1]["pre_loss"]})
    with safe_open(tmp_path / "model" / "model.safetensors", framework="pt") as file:
        exported = {key: tuple(file.get_slice(key).get_shape()) for key in file.keys()}  # noqa: SIM118
    export(build_model(TINY, inputs.processor.tokenizer, 0), inputs.processor, tmp_path / "plain", manifest | lines[-1])
    with safe_open(tmp_path / "plain" / "model.safetensors", framework="pt") as file:
        assert exported == {key: tuple(file.get_slice(key).get_shape()) for key in file.keys()}  # noqa: SIM118


def tiny_study(variants, seeds):
    preset = load_preset("smoke").model_dump() | {"model": TINY.model_dump()}
    preset["data"] = {"scenes": {"num_images": 12, "questions_per_image": 2}}
    preset["train"] = RECIPE | {"cache_vision_features": False}
    values = {"name": "s", "preset": preset, "suite": load_suite("smoke"), "variants": variants, "seeds": seeds}
    return validate(StudyConfig, values, "study")


def test_a_seed_offset_gives_the_weights_of_that_seed(tmp_path):
    baseline = load_variant("baseline").model_dump()
    again = baseline | {"name": "again", "seed_offset": 3}
    studies = {"a": tiny_study((baseline, again), (0,)), "b": tiny_study((baseline,), (3,))}
    found = {}
    for name, config in studies.items():
        train_all(tmp_path / name, open_study(tmp_path / name, config))
        for run in runs(tmp_path / name, config):
            assert is_trained(run, config)
            found[run.name] = read_manifest(run.model_dir)
    assert found.keys() == {"baseline-s0", "again-s0", "baseline-s3"}
    assert found["again-s0"]["weights_hash"] == found["baseline-s3"]["weights_hash"]
    assert found["again-s0"]["weights_hash"] != found["baseline-s0"]["weights_hash"]
    assert (found["again-s0"]["seed"], found["again-s0"]["training_seed"]) == (0, 3)
    assert studies["a"].run_config("again", 0) == studies["b"].run_config("baseline", 3)


def test_baseline_again_is_the_baseline_with_another_seed():
    first, again = load_variant("baseline"), load_variant("baseline-again")
    assert first.regularizer == again.regularizer
    assert (first.seed_offset, again.seed_offset) == (0, 1000)


def test_a_study_with_controls_round_trips_and_keeps_its_baseline(tmp_path):
    names = ("baseline-again", "norm-penalty", "pre-shuffled", "pre-frozen-copy", "pre", "baseline")
    config = tiny_study(tuple(load_variant(name) for name in names), (0,))
    (tmp_path / "study.yaml").write_text(dump_yaml(config))
    assert validate(StudyConfig, read_yaml(tmp_path / "study.yaml"), "x") == config
    assert Study(tmp_path, config, {(name, 0): None for name in names}).baseline == "baseline"
    assert Study(tmp_path, config, {(name, 0): None for name in names[:-1]}).baseline == "baseline-again"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "extends: baseline\nregularizer: {type: norm_penalty}",
            "regularizer: anchor, level: no meaning for type norm_",
        ),
        (
            "regularizer: {type: norm_penalty, hidden_size: 8}",
            "regularizer: hidden_size: no meaning for type norm_penal",
        ),
        ("regularizer: {type: norm_penalty, learning_rate: 1.0e-3}", "learning_rate: no meaning for type norm_penalty"),
        ("regularizer: {type: norm, weight: 1}", "unknown type 'norm'; known: predictive, norm_penalty"),
        ("regularizer: {wieght: 1}", "unknown key 'regularizer.wieght' (did you mean 'weight'?"),
        ("regularizer: {type: norm_penalty, weight: -1}", "regularizer.weight: Input should be greater than or equal"),
        (
            "regularizer: {anchor: shufled}",
            "regularizer.anchor: Input should be 'pre_llm', 'pre_projector', 'external', 'shuffled'",
        ),
        ("regularizer: {layer: middle}", "regularizer.layer: write quarter, half, three_quarters, last, a number from"),
        ("regularizer: {layer: []}", "a number from 1 on, or a list of these (got [])"),
        ("regularizer: {layer: [half, half]}", "regularizer.layer: layer 'half' is named twice"),
        ("regularizer: {anchor: external}", "regularizer: anchor external and anchor_model belong together"),
        ("regularizer: {anchor_model: folder}", "regularizer: anchor external and anchor_model belong together"),
        ("regularizer: 3", "a mapping with type, weight and layer is expected (got 3)"),
        ("extends: baseline\nseed_offset: -1", "seed_offset: Input should be greater than or equal to 0"),
    ],
)
def test_impossible_variants_are_refused_in_one_line(tmp_path: Path, text, message):
    path = tmp_path / "v.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError) as caught:
        load_variant(str(path))
    assert str(caught.value).startswith(str(path)) and message in str(caught.value)


def test_a_shuffled_anchor_comes_from_an_image_drawn_at_random(inputs):
    """Sorted by length, neighbours would share their number of objects: the anchor would know the image after all."""
    stage = StageConfig(steps=3, batch_size=8, gradient_accumulation_steps=2, learning_rate=1e-3, caption_share=1.0)
    order = ExampleOrder(inputs.data, stage, "instruct", 0)
    batches = MicroBatches(order, inputs, build_accelerator(TrainConfig.model_validate(RECIPE)))
    for number in range(len(batches)):
        assert list(batches[number].image_ids) == [order[4 * number + i].image_id for i in range(4)]


def test_an_a_a_comparison_of_a_model_with_itself_is_refused():
    changes = {"name": "s", "preset": load_preset("smoke"), "suite": load_suite("smoke")}
    variants = (load_variant("baseline"), load_variant("baseline-again"))
    StudyConfig(**changes, variants=variants, seeds=(0, 1, 999))
    for order in (variants, variants[::-1]):
        with pytest.raises(ValueError, match="would both train the same model with seed 1000"):
            StudyConfig(**changes, variants=order, seeds=(0, 1000))
    with pytest.raises(ValueError, match="seed '0' is named twice"):
        StudyConfig(**changes, variants=variants, seeds=(0, 0))
