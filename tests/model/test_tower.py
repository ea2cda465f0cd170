"""A tower that does not fit is named before anything is trained."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from prebench.errors import ModelError
from prebench.model.builder import build_model, build_tokenizer
from prebench.model.sources import PRETRAINED, parts_hash
from prebench.schema import ModelConfig


def config(folder: Path, **changes) -> ModelConfig:
    return ModelConfig.model_validate({"vision_tower": {"pretrained": str(folder), **changes}})


@pytest.fixture
def tower(tmp_path: Path) -> Path:
    shutil.copytree(PRETRAINED / "vision_tower", tmp_path / "tower")
    return tmp_path / "tower"


def test_a_local_folder_is_read(tower):
    tokenizer = build_tokenizer()
    ours = build_model(config(tower), tokenizer, 0).state_dict()
    shipped = build_model(ModelConfig(), tokenizer, 0).state_dict()
    assert all((ours[name] == shipped[name]).all() for name in ours)
    assert parts_hash(config(tower)) == parts_hash(ModelConfig())


def test_other_weights_are_other_parts(tower):
    before = parts_hash(config(tower))
    weights = bytearray((tower / "model.safetensors").read_bytes())
    weights[-10] ^= 1
    (tower / "model.safetensors").write_bytes(bytes(weights))
    assert parts_hash(config(tower)) != before


def test_towers_that_do_not_fit_are_named(tower, tmp_path):
    tokenizer = build_tokenizer()
    with pytest.raises(ModelError, match="no vision tower here"):
        build_model(config(tmp_path / "none"), tokenizer, 0)
    with pytest.raises(ModelError, match=r"num_attention_heads is 4, model\.vision_tower has 8"):
        build_model(config(tower, num_attention_heads=8), tokenizer, 0)
    with pytest.raises(ModelError, match="shape differs"):
        build_model(config(tower, num_hidden_layers=2), tokenizer, 0)
    (tower / "model.safetensors").write_bytes(b"damaged")
    with pytest.raises(ModelError, match="can't be read"):
        build_model(config(tower), tokenizer, 0)
    (tower / "config.json").write_text('{"model_type": "clip_vision_model"}')
    with pytest.raises(ModelError, match="a clip_vision_model model"):
        build_model(config(tower), tokenizer, 0)
