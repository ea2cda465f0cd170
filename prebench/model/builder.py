"""Config to model: a stock LlavaForConditionalGeneration and its processor, with scales at which a small LM learns."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
    SiglipImageProcessor,
    SiglipVisionConfig,
    SiglipVisionModel,
)

from prebench.errors import ModelError, StoreError
from prebench.model.tokenizer import CHAT_TEMPLATE, IMAGE_TOKEN
from prebench.records import content_hash
from prebench.runtime import derive_seed, file_hash
from prebench.schema import ModelConfig, VisionTowerConfig
from prebench.store import read_json

PRETRAINED = Path(__file__).resolve().parent.parent / "pretrained"
MANIFEST = "manifest.json"


def parts_hash(config: VisionTowerConfig) -> str:
    """Return one content hash of the pretrained parts that a run starts from: tower and tokenizer.

    Raises:
        ModelError: the tower's folder is missing, or a part is damaged.
    """
    folders = [PRETRAINED / "tokenizer"]
    check_part(folders[0])
    if config.pretrained is not None:
        folders.append(tower_folder(config))
    files = [p for folder in folders for p in sorted(folder.iterdir()) if p.suffix in (".json", ".safetensors")]
    return content_hash([[path.name, file_hash(path)] for path in files])


def tower_folder(config: VisionTowerConfig) -> Path:
    """Return the folder of the pretrained tower.

    Raises:
        ModelError: there is none, or it is damaged.
    """
    folder = PRETRAINED / "vision_tower" if config.pretrained == "embedded" else Path(str(config.pretrained))
    if not (folder / "config.json").is_file():
        raise ModelError(f"{folder}: no vision tower here; `prebench pretrain` makes the embedded one")
    check_part(folder)
    return folder


def check_part(folder: Path) -> None:
    """Check a pretrained part's files against the manifest that `prebench pretrain` left beside it, where there is one.

    Raises:
        ModelError: a file is missing, or its content is another than when it was made.
    """
    path = folder.parent / MANIFEST
    if not path.is_file():
        return
    remedy = "install prebench again, or make the parts again with `prebench pretrain`"
    try:
        manifest = read_json(path)
        files = manifest["files"]
        expected = {name: files[name] for name in files if name.startswith(f"{folder.name}/")}
    except (StoreError, KeyError, TypeError) as error:
        raise ModelError(f"{path}: damaged; {remedy}") from error
    for name, known in expected.items():
        try:
            found = file_hash(folder.parent / name)
        except OSError as error:
            raise ModelError(f"{folder.parent / name}: {error.strerror}; {remedy}") from error
        if found != known:
            raise ModelError(f"{folder.parent / name}: damaged (hash {found}, {path} has {known}); {remedy}")


def build_tokenizer(folder: Path = PRETRAINED / "tokenizer") -> PreTrainedTokenizerFast:
    """Load the shipped tokenizer (made by `prebench pretrain`).

    Raises:
        ModelError: it is missing or damaged.
    """
    if not (folder / "tokenizer.json").is_file():
        raise ModelError(f"{folder}: no tokenizer.json; `prebench pretrain` makes it")
    check_part(folder)
    return PreTrainedTokenizerFast.from_pretrained(folder)


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


def vision_config(config: VisionTowerConfig) -> SiglipVisionConfig:
    """Return the SigLIP-type tower's configuration (no pooling head: LLaVA reads patch tokens)."""
    return SiglipVisionConfig(
        hidden_size=config.hidden_size,
        intermediate_size=config.intermediate_size,
        num_hidden_layers=config.num_hidden_layers,
        num_attention_heads=config.num_attention_heads,
        image_size=config.image_size,
        patch_size=config.patch_size,
        vision_use_head=False,
    )


def build_model(config: ModelConfig, tokenizer: PreTrainedTokenizerFast, seed: int) -> LlavaForConditionalGeneration:
    """Build the model in float32 on the CPU; the same seed gives the same bits.

    The tower's weights come from `config.vision_tower.pretrained`; projector and LM start at random. Embeddings and the
    projector's output start at the scales that the config names: visual and text tokens of very different norm leave a
    small LM at chance (docs/experiments.md).

    Raises:
        ModelError: the pretrained tower is missing or has another shape than the config.
    """
    language = config.language_model
    text_config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=language.hidden_size,
        intermediate_size=language.intermediate_size,
        num_hidden_layers=language.num_hidden_layers,
        num_attention_heads=language.num_attention_heads,
        num_key_value_heads=language.num_attention_heads,
        max_position_embeddings=language.max_position_embeddings,
        initializer_range=language.initializer_range,
        tie_word_embeddings=False,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    llava_config = LlavaConfig(
        vision_config=vision_config(config.vision_tower),
        text_config=text_config,
        image_token_index=tokenizer.convert_tokens_to_ids(IMAGE_TOKEN),
        image_seq_length=(config.vision_tower.image_size // config.vision_tower.patch_size) ** 2,
        vision_feature_layer=-1,
        vision_feature_select_strategy="full",
        tie_word_embeddings=False,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    generator = torch.Generator().manual_seed(derive_seed("model", seed))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(derive_seed("model", seed))
        model = LlavaForConditionalGeneration(llava_config)
    if config.vision_tower.pretrained is not None:
        load_vision_tower(model, config.vision_tower)
    _scale_start(model, config, generator)
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    model.generation_config.bos_token_id = tokenizer.bos_token_id
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    return model.float()


def load_vision_tower(model: LlavaForConditionalGeneration, config: VisionTowerConfig) -> None:
    """Copy pretrained weights into the model's vision tower.

    Raises:
        ModelError: the folder is missing or its shapes differ from the config's.
    """
    folder = tower_folder(config)
    expected = vision_config(config)
    try:
        found = AutoConfig.from_pretrained(folder, trust_remote_code=False)
        if found.model_type != expected.model_type:
            raise ModelError(f"{folder}: a {found.model_type} tower; prebench builds {expected.model_type} towers")
        for name in ("hidden_act", "layer_norm_eps", "num_attention_heads"):
            if getattr(found, name) != getattr(expected, name):
                raise ModelError(
                    f"{folder}/config.json: {name} is {getattr(found, name)}, model.vision_tower has "
                    f"{getattr(expected, name)}"
                )
        tower = SiglipVisionModel.from_pretrained(folder, dtype=torch.float32, use_safetensors=True)
    except (OSError, ValueError, KeyError, SafetensorError) as error:
        raise ModelError(f"{folder}: the vision tower can't be read ({str(error).splitlines()[0]})") from error
    try:
        model.model.vision_tower.load_state_dict(tower.state_dict(), strict=True)
    except RuntimeError as error:
        summary = str(error).splitlines()[1].strip() if "\n" in str(error) else str(error)
        raise ModelError(f"{folder}: the tower's shape differs from model.vision_tower: {summary}") from error


@torch.no_grad()
def _scale_start(model: LlavaForConditionalGeneration, config: ModelConfig, generator: torch.Generator) -> None:
    embeddings: Any = model.get_input_embeddings()
    embeddings.weight.normal_(0.0, config.language_model.embedding_std, generator=generator)
    projector: Any = model.model.multi_modal_projector
    for linear in (projector.linear_1, projector.linear_2):
        nn.init.normal_(linear.weight, 0.0, linear.in_features**-0.5, generator=generator)
        nn.init.zeros_(linear.bias)
    size = config.vision_tower.image_size
    images = torch.rand((8, 3, size, size), generator=generator) * 2 - 1
    output: Tensor = projector(vision_features(model, images))
    projector.linear_2.weight.mul_(config.projector_std / output.std())


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
