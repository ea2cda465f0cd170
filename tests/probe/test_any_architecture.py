"""Extraction from every architecture, through its own processor: images of three shapes, two of them in one batch."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from prebench.errors import ModelError
from prebench.model import architectures
from prebench.model.architectures import capture_encoder
from prebench.model.visual_states import capture
from prebench.probe import extract
from prebench.probe.diagnostics import model_rows
from prebench.probe.extract import extract_features, prompt_inputs
from prebench.probe.features import ProbeFeatures
from prebench.probe.patch_structure import assign_patches, patch_structure
from tests.model.tiny_models import ARCHITECTURES, LAYERS
from tests.probe.tiny_processors import PROCESSORS

SIZES = [(24, 40), (32, 32), (30, 20)]
"""Heights and widths."""
SEES = {"paligemma": (1.0, 1.0), "gemma3": (1.0, 0.0)}


@dataclasses.dataclass(frozen=True)
class Case:
    name: str
    model: Any
    processor: Any
    images: list[Image.Image]
    masks: list[np.ndarray | None]


@pytest.fixture(scope="module", params=list(ARCHITECTURES))
def case(request) -> Case:
    rng = np.random.default_rng(0)
    images = [Image.fromarray(rng.integers(0, 255, (*size, 3), dtype=np.uint8)) for size in SIZES]
    masks: list[Any] = [np.kron(rng.integers(0, 3, (2, 2)), np.ones(np.array(size) // 2, int)) for size in SIZES]
    if request.param == "llava_clip":  # cuts the image's sides off: a mask would not fit
        masks[0] = masks[2] = None
    tiny = ARCHITECTURES[request.param]()
    return Case(request.param, tiny.model, PROCESSORS[request.param](), images, masks)


@pytest.fixture(scope="module")
def features(case) -> ProbeFeatures:
    return extract_features(case.model, case.processor, case.images, case.masks, batch_size=2)


def one_image(case: Case, number: int, later: int) -> tuple[Any, Any]:
    """States and encoder output of one image alone, with `later` more tokens behind the prompt."""
    inputs, _ = prompt_inputs(case.model, case.processor, [case.images[number]])
    behind = {"input_ids": 10, "attention_mask": 1}
    for name in ("input_ids", "attention_mask", "token_type_ids", "mm_token_type_ids"):
        if name in inputs:
            more = inputs[name].new_full((1, later), behind.get(name, 0))
            inputs[name] = torch.cat([inputs[name], more], dim=1)
    with (
        torch.no_grad(),
        capture(case.model, inputs["input_ids"], range(LAYERS + 1)) as states,
        capture_encoder(case.model) as encoder,
    ):
        case.model.base_model(**inputs, use_cache=False)
    (image,) = encoder.images(inputs, [int(states.mask_BT.sum())])
    return states, image


def test_features_are_those_of_each_image_alone_with_a_question_behind_it(case, features):
    later = 0 if case.name == "paligemma" else 7
    for number, mask in enumerate(case.masks):
        states, image = one_image(case, number, later)
        for layer in range(LAYERS + 1):
            tokens = states.at(layer)
            np.testing.assert_allclose(features.pooled[number, layer], tokens.mean(dim=0), rtol=1e-4, atol=1e-5)
            if mask is not None:
                view = image.view
                own = tokens[view.start : view.start + view.rows * view.cols]
                objects = torch.from_numpy(assign_patches(mask, (view.rows, view.cols)))
                expected = patch_structure(own[None], objects[None])[0]
                np.testing.assert_allclose(features.structure[number, layer], expected, atol=1e-4, equal_nan=True)
        np.testing.assert_allclose(features.encoder_pooled[number], image.encoder.mean(dim=0), rtol=1e-4, atol=1e-5)
    assert np.isnan(features.structure).all(axis=(1, 2)).tolist() == [mask is None for mask in case.masks]


def test_the_rows_say_what_image_tokens_see(case, features):
    rows = {(row.metric, row.layer): row.value for row in model_rows(features)}
    each_other, question = SEES.get(case.name, (0.0, 0.0))
    assert rows.pop(("image_tokens_see_each_other", 0)) == each_other
    assert rows.pop(("image_tokens_see_the_question", 0)) == question
    added = {("encoder_features_added", layer): 1.0 for layer in (1, 2)}
    assert rows == (added if case.name == "qwen3_vl" else {})


def test_sums_do_not_depend_on_batches_or_on_which_process_reads_an_image(case, features):
    parts = [
        extract_features(case.model, case.processor, [case.images[i] for i in some], [None] * len(some), batch_size=1)
        for some in ([2, 0], [1])
    ]
    joined = ProbeFeatures.concatenate(parts)
    for name in ("moments", "encoder_moments"):
        one, other = getattr(features, name), getattr(joined, name)
        for field in dataclasses.fields(one):
            found, expected = getattr(other, field.name), getattr(one, field.name)
            close = {"rtol": 1e-4, "atol": 1e-4 * np.abs(expected).max()}
            np.testing.assert_allclose(found, expected, **close, err_msg=field.name)


@pytest.mark.parametrize("name", ["llava_next", "llava_onevision", "idefics3"])
def test_an_image_is_stretched_to_the_view_of_the_whole(name):
    """What STRETCHED claims: a dark left third stays a third, wherever the processor crops tiles or pads."""
    picture = np.full((24, 60, 3), 255, dtype=np.uint8)
    picture[:, :20] = 0
    tiny = ARCHITECTURES[name]()
    inputs, _ = prompt_inputs(tiny.model, PROCESSORS[name](), [Image.fromarray(picture)])
    assert tiny.model.config.model_type in architectures.STRETCHED
    view = inputs["pixel_values"][0, -1 if name == "idefics3" else 0]
    columns = view.mean(dim=(0, 1))
    bright = (columns - columns.min()) / (columns.max() - columns.min())
    assert bright[:4].max() < 0.2 and bright[7:].min() > 0.8


def test_an_untested_architecture_that_reads_on_is_refused(monkeypatch: pytest.MonkeyPatch):
    tiny = ARCHITECTURES["paligemma"]()
    words = PROCESSORS["paligemma"]()
    pictures, masks = [Image.new("RGB", (20, 20))], [None]
    monkeypatch.setattr(extract.architectures, "TESTED", ())
    extract_features(tiny.model, words, pictures, masks)
    monkeypatch.setattr(extract.architectures, "image_attention", lambda model: "causal")
    with pytest.raises(ModelError, match=r"image tokens change with the text behind them.*add 'paligemma'") as caught:
        extract_features(tiny.model, words, pictures, masks)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["llava", "qwen2_vl", "idefics3"])
def test_a_template_that_leaves_the_image_out_is_one_clear_line(name):
    words = PROCESSORS[name]()
    words.chat_template = "{% for m in messages %}user : what{% endfor %}"
    with pytest.raises(ModelError, match="the processor makes no prompt of one image") as caught:
        extract_features(ARCHITECTURES[name]().model, words, [Image.new("RGB", (20, 20))], [None])
    assert "\n" not in str(caught.value)


def test_tokens_without_a_grid_are_refused_only_with_a_mask(monkeypatch: pytest.MonkeyPatch):
    tiny = ARCHITECTURES["llava"]()
    monkeypatch.setattr(architectures, "_square", lambda start, size: None)
    picture = Image.new("RGB", (16, 16))
    assert np.isnan(extract_features(tiny.model, PROCESSORS["llava"](), [picture], [None]).structure).all()
    with pytest.raises(ModelError, match="16 visual tokens of an image form no square grid"):
        extract_features(tiny.model, PROCESSORS["llava"](), [picture], [np.ones((16, 16), dtype=int)])
