"""The shipped parts are the ones that their manifest describes."""

from __future__ import annotations

import pytest
import torch

from prebench.config import load_preset
from prebench.data.questions import LETTER_SUFFIX, SHORT_SUFFIX
from prebench.data.scenes import generate_scene, render
from prebench.model.builder import build_model, build_processor, build_tokenizer, vision_features
from prebench.model.sources import PRETRAINED
from prebench.runtime import file_hash
from prebench.store import read_json


def test_files_match_the_manifest():
    manifest = read_json(PRETRAINED / "manifest.json")
    parts = [path for part in ("tokenizer", "vision_tower", "language_model") for path in (PRETRAINED / part).iterdir()]
    assert set(manifest["files"]) == {path.relative_to(PRETRAINED).as_posix() for path in parts}
    for name, expected in manifest["files"].items():
        assert file_hash(PRETRAINED / name) == expected, name
    assert min(manifest["accuracies"]["vision_tower"].values()) > 0.98
    answered = dict(manifest["accuracies"]["language_model"])
    assert answered.pop("multiple_choice") > 0.5  # the one type that text alone did not teach (docs/experiments.md)
    assert min(answered.values()) > 0.95
    assert sum(path.stat().st_size for path in PRETRAINED.rglob("*")) < 10_000_000


def test_the_tokenizer_encodes_any_text_and_fixed_prompts_as_one_token():
    tokenizer = build_tokenizer()
    for text in (SHORT_SUFFIX, LETTER_SUFFIX):
        assert len(tokenizer.encode(text, add_special_tokens=False)) == 1
    for text in ("is there a red circle?" + SHORT_SUFFIX, "Дом 家 ñ\t\n", "A. red\nB. blue"):
        assert tokenizer.decode(tokenizer.encode(text, add_special_tokens=False)) == text


def test_a_start_is_a_function_of_the_seed():
    config = load_preset("embedded").model
    tokenizer = build_tokenizer()
    first, again, other = (build_model(config, tokenizer, seed).state_dict() for seed in (0, 0, 1))
    assert all((first[name] == again[name]).all() for name in first)
    same = [name for name in first if (first[name] == other[name]).all()]
    # Tower and language model are shipped; the projector is what differs between seeds.
    assert set(first) - set(same) == {
        f"model.multi_modal_projector.{name}" for name in ("linear_1.weight", "linear_1.bias", "linear_2.weight")
    }


def test_text_and_visual_tokens_start_at_the_configured_scales():
    config = load_preset("embedded").model
    tokenizer = build_tokenizer()
    processor = build_processor(config.vision_tower, tokenizer)
    assert processor.image_processor.size["height"] == config.vision_tower.image_size
    pictures = [render(generate_scene(5, "train", index))[0] for index in range(64)]
    pixels = processor.image_processor(pictures, return_tensors="pt")["pixel_values"]
    model = build_model(config, tokenizer, 0)
    visual = model.model.multi_modal_projector(vision_features(model, pixels))
    assert visual.std().item() == pytest.approx(config.projector_std, rel=0.1)
    scratch = config.model_copy(
        update={"language_model": config.language_model.model_copy(update={"pretrained": None})}
    )
    embeddings = build_model(scratch, tokenizer, 0).get_input_embeddings().weight
    assert embeddings.std().item() == pytest.approx(config.language_model.embedding_std, rel=0.05)


def test_no_direction_of_the_towers_output_is_lost_at_the_start():
    """The tower's variance is mostly background and colour; the projector's first layer starts with an even hand."""
    config = load_preset("embedded").model
    model = build_model(config, build_tokenizer(), 0)
    processor = build_processor(config.vision_tower, build_tokenizer())
    pictures = [render(generate_scene(5, "train", index))[0] for index in range(64)]
    pixels = processor.image_processor(pictures, return_tensors="pt")["pixel_values"]
    features = vision_features(model, pixels).flatten(0, 1)

    def participation_ratio(tokens):
        values = torch.linalg.eigvalsh(torch.cov(tokens.T)).clamp(min=0)
        return (values.sum() ** 2 / values.square().sum()).item()

    first = model.model.multi_modal_projector.linear_1
    assert participation_ratio(first(features).detach()) > 1.5 * participation_ratio(features)
