"""Patch structure by object and category: by hand, whatever the order of the images, and from the real pass."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForImageTextToText, AutoProcessor

from prebench.data.scenes import generate_scene, render
from prebench.errors import DataError
from prebench.probe.by_object import object_rows
from prebench.probe.extract import extract_features
from prebench.probe.features import ProbeFeatures

NUMBER = 12
CATEGORIES = [["cat", "dog"], ["dog", "cat"], ["cat"]]


def features(objects: np.ndarray, ids: list[tuple[int, int]]) -> ProbeFeatures:
    """Features of three images and one decoder layer, of which only the objects matter."""
    n = 3
    return ProbeFeatures(
        pooled=np.zeros((n, 2, 4), dtype=np.float32),
        encoder_pooled=np.zeros((n, 4), dtype=np.float32),
        structure=np.full((n, 2, 5), np.nan, dtype=np.float32),
        encoder_structure=np.full((n, 5), np.nan, dtype=np.float32),
        objects=objects.astype(np.float32),
        object_ids=np.asarray(ids, dtype=np.int64).reshape(-1, 2),
    )


@pytest.fixture
def known() -> ProbeFeatures:
    """Encoder and layer 0 are NaN; at layer 1 each object has its own values."""
    values = np.full((5, 3, 4), np.nan)
    values[:, 2] = [
        [0.9, 0.3, 0.8, 0.1],
        [0.5, 0.1, 0.4, 0.0],
        [0.7, 0.2, 0.6, 0.2],
        [np.nan, 0.2, np.nan, 0.1],
        [1, 1, 1, 1],
    ]
    return features(values, [(0, 1), (0, 2), (1, 1), (1, 2), (2, 1)])


def values(rows, level, name=""):
    return {
        row.metric: (row.layer, pytest.approx(row.value, abs=1e-6), row.n)
        for row in rows
        if (row.level, row.attribute) == (level, name)
    }


def test_every_object_counts_once_and_ratios_are_of_means(known):
    rows = object_rows(known, np.array([True, True, False]), CATEGORIES)  # the third image trains
    assert {row.level for row in rows} == {"object", "category"}
    assert values(rows, "object") == {
        "cohesion": (1, 0.7, 3),
        "coupling": (1, 0.2, 4),
        "contrast_ratio": (1, 0.7 / 0.2, 3),
        "centred_difference": (1, 0.5, 3),
    }
    assert values(rows, "category", "dog") == {
        "cohesion": (1, 0.6, 2),
        "coupling": (1, 0.15, 2),
        "contrast_ratio": (1, 4.0, 2),
        "centred_difference": (1, 0.4, 2),
    }
    assert values(rows, "category", "cat")["coupling"] == (1, 0.25, 2)
    assert {row.level for row in object_rows(known, np.full(3, True), None)} == {"object"}


def test_older_features_and_none_at_all_give_no_rows(known):
    chosen = np.full(3, True)
    assert object_rows(dataclasses.replace(known, objects=None, object_ids=None), chosen, None) == []
    assert object_rows(features(np.zeros((0, 3, 4)), []).take(np.array([2, 1, 0])), chosen, None) == []


def test_an_object_without_a_category_is_named(known):
    with pytest.raises(DataError, match=r"image 1 has object 2, but 1 categories"):
        object_rows(known, np.full(3, True), [["cat", "dog"], ["dog"], ["cat"]])


def test_order_parts_and_files_change_nothing(tiny_export: Path, tmp_path: Path):
    model = AutoModelForImageTextToText.from_pretrained(tiny_export)
    processor = AutoProcessor.from_pretrained(tiny_export)
    scenes = [generate_scene(0, "probe", index) for index in range(NUMBER)]
    images, masks = (list(part) for part in zip(*(render(scene) for scene in scenes), strict=True))
    masks[3] = None
    categories = [[item.shape for item in scene.objects] for scene in scenes]
    chosen = np.arange(NUMBER) >= 2
    whole = extract_features(model, processor, images, masks, batch_size=5)
    expected = object_rows(whole, chosen, categories)
    assert {row.layer for row in expected} == {-1, 0, 1, 2, 3, 4}
    assert {row.attribute for row in expected if row.level == "category"} <= {s for own in categories for s in own}
    assert 3 not in whole.object_ids[:, 0] and whole.objects.shape[1:] == (6, 4)

    backwards = [*range(6, NUMBER), *range(6)]
    parts = []
    for number, some in enumerate((backwards[:5], backwards[5:])):
        part = extract_features(model, processor, [images[i] for i in some], [masks[i] for i in some], batch_size=3)
        part.save(tmp_path / f"{number}.safetensors")
        parts.append(ProbeFeatures.load(tmp_path / f"{number}.safetensors"))
    joined = ProbeFeatures.concatenate(parts).take(np.argsort(backwards))
    found = object_rows(joined, chosen, categories)
    assert [dataclasses.replace(row, value=0) for row in found] == [
        dataclasses.replace(row, value=0) for row in expected
    ]
    np.testing.assert_allclose([row.value for row in found], [row.value for row in expected], atol=1e-5)

    one = extract_features(model, processor, images[:1], masks[:1])
    direct = torch.tensor(one.objects[:, 1:, 0]).nanmean(dim=0)
    by_layer = {row.layer: row.value for row in object_rows(one, np.array([True]), None) if row.metric == "cohesion"}
    assert [by_layer[layer] for layer in range(5)] == pytest.approx(direct.tolist())
    none = extract_features(model, processor, images[:2], [None, None])
    assert none.objects.shape == (0, 6, 4) and object_rows(none, np.array([True, True]), categories[:2]) == []
