"""The anchor "external": another vision model's features, patch by patch, computed once."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch.nn import functional as F
from transformers import BitImageProcessor, Dinov2Config, Dinov2Model, ResNetConfig, ResNetModel

from prebench.config import load_preset, load_suite, validate
from prebench.errors import ModelError
from prebench.model.visual_states import VisualStates
from prebench.pipeline import train_all
from prebench.schema import PredictiveConfig, StudyConfig
from prebench.store import read_jsonl
from prebench.study import open_study, runs
from prebench.train.external import VisionModel
from prebench.train.features import COMPUTED, FeatureCache
from prebench.train.regularizers.predictive import PredictiveRegularizer
from tests.conftest import TINY
from tests.train.conftest import RECIPE

SIDE = 8


def save(folder: Path, model: Any) -> Path:
    model.save_pretrained(folder)
    BitImageProcessor(
        size={"shortest_edge": 70}, crop_size={"height": 56, "width": 56}, image_mean=[0.5] * 3, image_std=[0.5] * 3
    ).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def dino(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    config = Dinov2Config(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, image_size=56, patch_size=14
    )
    return save(tmp_path_factory.mktemp("dino") / "model", Dinov2Model(config))


def pictures() -> list[Image.Image]:
    left = Image.new("RGB", (96, 96), "black")
    left.paste((255, 255, 255), (0, 0, 24, 96))
    return [left, Image.new("RGB", (64, 64), "red")]


def test_a_vits_patches_are_resampled_and_its_class_token_left_out(dino: Path) -> None:
    model = VisionModel(dino)
    found = model.features(pictures(), SIDE)
    assert found.shape == (2, SIDE * SIDE, 16) and found.dtype == torch.float16
    pixels = torch.stack([torch.tensor(list(p.resize((56, 56), 3).getdata())).float() for p in pictures()])
    pixels = (pixels.transpose(1, 2).unflatten(2, (56, 56)) / 255 - 0.5) / 0.5
    reference = Dinov2Model.from_pretrained(dino).eval()
    with torch.inference_mode():
        patches = reference(pixels).last_hidden_state[:, 1:]
    grid = patches.transpose(1, 2).unflatten(2, (4, 4))
    expected = F.interpolate(grid, size=(SIDE, SIDE), mode="bilinear").flatten(2).transpose(1, 2)
    torch.testing.assert_close(found.float(), expected, atol=2e-2, rtol=2e-2)


def test_a_convolutional_net_keeps_the_places(tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic")
    model = VisionModel(save(tmp_path / "model", ResNetModel(config)))
    grid = model.features(pictures(), SIDE).float().unflatten(1, (SIDE, SIDE))
    columns = grid[0].var(dim=0).mean(dim=-1), grid[0].var(dim=1).mean(dim=-1)
    assert columns[1].mean() > 3 * columns[0].mean(), "the picture differs from left to right, not from top to bottom"


def test_the_loss_is_the_cosine_with_these_features() -> None:
    generator = torch.Generator().manual_seed(1)
    features = FeatureCache(["a", "b"], torch.randn(2, 4, 6, generator=generator).half())
    config = PredictiveConfig(weight=0.5, layer=2, anchor="external", anchor_model="folder")
    term = PredictiveRegularizer(
        config, hidden_size=8, anchor_size=features.width, depth=4, generator=generator, external=features
    )
    states = VisualStates(torch.ones(2, 4, dtype=torch.bool))
    for layer in (0, 2):
        states.record(layer, torch.randn(2, 4, 8, generator=generator))
    image_of_token = torch.arange(2).repeat_interleave(4)
    loss = term(states, torch.empty(2, 4, 3), image_of_token, ("b", "a"))
    anchor = features.get(["b", "a"]).flatten(0, 1).float()
    expected = -F.cosine_similarity(term.predictors[0](states.at(2)), anchor, dim=-1).sum() / 4
    torch.testing.assert_close(loss, expected)


def test_the_features_are_computed_once_for_all_runs(dino: Path, tmp_path: Path) -> None:
    block = {"weight": 0.5, "anchor": "external", "anchor_model": str(dino)}
    variants = [{"name": name, "regularizer": block | {"layer": layer}} for name, layer in (("a", 1), ("b", 2))]
    preset = load_preset("smoke").model_dump() | {"model": TINY.model_dump(), "train": RECIPE}
    preset["data"] = {"scenes": {"num_images": 12, "questions_per_image": 2}}
    values = {"name": "s", "preset": preset, "suite": load_suite("smoke"), "variants": variants, "seeds": (0,)}
    config = validate(StudyConfig, values, "study")
    for part in (config.variants[:1], config.variants):
        asked = config.model_copy(update={"variants": part})
        train_all(tmp_path / "s", open_study(tmp_path / "s", asked), jobs=1)
    assert len(list((tmp_path / "s" / "runs").glob("*/model/prebench.json"))) == 2
    lines = list(read_jsonl(tmp_path / "s" / "cache" / COMPUTED))
    assert [line["images"] for line in lines] == [12]
    logs = [list(read_jsonl(run.folder / "train.jsonl")) for run in runs(tmp_path / "s", config)]
    assert all(-1 <= line["pre_loss"] <= 1 for lines in logs for line in lines)
    assert logs[0][0]["pre_loss"] != logs[1][0]["pre_loss"]


@pytest.mark.parametrize(("broken", "reason"), [("none", "no config.json"), ("weights", "can't be loaded")])
def test_a_folder_without_a_vision_model_is_refused(tmp_path: Path, broken: str, reason: str) -> None:
    if broken == "weights":
        (tmp_path / "config.json").write_text('{"model_type": "dinov2"}')
    with pytest.raises(ModelError, match=reason):
        VisionModel(tmp_path).features(pictures(), SIDE)
