"""Visual tokens, encoder output, grids and attention of each architecture, against transformers' own forward pass."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
import transformers as hf
from torch import Tensor

from prebench.errors import ModelError
from prebench.model import architectures
from prebench.model.architectures import View, capture_encoder, image_attention, injected_layers, prefix_is_exact
from prebench.model.visual_states import VisualStates, capture, language_model, num_layers, visual_mask
from tests.model.tiny_models import ARCHITECTURES, LAYERS, TEXT, Tiny

NOT_CAUSAL = {"paligemma": "prompt", "gemma3": "image"}


@pytest.fixture(scope="module", params=list(ARCHITECTURES))
def tiny(request) -> Tiny:
    return dataclasses.replace(ARCHITECTURES[request.param](), name=request.param)


def run(tiny: Tiny, **changes: Any) -> tuple[VisualStates, architectures.EncoderStates, Any]:
    inputs = tiny.inputs | changes
    with (
        torch.no_grad(),
        capture(tiny.model, inputs["input_ids"], range(LAYERS + 1)) as states,
        capture_encoder(tiny.model) as encoder,
    ):
        output = tiny.model.base_model(**inputs, output_hidden_states=True, use_cache=False)
    return states, encoder, output


def end_of_images(tiny: Tiny) -> int:
    return int(tiny.placeholders.any(dim=0).nonzero().max()) + 1


def test_layers_are_transformers_hidden_states(tiny):
    states, _, output = run(tiny)
    assert num_layers(tiny.model) == LAYERS and len(output.hidden_states) == LAYERS + 1
    for layer in set(range(LAYERS)) - set(injected_layers(tiny.model)):
        assert torch.equal(states.hidden(layer), output.hidden_states[layer])
    assert not torch.allclose(states.hidden(LAYERS), output.hidden_states[LAYERS])  # theirs follows the final norm
    with torch.no_grad():
        assert torch.equal(language_model(tiny.model).norm(states.hidden(LAYERS)), output.hidden_states[LAYERS])


def test_visual_tokens_are_the_placeholders_without_line_breaks(tiny):
    states, _, _ = run(tiny)
    assert torch.equal(states.mask_BT, tiny.mask)
    assert torch.equal(visual_mask(tiny.model, tiny.inputs["input_ids"]), tiny.placeholders)
    assert states.at(1).shape == (int(tiny.mask.sum()), TEXT["hidden_size"])
    newline = getattr(tiny.model.base_model, "image_newline", None)
    breaks = states.hidden(0)[tiny.placeholders & ~tiny.mask]
    assert (len(breaks) > 0) == (newline is not None)
    assert newline is None or torch.equal(breaks, newline.detach().expand_as(breaks))


def test_injected_features_are_the_difference_to_the_block_before(tiny):
    states, _, output = run(tiny)
    if tiny.name != "qwen3_vl":
        assert injected_layers(tiny.model) == ()
        return
    assert injected_layers(tiny.model) == (1, 2)
    with torch.no_grad():
        features = tiny.model.base_model.get_image_features(tiny.inputs["pixel_values"], tiny.inputs["image_grid_thw"])
    for layer, injected in zip((1, 2), features.deepstack_features, strict=True):
        before = output.hidden_states[layer][tiny.mask]
        torch.testing.assert_close(states.at(layer), before + torch.cat(injected))
        assert not torch.allclose(states.at(layer), before)


def farthest_influence(tiny: Tiny) -> list[int]:
    """The last position of layer 0 that reaches an image's first visual token at layer L, per prompt, by gradients."""
    with capture(tiny.model, tiny.inputs["input_ids"], [0, LAYERS]) as states:
        tiny.model.base_model(**tiny.inputs, use_cache=False)
    found = []
    for row, visual in enumerate(tiny.mask):
        first = int(visual.nonzero()[0])
        (gradient,) = torch.autograd.grad(
            states.hidden(LAYERS)[row, first].square().sum(), states.hidden(0), retain_graph=True
        )
        found.append(int(gradient[row].abs().sum(dim=-1).nonzero().max()))
    return found


def test_image_attention_is_what_gradients_reach(tiny):
    kind = image_attention(tiny.model)
    assert kind == NOT_CAUSAL.get(tiny.name, "causal")
    expected = {
        "causal": [int(visual.nonzero()[0]) for visual in tiny.mask],
        "image": [int(visual.nonzero()[-1]) for visual in tiny.mask],
        "prompt": (tiny.inputs["attention_mask"].sum(dim=1) - 1).tolist(),
    }
    assert farthest_influence(tiny) == expected[kind]


def test_text_behind_the_image_matters_only_where_image_tokens_attend_to_it(tiny):
    exact = prefix_is_exact(tiny.model)
    assert exact == (tiny.name != "paligemma")
    end = end_of_images(tiny)
    assert architectures.depends_on_later_text(tiny.model, tiny.inputs, end) != exact
    states, _, _ = run(tiny)
    text = tiny.inputs["input_ids"].clone()
    text[:, end:] = 50
    changed, _, _ = run(tiny, input_ids=text)
    assert torch.equal(states.at(0), changed.at(0))
    for layer in range(1, LAYERS + 1):
        assert torch.equal(states.at(layer), changed.at(layer)) == exact


