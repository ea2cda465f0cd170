"""Published language models and their processors: configuration, chat template, the image token's row.

A preset states the shape; the files have to agree, so that what `prebench plan` computes is what is trained.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoModelForCausalLM,
    AutoTokenizer,
    CLIPImageProcessor,
    LlamaConfig,
    LlavaProcessor,
    PreTrainedConfig,
    PreTrainedTokenizerFast,
    Qwen2Config,
    SiglipImageProcessor,
)

from prebench.data.chat_templates import VICUNA
from prebench.errors import ModelError, first_line
from prebench.model.sources import require_safetensors
from prebench.model.tokenizer import IMAGE_TOKEN
from prebench.schema import LanguageModelConfig, VisionTowerConfig

ROWS = 64
"""Embeddings grow to a multiple of it."""
CLASSES: dict[str, Any] = {"llama": LlamaConfig, "qwen2": Qwen2Config}

_CHATML = (
    "{% if messages[0]['role'] != 'system' and SYSTEM %}{{ '<|im_start|>system\\n' + SYSTEM + '<|im_end|>\\n' }}"
    "{% endif %}{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' }}"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}"
    "{% for part in message['content'] %}{% if part['type'] == 'image' %}{{ '<image>\\n' }}{% endif %}{% endfor %}"
    "{% for part in message['content'] %}{% if part['type'] == 'text' %}{{ part['text'] }}{% endif %}{% endfor %}"
    "{% endif %}{{ '<|im_end|>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)


def published_template(config: LanguageModelConfig) -> str:
    """Return the chat template: Vicuna's as in LLaVA-1.5, or ChatML with pictures first in their turn."""
    if config.chat_template == "vicuna":
        return VICUNA
    return _CHATML.replace("SYSTEM", json.dumps(config.system_prompt or ""))


def shape_config(config: LanguageModelConfig) -> PreTrainedConfig:
    """Return the configuration that a preset's shape alone gives: enough to count, not to load."""
    return CLASSES[config.architecture](
        vocab_size=config.vocab_size,
        hidden_size=config.hidden_size,
        intermediate_size=config.intermediate_size,
        num_hidden_layers=config.num_hidden_layers,
        num_attention_heads=config.num_attention_heads,
        num_key_value_heads=config.num_key_value_heads or config.num_attention_heads,
        tie_word_embeddings=config.tie_word_embeddings,
    )


def read_config(folder: Path, config: LanguageModelConfig) -> PreTrainedConfig:
    """Return the configuration of a published model's folder.

    Raises:
        ModelError: it can't be read, or differs from what the preset states.
    """
    try:
        found = AutoConfig.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
    except (OSError, ValueError, KeyError) as error:
        raise ModelError(f"{folder}/config.json: can't be read ({first_line(error)})") from error
    if found.model_type != config.architecture:
        raise ModelError(
            f"{folder}: a {found.model_type} model; model.language_model.architecture: {config.architecture}"
        )
    expected = shape_config(config)
    names = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    for name in (*names, "num_key_value_heads", "tie_word_embeddings"):
        if getattr(found, name) != getattr(expected, name):
            values = f"{name} is {getattr(found, name)}, model.language_model has {getattr(expected, name)}"
            raise ModelError(f"{folder}/config.json: {values}")
    return found


def padded_vocabulary(rows: int, tokens: int) -> int:
    """Return the rows of the embeddings once the tokenizer has `tokens` tokens, the image token included."""
    return rows if tokens <= rows else -(-tokens // ROWS) * ROWS


@torch.no_grad()
def load_language_model(folder: Path, config: LanguageModelConfig, tokenizer: Any) -> Any:
    """Return the published model in float32 on the CPU, with a row for the image token.

    New rows start at the mean of the others; the image token's is never read, for features take its place.

    Raises:
        ModelError: the weights can't be read, or there are only pickled ones.
    """
    found = read_config(folder, config)
    require_safetensors(folder)
    try:
        model = AutoModelForCausalLM.from_pretrained(
            folder, config=found, dtype=torch.float32, use_safetensors=True, local_files_only=True
        )
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        raise ModelError(f"{folder}: the language model can't be read ({first_line(error)})") from error
    rows = found.vocab_size
    wanted = padded_vocabulary(rows, len(tokenizer))
    if wanted > rows:
        model.resize_token_embeddings(wanted, mean_resizing=False)
        for layer in {id(m): m for m in (model.get_input_embeddings(), model.get_output_embeddings())}.values():
            layer.weight[rows:] = layer.weight[:rows].mean(0)
    return model


def published_processor(folder: Path, config: LanguageModelConfig, tower: VisionTowerConfig, files: Path | None) -> Any:
    """Return the processor: the model's own tokenizer with the image token, the tower's own image processor.

    Args:
        folder: of the language model.
        config: its block.
        tower: the vision tower's block.
        files: the tower's folder; None, or one without `preprocessor_config.json`, gives its architecture's processor.

    Raises:
        ModelError: the tokenizer or image processor can't be read, or the pictures' size differs from the preset's.
    """
    clip = tower.architecture == "clip"
    return LlavaProcessor(
        image_processor=_image_processor(tower, files),
        tokenizer=published_tokenizer(folder),
        patch_size=tower.patch_size,
        vision_feature_select_strategy="default" if clip else "full",
        num_additional_image_tokens=1 if clip else 0,
        chat_template=published_template(config),
        image_token=IMAGE_TOKEN,
    )


def published_tokenizer(folder: Path) -> PreTrainedTokenizerFast:
    """Return a published model's tokenizer with the image token and a token to pad with.

    Raises:
        ModelError: it can't be read.
    """
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
    except (OSError, ValueError, KeyError, ImportError) as error:
        raise ModelError(f"{folder}: the tokenizer can't be read ({first_line(error)})") from error
    tokenizer.add_special_tokens({"additional_special_tokens": [IMAGE_TOKEN]})
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.unk_token or tokenizer.eos_token
    return tokenizer


def _image_processor(tower: VisionTowerConfig, files: Path | None) -> Any:
    side = tower.image_size
    if files is None or not (files / "preprocessor_config.json").is_file():
        if tower.architecture == "clip":
            return CLIPImageProcessor(size={"shortest_edge": side}, crop_size={"height": side, "width": side})
        return SiglipImageProcessor(size={"height": side, "width": side}, resample=3, do_convert_rgb=True)
    try:
        found = AutoImageProcessor.from_pretrained(files, trust_remote_code=False, local_files_only=True)
    except (OSError, ValueError, KeyError) as error:
        raise ModelError(f"{files}: the image processor can't be read ({first_line(error)})") from error
    sizes = found.crop_size if getattr(found, "do_center_crop", None) else found.size
    if (sizes.get("height"), sizes.get("width")) != (side, side):
        raise ModelError(
            f"{files}/preprocessor_config.json: makes {dict(sizes)}; model.vision_tower.image_size: {side}"
        )
    return found
