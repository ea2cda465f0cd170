"""Tiny random instances of what the published presets name, as the folders that the Hub would give."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import transformers as hf
from PIL import Image
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

from prebench.config import load_preset
from prebench.schema import PresetConfig

TEXTS = [
    "A chat between a curious user and an artificial intelligence assistant. USER: ASSISTANT: system user assistant",
    "what color is the circle? is it red? yes no a red circle. You are a helpful assistant.",
]
WIDTH = {"hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 24}
CHATML = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]


def tiny_preset(name: str, folder: Path, **changes: Any) -> PresetConfig:
    """Return a shipped preset with narrow parts: depth, picture size, templates, formats and stages are its own."""
    shape = load_preset(name).model
    tower, language = folder / "tower", folder / "language"
    write_tower(tower, shape.vision_tower)
    rows = write_language_model(language, shape.language_model)
    pretraining, tuning = write_conversations(folder / "data")
    overrides = {f"model.vision_tower.{k}": v for k, v in WIDTH.items()}
    overrides |= {f"model.language_model.{k}": v for k, v in WIDTH.items()}
    overrides |= {
        "model.vision_tower.pretrained": tower,
        "model.language_model.pretrained": language,
        "model.language_model.num_key_value_heads": 1 if shape.language_model.num_key_value_heads else "null",
        "model.language_model.vocab_size": rows,
        "data.align": json.dumps([llava_block(pretraining, prompt="plain")]),
        "data.instruct": json.dumps([llava_block(tuning)]),
        "data.num_workers": 0,
        "train.cpu_threads": 1,
        "train.dtype": "float32",
        "train.align.steps": 1,
        "train.instruct.steps": 1,
        "train.align.warmup_steps": 0,
        "train.instruct.warmup_steps": 0,
        "train.align.batch_size": 2,
        "train.instruct.batch_size": 2,
        "train.align.gradient_accumulation_steps": 1,
        "train.instruct.gradient_accumulation_steps": 1,
    }
    return load_preset(name, [f"{key}={value}" for key, value in (overrides | changes).items()])


def llava_block(path: Path, **changes: Any) -> dict[str, Any]:
    return {"type": "llava_json", "path": str(path), "image_root": str(path.parent)} | changes


def write_tower(folder: Path, shape: Any) -> None:
    """Write an encoder with its text tower, as CLIP and SigLIP2 are published, and its image processor."""
    sizes = WIDTH | {"num_hidden_layers": shape.num_hidden_layers}
    vision = sizes | {"image_size": shape.image_size, "patch_size": shape.patch_size}
    text = WIDTH | {"num_hidden_layers": 1, "vocab_size": 99, "max_position_embeddings": 16}
    side = shape.image_size
    if shape.architecture == "clip":
        config: Any = hf.CLIPConfig(text_config=text, vision_config=vision, projection_dim=8)
        model: Any = hf.CLIPModel(config)
        resizer: Any = hf.CLIPImageProcessor(size={"shortest_edge": side}, crop_size={"height": side, "width": side})
    else:
        config = hf.SiglipConfig(text_config=text, vision_config=vision)
        model = hf.SiglipModel(config)
        resizer = hf.SiglipImageProcessor(size={"height": side, "width": side})
    model.save_pretrained(folder)
    resizer.save_pretrained(folder)


def write_language_model(folder: Path, shape: Any) -> int:
    """Write a causal language model and its tokenizer; return the rows of its embeddings."""
    tokenizer = letters() if shape.chat_template == "vicuna" else byte_pairs()
    tokenizer.save_pretrained(folder)
    # Qwen's embeddings have rows to spare; Vicuna's have to grow for the image token.
    rows = len(tokenizer) + (0 if shape.chat_template == "vicuna" else 9)
    kinds: dict[str, Any] = {
        "llama": (hf.LlamaConfig, hf.LlamaForCausalLM),
        "qwen2": (hf.Qwen2Config, hf.Qwen2ForCausalLM),
    }
    config_class, model_class = kinds[shape.architecture]
    config = config_class(
        **WIDTH,
        num_hidden_layers=shape.num_hidden_layers,
        num_key_value_heads=1 if shape.num_key_value_heads else 2,
        vocab_size=rows,
        max_position_embeddings=4096,
        rope_theta=5000.0,
        tie_word_embeddings=shape.tie_word_embeddings,
    )
    model_class(config).save_pretrained(folder)
    return rows


def byte_pairs() -> Any:
    """Return a byte-level tokenizer with the special tokens of ChatML, as Qwen2.5 and SmolLM2 have."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(TEXTS, trainers.BpeTrainer(vocab_size=320, initial_alphabet=alphabet))
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in CHATML])
    return hf.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="<|im_end|>",  # noqa: S106
        pad_token="<|endoftext|>",  # noqa: S106
    )


def letters() -> Any:
    """Return a Llama tokenizer of letters, with no token to pad with, as Vicuna's."""
    pieces = ["<unk>", "<s>", "</s>", "\u2581", "\n", *sorted(set("".join(TEXTS)) - {" "})]
    return hf.LlamaTokenizer(vocab={piece: row for row, piece in enumerate(pieces)}, merges=[])


def write_conversations(folder: Path) -> tuple[Path, Path]:
    """Write LLaVA's two files: captions, and conversations of which one has no picture."""
    (folder / "coco").mkdir(parents=True)
    for number in range(2):
        Image.new("RGB", (60, 40 + 30 * number), (200, 30, 30)).save(folder / "coco" / f"{number}.png")
    pictures = [{"id": str(n), "image": f"coco/{n}.png"} for n in range(2)]
    captions = [p | {"conversations": _turns("<image>\nwhat is it?", "a red circle.")} for p in pictures]
    talks = [p | {"conversations": _turns("<image>\nis it red?", "yes", "what color?", "red.")} for p in pictures]
    talks.append({"id": "text", "conversations": _turns("is it red?", "no")})
    for name, records in (("captions", captions), ("talks", talks)):
        (folder / f"{name}.json").write_text(json.dumps(records))
    return folder / "captions.json", folder / "talks.json"


def _turns(*texts: str) -> list[dict[str, str]]:
    return [{"from": ("human", "gpt")[i % 2], "value": text} for i, text in enumerate(texts)]