def test_the_prefix_alone_gives_the_same_states(tiny):
    width = tiny.inputs["input_ids"].shape[1]
    cut = {
        key: value[:, : end_of_images(tiny)]
        for key, value in tiny.inputs.items()
        if value.ndim == 2 and value.shape == (2, width)
    }
    whole, _, _ = run(tiny)
    prefix, _, _ = run(tiny, **cut)
    close = [torch.allclose(prefix.at(layer), whole.at(layer), atol=1e-5) for layer in range(LAYERS + 1)]
    assert close == [True, *[prefix_is_exact(tiny.model)] * LAYERS]


GRIDS = {
    "llava_next": [View(0, 4, 4)] * 2,
    "llava_onevision": [View(0, 4, 4)] * 2,
    "llava": [View(0, 4, 4)] * 2,
    "llava_clip": [View(0, 4, 4)] * 2,
    "paligemma": [View(0, 4, 4)] * 2,
    "gemma3": [View(0, 2, 2)] * 2,
    "internvl": [View(0, 2, 2), View(8, 2, 2)],
    "idefics3": [View(0, 2, 2), View(8, 2, 2)],
    "smolvlm": [View(0, 2, 2), View(8, 2, 2)],
}
QWEN_GRIDS = [View(0, 4, 2), View(0, 2, 6)]
TILED_ROWS = {"llava_next": [48, 80], "llava_onevision": [48, 80]}
"""Encoder rows per image where padding is dropped behind the projector: 3 and 5 views of 16."""


def test_grids_and_counts_of_each_image(tiny):
    states, encoder, _ = run(tiny)
    counts = states.mask_BT.sum(dim=1).tolist()
    images = encoder.images(tiny.inputs, counts)
    assert [image.num_tokens for image in images] == counts
    assert [image.view for image in images] == GRIDS.get(tiny.name, QWEN_GRIDS)
    assert [len(image.encoder) for image in images] == TILED_ROWS.get(tiny.name, counts)
    assert [image.encoder_view for image in images] == GRIDS.get(tiny.name, QWEN_GRIDS)


def merged_patches(tiny: Tiny, patches: Tensor, token_D: Tensor) -> Tensor:
    """The patches that the visual token comes from, by the projector's gradients, [m^2, D_v]."""
    patches = patches.clone().requires_grad_()
    projected = architectures.projector(tiny.model)(patches).flatten(0, -2)
    row = int((projected - token_D).abs().sum(dim=-1).argmin())
    torch.testing.assert_close(projected[row], token_D)
    (gradient,) = torch.autograd.grad(projected[row].square().sum(), patches)
    found = patches.detach()[gradient.abs().sum(dim=-1) > 0]
    return found.unflatten(-1, (-1, 16)).flatten(
        0, 1
    )  # InternVL's projector reads the channels of four patches at once


def test_encoder_rows_are_means_of_the_patches_that_make_each_visual_token(tiny):
    """Also that they stand in the order of the visual tokens: Qwen2.5-VL's encoder works in another."""
    states, encoder, _ = run(tiny)
    counts = states.mask_BT.sum(dim=1).tolist()
    images = encoder.images(tiny.inputs, counts)
    merged = {"llava": 1, "llava_clip": 1, "llava_next": 1, "llava_onevision": 1, "paligemma": 1}.get(tiny.name, 4)
    for image, tokens in zip(images, states.at(0).split(counts), strict=True):
        for row in range(image.view.rows * image.view.cols):
            patches = merged_patches(tiny, encoder.seen[0][0], tokens[image.view.start + row])
            assert len(patches) == merged
            torch.testing.assert_close(image.encoder[image.encoder_view.start + row], patches.mean(dim=0))


def test_a_text_model_has_no_image_token():
    model = hf.LlamaForCausalLM(hf.LlamaConfig(**TEXT))
    with pytest.raises(ModelError, match="image_token_id; prebench finds visual tokens by") as caught:
        visual_mask(model, torch.ones(1, 3, dtype=torch.long))
    assert "\n" not in str(caught.value)


def test_a_decoder_of_another_layout_is_refused():
    model = hf.GPT2LMHeadModel(hf.GPT2Config(n_layer=1, n_embd=8, n_head=2, vocab_size=10))
    with pytest.raises(
        ModelError, match=r"GPT2LMHeadModel: no decoder layers found; prebench needs .*get_decoder"
    ) as caught:
        language_model(model)
    assert "\n" not in str(caught.value)


def test_a_model_without_a_known_projector_says_where_to_name_it():
    model = hf.LlamaForCausalLM(hf.LlamaConfig(**TEXT))
    with (
        pytest.raises(ModelError, match=r"no projector found at .*add its place to PROJECTORS") as caught,
        capture_encoder(model),
    ):
        pass
    assert "\n" not in str(caught.value)


def test_features_that_fit_no_image_are_refused():
    tiny = ARCHITECTURES["internvl"]()
    _, encoder, _ = run(tiny)
    with pytest.raises(ModelError, match="4 views of 4 tokens for images of 4, 8 visual tokens"):
        encoder.images(tiny.inputs, [4, 8])
    encoder.seen.clear()
    with pytest.raises(ModelError, match="the projector ran 0 times"):
        encoder.images(tiny.inputs, [4, 12])
    with pytest.raises(ModelError, match="15 patches become 4 visual tokens, which form no blocks"):
        architectures.merge_patches(ARCHITECTURES["llava"]().model, torch.zeros(1, 15, 16), 4)
