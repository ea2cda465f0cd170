"""Probe rows from features: agreement with scikit-learn on real features, and the definitions of the structure rows."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from transformers import AutoModelForImageTextToText, AutoProcessor

from prebench.data.scenes import BACKGROUNDS, FILLS, generate_scene, render
from prebench.errors import DataError
from prebench.probe.extract import ProbeFeatures, extract_features
from prebench.probe.similarity import Representation, cknna, linear_cka
from prebench.probe.spectrum import statistics
from prebench.probe.summary import _AttributeProbe, accuracy_interval, probe_rows
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
def with_pixels(tiny_export: Path, scenes) -> ProbeFeatures:
    images, masks = zip(*[render(scene) for scene in scenes], strict=True)
    model = AutoModelForImageTextToText.from_pretrained(tiny_export)
    return extract_features(model, AutoProcessor.from_pretrained(tiny_export), images, masks, batch_size=50)


@pytest.fixture(scope="module")
def features(with_pixels) -> ProbeFeatures:
    return dataclasses.replace(with_pixels, pixels=None)  # their probe takes longer than all the others


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


def test_few_shot_rows_stand_where_every_class_has_images(features, labels, subsets):
    two = np.arange(600) % 2  # 150 of each in training
    rare = np.where(np.arange(600) % 90 == 0, 1, two * 2)  # one class of 7 training images
    classes = {"two": two, "rare": rare, "all": np.repeat(np.arange(20), 30)}
    attributes = [Attribute(name, "asked") for name in classes]
    subsets = np.tile(np.repeat(["train", "val", "test"], [15, 5, 10]), 20)
    rows = [row for row in probe_rows(features, classes, subsets, attributes) if "per_class" in row.metric]
    found = {(row.attribute, row.metric) for row in rows}
    ten, hundred = "accuracy_10_per_class", "accuracy_100_per_class"
    assert found == {("two", ten), ("two", hundred), ("all", ten)}
    assert {row.layer for row in rows} == {-1, 0, 1, 2, 3, 4} and {row.n for row in rows} == {200}


def test_a_few_shot_probe_is_one_on_these_images_alone(features, labels, subsets):
    """Adding training images of which none is drawn changes nothing; the same images are drawn for every layer."""
    rows = probe_rows(features, labels, subsets, ATTRIBUTES[1:2])
    few = {r.layer: r.value for r in rows if r.metric == "accuracy_10_per_class"}
    probe = _AttributeProbe(features, labels["fill"], subsets, ATTRIBUTES[1])
    chosen = probe._few(10)
    assert np.bincount(labels["fill"][chosen]).tolist() == [10] * len(FILLS) and (subsets[chosen] == "train").all()
    for layer, value in few.items():
        values = features.encoder_pooled if layer < 0 else features.pooled[:, layer]
        parts = [chosen, *(subsets == s for s in ("val", "test"))]
        data = [p[part] for part in parts for p in (values[:, None], labels["fill"])]
        assert value == pytest.approx(reference_accuracy(data, 0), abs=0.0051), layer


def test_raw_pixels_are_a_control_of_their_own(with_pixels, labels, subsets):
    some = dataclasses.replace(with_pixels, pixels=with_pixels.pixels[:, ::5])
    (row,) = [r for r in probe_rows(some, labels, subsets, ATTRIBUTES[2:]) if r.metric == "raw_pixel_accuracy"]
    assert (row.attribute, row.layer, row.n) == ("num_objects", -1, 200)
    data = [p[subsets == s] for s in SIZES for p in (some.pixels[:, None], labels["num_objects"])]
    assert row.value == pytest.approx(reference_accuracy(data, 0), abs=0.0051)


def test_rows_without_labels_stand_at_every_layer(rows, features):
    at = {(row.level, row.metric, row.layer): row for row in rows}
    layers = [-1, 0, 1, 2, 3, 4]
    for layer in layers:
        moments, index = (features.encoder_moments, 0) if layer < 0 else (features.moments, layer)
        for metric, value in statistics(moments, index).items():
            assert at["statistics", metric, layer].value == value and at["statistics", metric, layer].n == 600
        own = features.encoder_pooled if layer < 0 else features.pooled[:, layer]
        for name, other in (("layer_0", features.pooled[:, 0]), ("encoder", features.encoder_pooled)):
            pair = [Representation(lambda part, v=v: v[part], 600) for v in (own, other)]
            assert at["similarity", f"cka_{name}", layer].value == pytest.approx(linear_cka(*pair))
            assert at["similarity", f"cknna_{name}", layer].value == pytest.approx(cknna(own, other))
    assert at["similarity", "cka_layer_0", 0].value == pytest.approx(1)
    assert at["lm_head", "token_entropy", 4].n == 600 * 8
    assert at["model", "image_tokens_see_the_question", 0].value == 0


def test_rows_do_not_depend_on_how_many_layers_fit_memory(rows, features, labels, subsets, monkeypatch):
    monkeypatch.setattr("prebench.probe.global_probe.CHUNK_BYTES", 1)
    alone = probe_rows(features, labels, subsets, ATTRIBUTES)
    assert [dataclasses.replace(row, value=0) for row in alone] == [dataclasses.replace(r, value=0) for r in rows]
    np.testing.assert_allclose([row.value for row in alone], [row.value for row in rows], atol=0.0051)


def test_wilson_intervals():
    """Known values: Wilson (1927) for 8 of 10 and 0 of 20."""
    assert accuracy_interval(0.8, 10) == pytest.approx((0.4902, 0.9433), abs=1e-4)
    assert accuracy_interval(0.0, 20) == pytest.approx((0, 0.1611), abs=1e-4)


def test_every_accuracy_has_its_interval_and_nothing_else_has_one(rows):
    assert {row.level for row in rows} > {"global", "patch"}
    for row in rows:
        if row.level == "global":
            assert (row.low, row.high) == accuracy_interval(row.value, row.n) and row.low <= row.value <= row.high
        else:
            assert row.low is None and row.high is None


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


def test_few_images_and_empty_masks_are_said_in_a_line_each(features, labels, caplog: pytest.LogCaptureFixture):
    few = np.repeat(["train", "val", "test"], [31, 269, 300])
    empty = dataclasses.replace(features, structure=np.full_like(features.structure, np.nan))
    empty = dataclasses.replace(empty, encoder_structure=np.full_like(features.encoder_structure, np.nan))
    rows = probe_rows(empty, labels, few, ATTRIBUTES[:1])
    assert not [row for row in rows if row.level == "patch"]
    first, second = [record.getMessage() for record in caplog.records]
    assert first.startswith("probe attribute 'background': 31 training images for 32 features;")
    assert second == "probe: no test image has a mask with two patches of objects; there is no patch structure"
