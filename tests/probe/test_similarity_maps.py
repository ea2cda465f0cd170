"""Similarity maps against transformers' hidden states, and which images and patches are shown."""

from __future__ import annotations

import datasets
import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor

from prebench.data.scenes import generate_scene, render
from prebench.evaluation.probe_task import probe_maps
from prebench.model.visual_states import capture
from prebench.probe.extract import prompt_inputs
from prebench.probe.patch_structure import assign_patches
from prebench.probe.similarity_maps import query_patches, shown_images, similarity_maps


@pytest.fixture(scope="module")
def loaded(tiny_export):
    return AutoModelForImageTextToText.from_pretrained(tiny_export), AutoProcessor.from_pretrained(tiny_export)


@pytest.fixture(scope="module")
def scenes():
    return [render(generate_scene(0, "probe", index)) for index in range(6)]


def test_maps_are_cosines_of_the_models_own_states(loaded, scenes):
    model, processor = loaded
    images, masks = zip(*scenes, strict=True)
    found = similarity_maps(model, processor, images, masks, [1, 4])
    assert [(m.image_id, m.layer) for m in found] == [
        (i, layer) for i in (1, 4) for _ in range(2) for layer in (0, 2, 4)
    ]
    for own in found:
        inputs, _ = prompt_inputs(model, processor, [images[own.image_id]])
        with torch.no_grad(), capture(model, inputs["input_ids"], [own.layer]) as states:
            model.base_model(**inputs)
        tokens = states.at(own.layer)
        raw = torch.cosine_similarity(tokens, tokens[own.query][None])
        np.testing.assert_allclose(own.cosine, raw, atol=1e-4)
        shifted = tokens - tokens.mean(dim=0)
        np.testing.assert_allclose(own.centred, torch.cosine_similarity(shifted, shifted[own.query][None]), atol=1e-4)
        assert own.cosine[own.query] == own.centred[own.query] == 1.0
        objects = assign_patches(masks[own.image_id], (8, 8))
        assert own.objects == objects.tolist() and own.object_id == objects[own.query] != 0


def test_the_tasks_documents_give_the_same_maps_from_test_images_alone(loaded, scenes):
    images, masks = zip(*scenes, strict=True)
    columns = {"image": images, "mask": [Image.fromarray(mask) for mask in masks]}
    columns["subset"] = ["train", "train", "test", "val", "test", "test"]
    documents = datasets.Dataset.from_dict({name: list(values) for name, values in columns.items()})
    documents = documents.cast_column("image", datasets.Image()).cast_column("mask", datasets.Image())
    assert probe_maps(*loaded, documents) == similarity_maps(*loaded, images, masks, [2, 4, 5])
    bare = probe_maps(*loaded, documents.remove_columns("mask"))
    assert [m.object_id for m in bare] == [0] * 9 and {m.query for m in bare} == {27}


def test_images_with_two_objects_come_first():
    one, two = np.array([[0, 1], [1, 1]]), np.array([[2, 0], [0, 1]])
    masks = [one, two, None, two, two, two]
    assert shown_images(masks, [0, 1, 2, 4, 5], count=2) == [1, 4]
    assert shown_images([one, None, one], [0, 1, 2], count=2) == [0, 1]


def test_a_query_lies_in_the_middle_of_its_object():
    objects = np.array([[0, 3, 3, 3, 0], [0, 3, 3, 3, 0], [0, 3, 3, 3, 0], [1, 1, 1, 0, 5]])
    assert query_patches(objects.reshape(-1), 4, 5) == [16, 7]
    assert query_patches(np.zeros(15, dtype=int), 3, 5) == [7]
