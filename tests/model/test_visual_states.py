"""Visual states against transformers' own hidden states, also under activation checkpointing."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import AutoModelForImageTextToText

from prebench.errors import ModelError
from prebench.model.visual_states import capture, language_model, num_layers, resolve_layer, visual_mask

LAYERS = 4


@pytest.fixture
def model(tiny_export: Path):
    return AutoModelForImageTextToText.from_pretrained(tiny_export)


@pytest.fixture
def inputs(model):
    """Two prompts with text before and behind 64 image tokens."""
    image = [model.config.image_token_id] * 64
    generator = torch.Generator().manual_seed(0)
    return {
        "input_ids": torch.tensor([[1, 10, *image, 20, 21, 22], [1, 11, *image, 30, 31, 32]]),
        "attention_mask": torch.ones((2, 69), dtype=torch.long),
        "pixel_values": torch.rand((2, 3, 64, 64), generator=generator) * 2 - 1,
    }


def test_layers_are_transformers_hidden_states_but_the_last_is_before_the_final_norm(model, inputs):
    with torch.no_grad(), capture(model, inputs["input_ids"], range(LAYERS + 1)) as states:
        hidden = model(**inputs, output_hidden_states=True).hidden_states
    assert num_layers(model) == LAYERS and len(hidden) == LAYERS + 1
    mask = visual_mask(model, inputs["input_ids"])
    for layer in range(LAYERS):
        assert torch.equal(states.hidden(layer), hidden[layer])
        assert torch.equal(states.at(layer), hidden[layer][mask])
    last = states.at(LAYERS)
    assert not torch.allclose(last, hidden[LAYERS][mask])
    with torch.no_grad():
        assert torch.equal(language_model(model).norm(states.hidden(LAYERS)), hidden[LAYERS])


def test_layer_zero_is_the_projectors_output(model, inputs):
    with torch.no_grad(), capture(model, inputs["input_ids"], [0]) as states:
        model(**inputs)
        projected = model.model.get_image_features(inputs["pixel_values"], return_dict=True).pooler_output
    assert torch.equal(states.at(0), torch.cat(list(projected)))


def test_the_mask_takes_the_image_tokens_of_every_row_in_order(model, inputs):
    mask = visual_mask(model, inputs["input_ids"])
    assert mask.sum(dim=1).tolist() == [64, 64]
    assert mask[:, 2:66].all()


def _losses_and_gradients(model, inputs, checkpointing: bool):
    model.train()
    if checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    with capture(model, inputs["input_ids"], range(LAYERS + 1)) as states:
        logits = model(**inputs, use_cache=False).logits
    captured = [states.at(layer) for layer in range(LAYERS + 1)]
    loss = logits.square().mean() + sum(tokens.sin().sum() / (i + 1) for i, tokens in enumerate(captured))
    loss.backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return [tokens.detach() for tokens in captured], gradients


def test_checkpointing_changes_neither_states_nor_gradients(tiny_export, model, inputs):
    plain_states, plain_gradients = _losses_and_gradients(model, inputs, checkpointing=False)
    other = AutoModelForImageTextToText.from_pretrained(tiny_export)
    recomputed = []
    other.model.language_model.layers[1].mlp.register_forward_pre_hook(lambda *_: recomputed.append(1))
    states, gradients = _losses_and_gradients(other, inputs, checkpointing=True)
    assert len(recomputed) == 2  # checkpointing was really on: forward, and again in the backward pass
    assert all(torch.equal(a, b) for a, b in zip(plain_states, states, strict=True))
    assert gradients.keys() == plain_gradients.keys()
    for name, gradient in plain_gradients.items():
        torch.testing.assert_close(gradients[name], gradient, rtol=1e-5, atol=1e-7, msg=name)
    projector = [name for name in gradients if "multi_modal_projector" in name]
    assert projector and all(gradients[name].abs().sum() > 0 for name in projector)


def test_a_backward_pass_inside_the_block_does_not_replace_the_states(model, inputs):
    model.train()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    with capture(model, inputs["input_ids"], [2]) as states:
        output = model(**inputs, use_cache=False)
        before = states.hidden(2)
        output.logits.square().mean().backward()
        assert states.hidden(2) is before


def test_the_hooks_are_gone_afterwards_even_after_an_error(model, inputs):
    def hooks() -> int:
        return sum(len(module._forward_pre_hooks) for module in model.modules())

    before = hooks()
    with pytest.raises(RuntimeError, match="stop"), capture(model, inputs["input_ids"], [0, LAYERS]):
        assert hooks() == before + 2
        raise RuntimeError("stop")
    assert hooks() == before


@pytest.mark.parametrize(
    ("layer", "index"), [("quarter", 8), ("half", 16), ("three_quarters", 24), ("last", 32), (5, 5)]
)
def test_named_layers_are_fractions_of_the_depth(layer, index):
    assert resolve_layer(layer, 32) == index


@pytest.mark.parametrize("layer", [0, 33, -1])
def test_a_layer_outside_the_model_is_refused(layer):
    with pytest.raises(ModelError, match=r"1\.\.32"):
        resolve_layer(layer, 32)


def test_a_model_of_another_layout_is_refused():
    with pytest.raises(ModelError, match="no decoder layers found"):
        language_model(nn.Linear(2, 2))
