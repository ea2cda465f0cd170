"""What the benchmarks ask: generated scenes with questions, as rows of a data set, and a model of a real one's size."""

from __future__ import annotations

import io
import json
from pathlib import Path

import torch
from datasets import Dataset, Features, Image, Value
from transformers import LlamaConfig, LlavaConfig, LlavaForConditionalGeneration, PreTrainedTokenizerFast

from prebench.data.questions import ask
from prebench.data.scenes import generate_scene, render, scene_rng
from prebench.model.builder import build_processor, vision_config
from prebench.model.sources import PRETRAINED
from prebench.schema import VisionTowerConfig

SMOLLM2_135M = {
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "vocab_size": 49_152,
    "max_position_embeddings": 8192,
    "rms_norm_eps": 1e-5,
}
"""config.json of HuggingFaceTB/SmolLM2-135M."""
SMALL_TOWER = {
    "pretrained": None,
    "hidden_size": 192,
    "intermediate_size": 768,
    "num_hidden_layers": 4,
    "image_size": 224,
    "patch_size": 16,
}
"""196 patches; so small that the language model's compute dominates (a larger tower would only help the engine)."""


def documents(num_images: int, questions_per_image: int, first_scene: int = 0) -> Dataset:
    """Return one row per question, image by image: columns `image` (PNG) and `question`.

    Every row carries its picture, as in POPE or VQAv2, so that whoever reads a row decodes it.
    """
    rows: dict[str, list] = {"image": [], "question": []}
    for index in range(first_scene, first_scene + num_images):
        scene = generate_scene(0, "test", index)
        buffer = io.BytesIO()
        render(scene)[0].save(buffer, format="PNG")
        asked = ask(scene, scene_rng(0, "test", index, stream=9), questions_per_image)
        if len(asked) < questions_per_image:
            raise ValueError(f"scene {index} admits {len(asked)} questions only, not {questions_per_image}")
        rows["image"] += [{"bytes": buffer.getvalue(), "path": None}] * questions_per_image
        rows["question"] += [question.text + question.suffix for question in asked]
    return Dataset.from_dict(rows, features=Features({"image": Image(), "question": Value("string")}))


def export_smollm2(folder: Path) -> None:
    """Write a LLaVA of SmolLM2-135M's architecture with random weights and 196 visual tokens."""
    tokenizer = _tokenizer(SMOLLM2_135M["vocab_size"])
    tower = VisionTowerConfig.model_validate(SMALL_TOWER)
    special = {name: getattr(tokenizer, name) for name in ("pad_token_id", "bos_token_id", "eos_token_id")}
    config = LlavaConfig(
        vision_config=vision_config(tower),
        # Weights larger than usual (0.02): at that, every answer of a random model would repeat one token.
        text_config=LlamaConfig(**SMOLLM2_135M, initializer_range=0.06, tie_word_embeddings=True, **special),
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        image_seq_length=(tower.image_size // tower.patch_size) ** 2,
        vision_feature_layer=-1,
        vision_feature_select_strategy="full",
        tie_word_embeddings=True,
        **special,
    )
    torch.manual_seed(0)
    model = LlavaForConditionalGeneration(config)
    model.generation_config.update(**special)
    model.save_pretrained(folder)
    build_processor(tower, tokenizer).save_pretrained(folder)


def _tokenizer(vocab_size: int) -> PreTrainedTokenizerFast:
    """Return the shipped tokenizer with made-up words up to `vocab_size`: every id of a random model is text."""
    from tokenizers import Tokenizer

    shipped = PreTrainedTokenizerFast.from_pretrained(PRETRAINED / "tokenizer")
    values = json.loads(shipped.backend_tokenizer.to_str())
    for number in range(len(shipped), vocab_size):
        values["model"]["vocab"][f"Ġ{number}"] = number
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(json.dumps(values)),
        chat_template=shipped.chat_template,
        **{name: getattr(shipped, name) for name in ("pad_token", "bos_token", "eos_token")},
    )
