"""Config to model: a stock LlavaForConditionalGeneration and its processor, with scales at which a small LM learns."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import (
    AutoConfig,
    CLIPVisionConfig,
    CLIPVisionModel,
    LlamaConfig,
    LlamaForCausalLM,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedConfig,
    PreTrainedTokenizerFast,
    SiglipImageProcessor,
    SiglipVisionConfig,
    SiglipVisionModel,
)
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.models.llava.modeling_llava import LlavaMultiModalProjector
from transformers.utils import logging as transformers_logging

from prebench.data.scenes import generate_scene, render
from prebench.errors import ModelError, first_line
from prebench.model.published import load_language_model, published_processor, read_config
from prebench.model.sources import PRETRAINED, check_part, part_folder, require_safetensors
from prebench.model.tokenizer import CHAT_TEMPLATE, IMAGE_TOKEN
from prebench.runtime import derive_seed
from prebench.schema import LanguageModelConfig, ModelConfig, VisionTowerConfig

NUM_START_IMAGES = 128
TOWERS: dict[str, Any] = {"siglip": SiglipVisionModel, "clip": CLIPVisionModel}
WHITENING_FLOOR = 0.05
"""Added to the eigenvalues, in units of their mean, so that noise is not blown up."""


def build_tokenizer(folder: Path = PRETRAINED / "tokenizer") -> PreTrainedTokenizerFast:
    """Load the shipped tokenizer (made by `prebench pretrain`).

    Raises:
        ModelError: it is missing or damaged.
    """
    if not (folder / "tokenizer.json").is_file():
        raise ModelError(f"{folder}: no tokenizer.json; `prebench pretrain` makes it")
    check_part(folder)
    return PreTrainedTokenizerFast.from_pretrained(folder)


def model_processor(config: ModelConfig) -> LlavaProcessor:
    """Return the processor of a preset's model: the shipped tokenizer, or that of a published language model.

    Raises:
        ModelError: its files are missing or damaged, or differ from the preset.
    """
    tower, language = config.vision_tower, config.language_model
    if not language.has_own_tokenizer:
        return build_processor(tower, build_tokenizer())
    assert language.pretrained is not None, "the schema asks for it"
    published = tower.pretrained not in (None, "embedded")
    files = part_folder("vision_tower", str(tower.pretrained), tower.revision) if published else None
    folder = part_folder("language_model", language.pretrained, language.revision)
    return published_processor(folder, language, tower, files)


def build_processor(config: VisionTowerConfig, tokenizer: PreTrainedTokenizerFast) -> LlavaProcessor:
    """Return the processor: SigLIP's normalisation at the tower's size, and the chat template."""
    image_processor = SiglipImageProcessor(
        size={"height": config.image_size, "width": config.image_size},
        resample=3,
        image_mean=[0.5, 0.5, 0.5],
        image_std=[0.5, 0.5, 0.5],
        do_convert_rgb=True,
    )
    return LlavaProcessor(
        image_processor=image_processor,
        tokenizer=tokenizer,
        patch_size=config.patch_size,
        vision_feature_select_strategy="full",
        chat_template=CHAT_TEMPLATE,
        image_token=IMAGE_TOKEN,
    )


def vision_config(config: VisionTowerConfig) -> PreTrainedConfig:
    """Return the tower's configuration: CLIP's, or SigLIP's without its pooling head (LLaVA reads patch tokens)."""
    shape: dict[str, Any] = {
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_hidden_layers": config.num_hidden_layers,
        "num_attention_heads": config.num_attention_heads,
        "image_size": config.image_size,
        "patch_size": config.patch_size,
    }
    if config.architecture == "clip":
        return CLIPVisionConfig(**shape)
    return SiglipVisionConfig(**shape, vision_use_head=False)


def _special_token_ids(tokenizer: PreTrainedTokenizerFast) -> dict[str, Any]:
    return {name: getattr(tokenizer, name) for name in ("pad_token_id", "bos_token_id", "eos_token_id")}


def text_config(config: LanguageModelConfig, tokenizer: PreTrainedTokenizerFast) -> LlamaConfig:
    """Return the language model's configuration (a Llama with embeddings and LM head apart)."""
    return LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=config.hidden_size,
        intermediate_size=config.intermediate_size,
        num_hidden_layers=config.num_hidden_layers,
        num_attention_heads=config.num_attention_heads,
        num_key_value_heads=config.num_attention_heads,
        max_position_embeddings=config.max_position_embeddings,
        initializer_range=config.initializer_range,
        tie_word_embeddings=False,
        **_special_token_ids(tokenizer),
    )


