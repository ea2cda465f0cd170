"""Probe rows from features: agreement with scikit-learn on real features, and the definitions of the structure rows."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from transformers import AutoModelForImageTextToText, AutoProcessor

from prebench.data.scenes import BACKGROUNDS, FILLS, generate_scene, render
from prebench.errors import DataError
from prebench.probe.extract import ProbeFeatures, extract_features
from prebench.probe.summary import probe_rows
from tests.probe.test_global_probe import reference_accuracy

SIZES = {"train": 300, "val": 100, "test": 200}


@dataclass(frozen=True)
class Attribute:
    name: str
    kind: str


ATTRIBUTES = [Attribute("background", "unasked"), Attribute("fill", "unasked"), Attribute("num_objects", "asked")]


@pytest.fixture(scope="module")
def subsets() -> np.ndarray:
    return np.repeat(list(SIZES), list(SIZES.values()))


@pytest.fixture(scope="module")
def scenes():
    return [generate_scene(0, "probe", index) for index in range(sum(SIZES.values()))]


@pytest.fixture(scope="module")
def labels(scenes) -> dict[str, np.ndarray]:
    return {
        "background": np.array([BACKGROUNDS.index(scene.background) for scene in scenes]),
        "fill": np.array([FILLS.index(scene.fill) for scene in scenes]),
        "num_objects": np.array([len(scene.objects) for scene in scenes]),
    }


@pytest.fixture(scope="module")
def features(tiny_export: Path, scenes) -> ProbeFeatures:
    images, masks = zip(*[render(scene) for scene in scenes], strict=True)
    model = AutoModelForImageTextToText.from_pretrained(tiny_export)
    return extract_features(model, AutoProcessor.from_pretrained(tiny_export), images, masks, batch_size=50)


@pytest.fixture(scope="module")
def rows(features, labels, subsets):
    return probe_rows(features, labels, subsets, ATTRIBUTES)


def test_accuracies_agree_with_scikit_learn_on_extracted_features(rows, features, labels, subsets):
    for attribute in ATTRIBUTES:
        found = {row.layer: row.value for row in rows if row.attribute == attribute.name and row.metric == "accuracy"}
        assert sorted(found) == [-1, 0, 1, 2, 3, 4]
        for layer, value in found.items():
            chosen = features.encoder_pooled if layer < 0 else features.pooled[:, layer]
            data = [p[subsets == s] for s in SIZES for p in (chosen[:, None], labels[attribute.name])]
            assert value == pytest.approx(reference_accuracy(data, 0), abs=0.0051), (attribute.name, layer)
    background = [r.value for r in rows if r.attribute == "background" and r.metric == "accuracy"]
    assert min(background) > 0.15  # chance is one in twelve: the agreement has content


def test_global_rows_name_kind_depth_and_test_images(rows):
    chosen = [row for row in rows if row.level == "global"]
    assert {row.n for row in chosen} == {200} and {row.num_layers for row in chosen} == {4}
    assert {(row.attribute, row.kind) for row in chosen} == {(a.name, a.kind) for a in ATTRIBUTES}
    controls = [row for row in chosen if row.metric == "shuffled_label_accuracy"]
    assert {row.layer for row in controls} == {-1, 2}
    assert all(row.value < 0.25 for row in controls if row.attribute == "background")


def test_structure_rows_are_means_over_the_test_images(rows, features, subsets):
    at = {(row.layer, row.metric): row for row in rows if row.level == "patch"}
    assert {layer for layer, _ in at} == {-1, 0, 1, 2, 3, 4}
    test = features.structure[subsets == "test", 3].astype(np.float64)
    cohesion, coupling, centred_cohesion, centred_coupling, auc = test.mean(axis=0)
    assert at[3, "cohesion"].value == pytest.approx(cohesion)
    assert at[3, "coupling"].value == pytest.approx(coupling)
    assert at[3, "contrast_ratio"].value == pytest.approx(cohesion / coupling)
    assert at[3, "centred_difference"].value == pytest.approx(centred_cohesion - centred_coupling)
    assert at[3, "auc"].value == pytest.approx(auc)
    assert {(row.attribute, row.kind, row.n) for row in at.values()} == {("", "", 200)}


def test_undefined_structure_gives_smaller_n_or_no_row(features, labels, subsets):
    structure, encoder = features.structure.copy(), features.encoder_structure.copy()
    structure[-50:, :, 1:] = np.nan  # no second object in the last 50 test images
    encoder[:] = np.nan
    changed = ProbeFeatures(features.pooled, features.encoder_pooled, structure, encoder)
    rows = [row for row in probe_rows(changed, labels, subsets, []) if row.level == "patch"]
    n = {row.metric: row.n for row in rows if row.layer == 1}
    assert n == {"cohesion": 200, "coupling": 150, "auc": 150, "contrast_ratio": 150, "centred_difference": 150}
    assert not [row for row in rows if row.layer == -1]
    values = {row.metric: row.value for row in rows if row.layer == 1}
    both = structure[subsets == "test", 1][:150].astype(np.float64)
    assert values["contrast_ratio"] == pytest.approx(both[:, 0].mean() / both[:, 1].mean())


def test_rows_are_the_same_on_every_call(rows, features, labels, subsets):
    assert probe_rows(features, labels, subsets, ATTRIBUTES) == rows


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda labels, subsets: labels.pop("fill"), "'fill': the data set has no such labels"),
        (lambda labels, subsets: labels.update(fill=labels["fill"][:-1]), "labels of shape"),
        (lambda labels, subsets: labels.update(fill=np.eye(600)), "labels of shape"),
        (lambda labels, subsets: labels.update(fill=np.zeros(600, dtype=int)), "'fill': .*one class only"),
        (lambda labels, subsets: subsets.__setitem__(0, "dev"), "dev"),
        (lambda labels, subsets: subsets.__setitem__(slice(None), "train"), "no val images"),
    ],
)
def test_wrong_labels_are_one_clear_line(features, labels, subsets, change, message):
    labels, subsets = dict(labels), subsets.copy()
    change(labels, subsets)
    with pytest.raises(DataError, match=message) as caught:
        probe_rows(features, labels, subsets, ATTRIBUTES)
    assert "\n" not in str(caught.value)
