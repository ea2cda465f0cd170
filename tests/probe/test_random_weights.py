"""The control "random weights": the language model alone changes, by its seed, and the rows are the changed model's."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from transformers import AutoModelForImageTextToText, AutoProcessor

from prebench.data.scenes import generate_scene, render
from prebench.model.visual_states import language_model
from prebench.probe.data import Attribute, ProbeData
from prebench.probe.extract import extract_features
from prebench.probe.random_weights import randomise_language_model
from prebench.probe.standalone import Settings, probe_model
from prebench.probe.summary import probe_rows
from tests.model.tiny_models import ARCHITECTURES


def drawn(model, seed):
    randomise_language_model(model, seed)
    return {name: value.clone() for name, value in model.state_dict().items()}


@pytest.mark.parametrize("name", list(ARCHITECTURES))
def test_every_matrix_of_the_language_model_is_drawn_anew_and_nothing_else(name):
    model = ARCHITECTURES[name]().model
    before = {key: value.clone() for key, value in model.state_dict().items()}
    state = torch.get_rng_state()
    first, again, other = drawn(model, 0), drawn(model, 0), drawn(model, 1)
    assert torch.equal(torch.get_rng_state(), state)
    matrices = {id(p) for p in language_model(model).parameters() if p.ndim > 1}
    for key, parameter in model.state_dict(keep_vars=True).items():
        assert torch.equal(first[key], again[key]), key
        inside = id(parameter) in matrices
        assert torch.equal(first[key], before[key]) is not inside, key
        assert torch.equal(first[key], other[key]) is not inside, key


def test_the_rows_are_those_of_the_changed_model_above_layer_zero(tiny_export):
    scenes = [generate_scene(0, "probe", index) for index in range(60)]
    images, masks = zip(*[render(scene) for scene in scenes], strict=True)
    labels = {"count": np.array([len(scene.objects) > 3 for scene in scenes]).astype(int)}
    subsets = np.repeat(["train", "val", "test"], [30, 10, 20])
    attributes = (Attribute("count"),)
    data = ProbeData("scenes", images, masks, labels, subsets, attributes, True, "")
    model, processor = (kind.from_pretrained(tiny_export) for kind in (AutoModelForImageTextToText, AutoProcessor))
    rows, _ = probe_model(model, processor, data, Settings(seed=3))
    prefix = "random_weights_"
    found = {(r.layer, r.level, r.metric.removeprefix(prefix)): r.value for r in rows if prefix in r.metric}

    model = AutoModelForImageTextToText.from_pretrained(tiny_export)
    randomise_language_model(model, 3)
    features = extract_features(model, processor, images, masks)
    direct = probe_rows(features, labels, subsets, attributes)
    metrics = {"accuracy", "cohesion", "coupling", "auc", "contrast_ratio", "centred_difference"}
    above = [row for row in direct if row.layer > 0 and row.level in ("global", "patch")]
    expected = {(r.layer, r.level, r.metric): r.value for r in above if r.metric in metrics}
    assert found == pytest.approx(expected) and len(found) == 4 * len(metrics)
    own = {(r.layer, r.level, r.metric): r.value for r in rows}
    assert all(abs(own[key] - value) > 1e-6 for key, value in found.items() if key[2] == "cohesion")
    same = {
        (r.layer, r.level): r.value for r in direct if r.metric == "cohesion" and r.level == "patch" and r.layer <= 0
    }
    assert {key: own[*key, "cohesion"] for key in same} == pytest.approx(same) and len(same) >= 2
