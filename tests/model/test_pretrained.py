"""The shipped parts are the ones that their manifest describes."""

from __future__ import annotations

from prebench.config import load_preset
from prebench.data.questions import LETTER_SUFFIX, SHORT_SUFFIX
from prebench.model.builder import PRETRAINED, build_model, build_processor, build_tokenizer
from prebench.runtime import file_hash
from prebench.store import read_json


def test_files_match_the_manifest():
    manifest = read_json(PRETRAINED / "manifest.json")
    assert set(manifest["files"]) == {"vision_tower/model.safetensors", "tokenizer/tokenizer.json"}
    for name, expected in manifest["files"].items():
        assert file_hash(PRETRAINED / name) == expected, name
    assert min(manifest["accuracies"].values()) > 0.9
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
    assert any(name.startswith("model.vision_tower") for name in same)
    assert "lm_head.weight" not in same and "model.multi_modal_projector.linear_1.weight" not in same


def test_text_and_visual_tokens_start_at_the_configured_scales():
    config = load_preset("embedded").model
    model = build_model(config, build_tokenizer(), 0)
    assert abs(model.get_input_embeddings().weight.std().item() / config.language_model.embedding_std - 1) < 0.05
    processor = build_processor(config.vision_tower, build_tokenizer())
    assert processor.image_processor.size["height"] == config.vision_tower.image_size
