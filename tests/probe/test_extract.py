"""Extraction on a tiny model: against transformers' own hidden states, and the files it leaves."""

from __future__ import annotations

import gc
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor

from prebench.data.scenes import generate_scene, render
from prebench.errors import DataError, ModelError, StoreError
from prebench.probe.extract import ProbeFeatures, extract_features
from prebench.probe.patch_structure import STRUCTURE_METRICS, assign_patches, patch_structure


@pytest.fixture(scope="module")
def loaded(tiny_export: Path):
    return AutoModelForImageTextToText.from_pretrained(tiny_export), AutoProcessor.from_pretrained(tiny_export)


@pytest.fixture(scope="module")
def scenes():
    return [render(generate_scene(0, "probe", index)) for index in range(7)]


@pytest.fixture(scope="module")
def features(loaded, scenes) -> ProbeFeatures:
    return extract_features(*loaded, [image for image, _ in scenes], [mask for _, mask in scenes], batch_size=4)


def test_features_are_those_of_transformers_hidden_states(loaded, scenes, features):
    """A long text behind the image, all images at once, output_hidden_states: the same visual tokens."""
    model, processor = loaded
    turn = [{"type": "image"}, {"type": "text", "text": "what color is the circle?"}]
    text = processor.apply_chat_template([{"role": "user", "content": turn}], add_generation_prompt=True)
    images, masks = zip(*scenes, strict=True)
    inputs = processor(images=list(images), text=[text] * len(images), return_tensors="pt", add_special_tokens=False)
    with torch.no_grad():
        hidden = model(**inputs, output_hidden_states=True).hidden_states
    visual = inputs["input_ids"] == model.config.image_token_id
    assignment = torch.from_numpy(np.stack([assign_patches(mask, (8, 8)) for mask in masks]))
    for layer in range(features.num_layers):  # the last one follows the final norm there
        tokens = hidden[layer][visual].view(len(images), 64, -1)
        np.testing.assert_allclose(features.pooled[:, layer], tokens.mean(dim=1), rtol=1e-4, atol=1e-5)
        expected = patch_structure(tokens, assignment)
        np.testing.assert_allclose(features.structure[:, layer], expected, atol=1e-4, equal_nan=True)


def test_the_encoder_row_is_the_towers_output(loaded, scenes, features):
    model, processor = loaded
    pixels = processor.image_processor(images=[image for image, _ in scenes], return_tensors="pt")["pixel_values"]
    with torch.no_grad():
        output = model.model.vision_tower(pixels, output_hidden_states=True).hidden_states[-1]
    np.testing.assert_allclose(features.encoder_pooled, output.mean(dim=1), rtol=1e-4, atol=1e-5)
    assert features.encoder_structure.shape == (7, len(STRUCTURE_METRICS))
    assert np.isfinite(features.encoder_structure).all()


def test_shapes_and_types(features):
    assert features.pooled.shape == (7, 5, 32) and features.num_layers == 4 and len(features) == 7
    assert features.structure.shape == (7, 5, len(STRUCTURE_METRICS))
    assert {getattr(features, name).dtype for name in ("pooled", "encoder_pooled", "structure")} == {np.dtype("f4")}


@pytest.mark.parametrize("batch_size", [1, 3, 16])
def test_features_do_not_depend_on_the_batch_size(loaded, scenes, features, batch_size):
    images, masks = zip(*scenes, strict=True)
    other = extract_features(*loaded, images, masks, batch_size=batch_size)
    for name in ("pooled", "encoder_pooled", "structure", "encoder_structure"):
        np.testing.assert_allclose(getattr(other, name), getattr(features, name), rtol=1e-4, atol=2e-5)


def test_the_vision_tower_runs_once_per_batch(loaded, scenes):
    model, processor = loaded
    calls = []
    handle = model.model.vision_tower.register_forward_hook(lambda *_: calls.append(1))
    images, masks = zip(*scenes, strict=True)
    extract_features(model, processor, images, masks, batch_size=4)
    handle.remove()
    assert len(calls) == 2