def build_model(config: ModelConfig, tokenizer: PreTrainedTokenizerFast, seed: int) -> LlavaForConditionalGeneration:
    """Build the model in float32 on the CPU; the same seed gives the same bits.

    Tower and LM come from their `pretrained`, or start at random; the projector always starts at random. Embeddings and
    the projector's output start at the scales that the config names: visual and text tokens of very different norm
    leave a small LM at chance (docs/experiments.md).

    Raises:
        ModelError: a pretrained part is missing or damaged, or has another shape than the config.
    """
    if config.language_model.has_own_tokenizer:
        return _assemble(config, tokenizer, seed)
    llava_config = _llava_config(config, text_config(config.language_model, tokenizer), tokenizer)
    generator = torch.Generator().manual_seed(derive_seed("model", seed))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(derive_seed("model", seed))
        model = LlavaForConditionalGeneration(llava_config)
    embeddings: Any = model.get_input_embeddings()
    embeddings.weight.data.normal_(0.0, config.language_model.embedding_std, generator=generator)
    for part in ("vision_tower", "language_model"):
        block = getattr(config, part)
        if block.pretrained is not None:
            _load_part(model, part, block)
    _start_projector(model, config, generator)
    model.generation_config.update(**_special_token_ids(tokenizer))
    return model.float()


def _llava_config(config: ModelConfig, text: PreTrainedConfig, tokenizer: PreTrainedTokenizerFast) -> LlavaConfig:
    tower = config.vision_tower
    return LlavaConfig(
        vision_config=vision_config(tower),
        text_config=text,
        image_token_index=tokenizer.convert_tokens_to_ids(IMAGE_TOKEN),
        image_seq_length=tower.num_tokens,
        vision_feature_layer=tower.feature_layer,
        vision_feature_select_strategy="default" if tower.architecture == "clip" else "full",
        tie_word_embeddings=config.language_model.tie_word_embeddings,
        **_special_token_ids(tokenizer),
    )


def _assemble(config: ModelConfig, tokenizer: PreTrainedTokenizerFast, seed: int) -> LlavaForConditionalGeneration:
    """Put published parts together, each in memory once: only the projector, and a tower without files, are drawn."""
    block = config.language_model
    assert block.pretrained is not None, "the schema asks for it"
    folder = part_folder("language_model", block.pretrained, block.revision)
    read_config(folder, block)  # a wrong folder is named before gigabytes are read
    language = load_language_model(folder, block, tokenizer)
    llava_config = _llava_config(config, language.config, tokenizer)
    with torch.device("meta"):
        model = LlavaForConditionalGeneration(llava_config)
    inner: Any = model.model
    generator = torch.Generator().manual_seed(derive_seed("model", seed))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(derive_seed("model", seed))
        inner.vision_tower = TOWERS[config.vision_tower.architecture](llava_config.vision_config)
        inner.multi_modal_projector = LlavaMultiModalProjector(llava_config)
    inner.language_model, model.lm_head = language.model, language.lm_head
    if config.vision_tower.pretrained is not None:
        _load_part(model, "vision_tower", config.vision_tower)
    _start_projector(model, config, generator)
    model.generation_config.update(**_special_token_ids(tokenizer))
    return model.float()


