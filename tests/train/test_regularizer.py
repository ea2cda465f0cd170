"""The loss equals its published formula."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from prebench.errors import ModelError
from prebench.model.visual_states import VisualStates, resolve_layer
from prebench.schema import PredictiveConfig
from prebench.train.regularizers.predictive import PredictiveRegularizer, anchor_statistics

IMAGES, TOKENS, WIDTH = 3, 5, 8


def build(**changes):
    config = PredictiveConfig(**({"weight": 0.5, "layer": 2} | changes))
    generator = torch.Generator().manual_seed(1)
    size = WIDTH if config.anchor == "pre_llm" else 6
    return PredictiveRegularizer(config, hidden_size=WIDTH, anchor_size=size, depth=4, generator=generator)


def states():
    generator = torch.Generator().manual_seed(2)
    mask = torch.zeros(IMAGES, TOKENS + 4, dtype=torch.bool)
    mask[:, 2 : 2 + TOKENS] = True
    recorded = VisualStates(mask)
    for layer in (0, 2):
        recorded.record(layer, torch.randn(IMAGES, TOKENS + 4, WIDTH, generator=generator, requires_grad=True))
    return recorded, torch.randn(IMAGES, TOKENS, 6, generator=generator)


IMAGE_OF_TOKEN = torch.arange(IMAGES).repeat_interleave(TOKENS)


def test_patch_level_is_the_mean_cosine_per_image():
    term = build()
    recorded, features = states()
    loss = term(recorded, features, IMAGE_OF_TOKEN)
    expected = 0.0
    for image in range(IMAGES):
        rows = slice(2, 2 + TOKENS)
        predicted = term.predictors[0](recorded.hidden(2)[image, rows])
        anchor = recorded.hidden(0)[image, rows]
        expected -= sum(F.cosine_similarity(p, a, dim=0) for p, a in zip(predicted, anchor, strict=True)) / TOKENS
    torch.testing.assert_close(loss, expected)


def test_the_anchor_gets_no_gradient_and_the_layer_does():
    term = build()
    recorded, features = states()
    term(recorded, features, IMAGE_OF_TOKEN).backward()
    assert recorded.hidden(0).grad is None
    assert recorded.hidden(2).grad.abs().sum() > 0


def test_weight_zero_reaches_the_predictor_alone():
    term = PredictiveRegularizer(
        PredictiveConfig(weight=0, layer=2),
        hidden_size=WIDTH,
        anchor_size=WIDTH,
        depth=4,
        generator=torch.Generator().manual_seed(0),
    )
    recorded, features = states()
    term(recorded, features, IMAGE_OF_TOKEN).backward()
    assert recorded.hidden(2).grad is None
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in term.parameters())


def test_global_level_and_pre_projector_anchor():
    term = build(level="global", anchor="pre_projector")
    recorded, features = states()
    loss = term(recorded, features, IMAGE_OF_TOKEN)
    pooled = recorded.hidden(2)[:, 2 : 2 + TOKENS].mean(1)
    expected = -F.cosine_similarity(term.predictors[0](pooled), features.mean(1), dim=-1).sum()
    torch.testing.assert_close(loss, expected)


def test_images_of_different_length_weigh_the_same():
    term = build()
    mask = torch.zeros(2, 6, dtype=torch.bool)
    mask[0, :6] = True
    mask[1, :2] = True
    recorded = VisualStates(mask)
    generator = torch.Generator().manual_seed(3)
    for layer in (0, 2):
        recorded.record(layer, torch.randn(2, 6, WIDTH, generator=generator))
    loss = term(recorded, torch.empty(0), torch.tensor([0] * 6 + [1] * 2))
    cosine = F.cosine_similarity(term.predictors[0](recorded.at(2)), recorded.at(0), dim=-1)
    torch.testing.assert_close(loss, -(cosine[:6].mean() + cosine[6:].mean()))


def test_several_layers_are_averaged_and_each_has_a_predictor():
    recorded, features = states()
    recorded.record(4, torch.randn(IMAGES, TOKENS + 4, WIDTH, generator=torch.Generator().manual_seed(4)))
    term = build(layer=["half", "last"])
    alone = [build(layer=layer) for layer in ("half", "last")]
    for single, predictor in zip(alone, term.predictors, strict=True):
        single.predictors[0].load_state_dict(predictor.state_dict())
    losses = [single(recorded, features, IMAGE_OF_TOKEN) for single in alone]
    assert abs(losses[0] - losses[1]) > 0.01
    torch.testing.assert_close(term(recorded, features, IMAGE_OF_TOKEN), (losses[0] + losses[1]) / 2)
    assert not torch.equal(term.predictors[0][0].weight, term.predictors[1][0].weight)
    assert term.layers == (0, 2, 4)
    first = build(layer="half").predictors[0][0].weight
    assert torch.equal(term.predictors[0][0].weight, first), "the first layer's predictor starts as that of one layer"


def test_layers_that_are_one_and_the_same_are_refused():
    with pytest.raises(ModelError, match="half, 2 are layers 2, 2 of 4: name each once"):
        build(layer=["half", 2])


def test_building_leaves_the_global_random_state_alone():
    torch.manual_seed(5)
    before = torch.get_rng_state()
    build()
    assert torch.equal(before, torch.get_rng_state())


@pytest.mark.parametrize(
    ("layer", "depth", "expected"), [("half", 32, 16), ("half", 28, 14), ("quarter", 6, 2), ("last", 6, 6), (3, 6, 3)]
)
def test_layer_names(layer, depth, expected):
    assert resolve_layer(layer, depth) == expected


def test_a_layer_outside_the_model_is_refused():
    with pytest.raises(ModelError, match=r"regularizer.layer: 9 lies outside 1\.\.6"):
        resolve_layer(9, 6)


def test_anchor_statistics_of_known_tokens():
    generator = torch.Generator().manual_seed(0)
    isotropic = anchor_statistics(torch.randn(20_000, WIDTH, generator=generator))
    assert isotropic["anchor_rank"] == pytest.approx(WIDTH, rel=0.01)
    assert isotropic["constant_cosine"] < 0.02
    constant = anchor_statistics(torch.ones(10, WIDTH) + torch.randn(10, WIDTH, generator=generator) * 1e-3)
    assert constant["constant_cosine"] == pytest.approx(1.0, abs=1e-4)
    line = torch.randn(1000, 1, generator=generator) * torch.ones(1, WIDTH)
    assert anchor_statistics(line)["anchor_rank"] == pytest.approx(1.0, abs=1e-4)