def test_a_batch_that_is_over_leaves_no_tensor_to_the_garbage_collector(loaded, scenes):
    images, masks = [image for image, _ in scenes], [mask for _, mask in scenes]

    def tensors() -> int:
        return sum(isinstance(one, torch.Tensor) for one in gc.get_objects())

    extract_features(*loaded, images[:1], masks[:1])
    gc.collect()
    gc.disable()
    try:
        before = tensors()
        extract_features(*loaded, images, masks, batch_size=1)
        assert tensors() == before
    finally:
        gc.enable()


def test_images_without_a_mask_have_no_structure(loaded, scenes, features):
    images, masks = zip(*scenes, strict=True)
    some = extract_features(*loaded, images, [None, *masks[1:3], np.zeros_like(masks[3]), *masks[4:]])
    undefined = np.isnan(some.structure).all(axis=(1, 2)) & np.isnan(some.encoder_structure).all(axis=1)
    assert undefined.tolist() == [True, False, False, True, False, False, False]
    np.testing.assert_allclose(some.pooled, features.pooled, rtol=1e-4, atol=2e-5)


def test_a_mask_of_another_size_and_grey_images_are_accepted(loaded, scenes, features):
    image, mask = scenes[0]
    large = extract_features(*loaded, [image], [np.kron(mask, np.ones((3, 3), dtype=np.uint8))])
    np.testing.assert_allclose(large.structure[0], features.structure[0], atol=1e-4, equal_nan=True)
    assert np.isfinite(extract_features(*loaded, [Image.new("L", (50, 40), 128)], [None]).pooled).all()


@pytest.mark.parametrize(
    ("masks", "message"),
    [
        ([], "2 images and 0 masks"),
        ([None, np.zeros((64, 32), dtype=np.uint8)], r"mask of image 1 has shape \(64, 32\)"),
        ([None, np.zeros((0, 0), dtype=np.uint8)], "mask of image 1 has shape"),
        ([np.full((64, 64), -3), None], "negative"),
    ],
)
def test_wrong_masks_are_one_clear_line(loaded, masks, message):
    with pytest.raises(DataError, match=message) as caught:
        extract_features(*loaded, [Image.new("RGB", (64, 64))] * 2, masks)
    assert "\n" not in str(caught.value)


def test_a_mask_under_a_cropping_processor_needs_a_square_image(loaded):
    processor = SimpleNamespace(image_processor=SimpleNamespace(do_center_crop=True))
    with pytest.raises(DataError, match="can't be aligned"):
        extract_features(loaded[0], processor, [Image.new("RGB", (64, 32))], [np.zeros((32, 64), dtype=np.uint8)])


def test_a_model_with_nan_weights_is_refused(tiny_export):
    model = AutoModelForImageTextToText.from_pretrained(tiny_export)
    with torch.no_grad():
        model.model.language_model.layers[1].mlp.down_proj.weight[0, 0] = torch.nan
    with pytest.raises(ModelError, match="NaN"):
        extract_features(model, AutoProcessor.from_pretrained(tiny_export), [Image.new("RGB", (64, 64))], [None])


def test_saved_features_load_equal_and_damage_is_reported(features, tmp_path):
    path = tmp_path / "shard.safetensors"
    features.save(path)
    loaded_again = ProbeFeatures.load(path)
    for name in ("pooled", "encoder_pooled", "structure", "encoder_structure"):
        np.testing.assert_array_equal(getattr(loaded_again, name), getattr(features, name))
    assert loaded_again.structure_metrics == STRUCTURE_METRICS
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(StoreError, match=r"shard\.safetensors: no probe features"):
        ProbeFeatures.load(path)
    with pytest.raises(StoreError, match="not found"):
        ProbeFeatures.load(tmp_path / "absent.safetensors")


def test_parts_concatenate_in_order_and_only_of_one_shape(features):
    both = ProbeFeatures.concatenate([features, features])
    assert len(both) == 14
    np.testing.assert_array_equal(both.pooled[7:], features.pooled)
    shorter = ProbeFeatures(
        features.pooled[:, :3], features.encoder_pooled, features.structure[:, :3], features.encoder_structure
    )
    with pytest.raises(DataError, match="different shapes"):
        ProbeFeatures.concatenate([features, shorter])
    with pytest.raises(DataError, match="no parts"):
        ProbeFeatures.concatenate([])