def _load_part(model: LlavaForConditionalGeneration, part: str, block: VisionTowerConfig | LanguageModelConfig) -> None:
    """Copy a pretrained part's weights into the model.

    Raises:
        ModelError: the folder is missing or damaged, or its shapes or settings differ from the config's.
    """
    assert block.pretrained is not None
    folder = part_folder(part, block.pretrained, block.revision)
    tower = part == "vision_tower"
    expected: Any = model.config.vision_config if tower else model.config.text_config
    settings: tuple[str, ...] = ("hidden_act", "layer_norm_eps", "num_attention_heads")
    if not tower:
        settings = ("hidden_act", "rms_norm_eps", "num_attention_heads", "num_key_value_heads", "rope_parameters")
    try:
        found = AutoConfig.from_pretrained(folder, trust_remote_code=False)
        if tower:
            found = getattr(found, "vision_config", found)  # CLIP and SigLIP are published with their text towers
        if found.model_type != expected.model_type:
            raise ModelError(f"{folder}: a {found.model_type} model; prebench builds {expected.model_type} here")
        for name in settings:
            if getattr(found, name) != getattr(expected, name):
                values = f"{name} is {getattr(found, name)}, model.{part} has {getattr(expected, name)}"
                raise ModelError(f"{folder}/config.json: {values}")
        require_safetensors(folder)
        kind = TOWERS[block.architecture] if tower else LlamaForCausalLM
        if tower and block.architecture == "siglip":
            found.vision_use_head = False
        with _without_remarks():  # on the text tower that is left out; shapes and names are compared below
            loaded: Any = kind.from_pretrained(folder, config=found, dtype=torch.float32, use_safetensors=True)
    except (OSError, ValueError, KeyError, SafetensorError) as error:
        raise ModelError(f"{folder}: the {part.replace('_', ' ')} can't be read ({first_line(error)})") from error
    inner: Any = model.model
    try:
        if tower:
            inner.vision_tower.load_state_dict(loaded.state_dict(), strict=True)
        else:
            inner.language_model.load_state_dict(loaded.model.state_dict(), strict=True)
            model.lm_head.load_state_dict(loaded.lm_head.state_dict(), strict=True)
    except RuntimeError as error:
        summary = str(error).splitlines()[1].strip() if "\n" in str(error) else str(error)
        raise ModelError(f"{folder}: the shape differs from model.{part}: {summary}") from error


@contextmanager
def _without_remarks() -> Iterator[None]:
    before = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(before)


@torch.no_grad()
def _start_projector(model: LlavaForConditionalGeneration, config: ModelConfig, generator: torch.Generator) -> None:
    """Let the projector start at random directions of whitened features, at the scale that the config names.

    A tower's output has few large directions (background, colour) and many small ones (shape, position). A plain random
    start passes these proportions on, and a small LM then learns what is small last, or never (docs/experiments.md).
    """
    projector: Any = model.model.multi_modal_projector
    if config.projector_std is None:
        return
    features = vision_features(model, _start_images(config.vision_tower.image_size)).flatten(0, 1)
    mean = features.mean(0)
    centred = features - mean
    values, vectors = torch.linalg.eigh(centred.T @ centred / len(features))
    whiten = vectors @ torch.diag((values + WHITENING_FLOOR * values.mean()).rsqrt()) @ vectors.T
    for linear in (projector.linear_1, projector.linear_2):
        nn.init.normal_(linear.weight, 0.0, linear.in_features**-0.5, generator=generator)
        nn.init.zeros_(linear.bias)
    projector.linear_1.weight.copy_(projector.linear_1.weight @ whiten)
    projector.linear_1.bias.copy_(-projector.linear_1.weight @ mean)
    projector.linear_2.weight.mul_(config.projector_std / projector(features).std())


def _start_images(size: int) -> Tensor:
    """Return pictures of the pretraining split, [NUM_START_IMAGES, 3, size, size] in -1..1: the same for every run."""
    pictures = [render(generate_scene(0, "pretrain", index))[0] for index in range(NUM_START_IMAGES)]
    pixels = torch.stack([torch.from_numpy(np.asarray(picture).copy()) for picture in pictures])
    images = pixels.permute(0, 3, 1, 2).float() / 127.5 - 1
    return images if images.shape[-1] == size else F.interpolate(images, size=(size, size), mode="bilinear")


@torch.no_grad()
def vision_features(model: LlavaForConditionalGeneration, pixel_values: Tensor) -> Tensor:
    """Return `encode_images` without gradients: the frozen tower's output."""
    return encode_images(model, pixel_values)


def encode_images(model: LlavaForConditionalGeneration, pixel_values: Tensor) -> Tensor:
    """Return the tower's output that the projector reads, [B, N_p, D_v], for images [B, 3, H, W]."""
    outputs = model.model.vision_tower(pixel_values, output_hidden_states=True, return_dict=True)
    layer = model.config.vision_feature_layer
    assert isinstance(layer, int)
    features: Tensor = outputs.hidden_states[layer]
    return features[:, 1:] if model.config.vision_feature_select_strategy == "default" else features


def encoded_images(projected: Tensor) -> dict[str, Any] | None:
    """Return projected features [I, N_p, D] as the model's argument `mm_encoder_outputs`; None without images."""
    return {"image": BaseModelOutputWithPooling(pooler_output=list(projected))} if len(projected) else None
