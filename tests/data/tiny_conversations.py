"""A word tokenizer whose ids can be told by hand, and small sets of conversations as files."""

# ruff: noqa: S106, SIM905  (tokens of text, not of access; words are easier to read in one string)

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import LlavaProcessor, PreTrainedTokenizerFast, SiglipImageProcessor

from prebench.data.chat_templates import VICUNA
from prebench.schema import DataConfig

SYSTEM = (
    "A ▁chat ▁between ▁a ▁curious ▁user ▁and ▁an ▁artificial ▁intelligence ▁assistant. ▁The ▁assistant ▁gives "
    "▁helpful, ▁detailed, ▁and ▁polite ▁answers ▁to ▁the ▁user's ▁questions."
).split()
WORDS = (
    "<unk> <pad> <s> </s> <image> ⏎ ▁ USER: ▁USER: ▁ASSISTANT: ▁it is ▁is ▁red? ▁blue? what what? ▁what? ▁why? why? "
    "yes ▁yes ▁no no ▁a a ▁cat. cat. ▁two ▁cats. cats. ▁left ▁right. be ▁be ▁brief."
).split()
VOCABULARY = {token: i for i, token in enumerate(dict.fromkeys(WORDS + SYSTEM))}
NUM_IMAGE_TOKENS = 4


def tiny_processor(template: str = VICUNA) -> LlavaProcessor:
    """Words, white space in front of them and line breaks are tokens; pictures of 32 pixels are four."""
    tokenizer = Tokenizer(
        models.WordLevel({token.replace("⏎", "\n"): i for token, i in VOCABULARY.items()}, unk_token="<unk>")
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex("\n"), "isolated"),
            pre_tokenizers.Metaspace(prepend_scheme="never"),
        ]
    )
    tokenizer.decoder = decoders.Metaspace(prepend_scheme="never")
    special = ["<pad>", "<s>", "</s>", "<image>"]
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special])
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        additional_special_tokens=["<image>"],
    )
    return LlavaProcessor(
        image_processor=SiglipImageProcessor(size={"height": 32, "width": 32}),
        tokenizer=fast,
        patch_size=16,
        vision_feature_select_strategy="full",
        chat_template=template,
        image_token="<image>",
    )


def golden(text: str) -> tuple[list[int], list[int]]:
    """Return (input_ids, labels) of tokens written down: SYS and IMG stand for several, [...] encloses targets."""
    input_ids: list[int] = []
    labels: list[int] = []
    learn = False
    for word in text.split():
        learn = learn or word.startswith("[")
        name = word.removeprefix("[").removesuffix("]")
        tokens = {"SYS": SYSTEM, "IMG": ["<image>"] * NUM_IMAGE_TOKENS}.get(name, [name])
        ids = [VOCABULARY[token] for token in tokens]
        input_ids += ids
        labels += ids if learn else [-100] * len(ids)
        learn = learn and not word.endswith("]")
    return input_ids, labels


def picture(seed: int = 0, size: tuple[int, int] = (40, 24)) -> bytes:
    """Return a PNG of noise."""
    pixels = np.random.default_rng(seed).integers(0, 255, (size[1], size[0], 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


def turns(*texts: str) -> list[dict[str, str]]:
    """Return alternating human and gpt turns of LLaVA's JSON."""
    return [{"from": ("human", "gpt")[i % 2], "value": text} for i, text in enumerate(texts)]


def write_records(folder: Path, records: list[Any], name: str = "data.json") -> Path:
    """Write LLaVA's JSON, with pictures of the names `coco/0.png` .. `coco/9.png` beside it."""
    (folder / "coco").mkdir(parents=True, exist_ok=True)
    for number in range(10):
        path = folder / "coco" / f"{number}.png"
        if not path.exists():
            path.write_bytes(picture(number))
    path = folder / name
    lines = [json.dumps(record) for record in records]
    path.write_text("\n".join(lines) if name.endswith("l") else "[" + ",\n".join(lines) + "]")
    return path


def llava_config(path: Path, **changes: Any) -> DataConfig:
    """Return the data block of one JSON file for both stages."""
    block = {"type": "llava_json", "path": str(path)} | changes.pop("block", {})
    return DataConfig.model_validate({"align": [block], "instruct": [block]} | changes)


def good_records(number: int, every_text_only: int = 4) -> list[dict[str, Any]]:
    """Return records of several lengths, each fourth without a picture."""
    found = []
    for i in range(number):
        more = ["why?", "no"] * (i % 3)
        if i % every_text_only == every_text_only - 1:
            found.append({"id": i, "conversations": turns("what is it?", "a cat.", *more)})
        else:
            found.append(
                {"id": i, "image": f"coco/{i % 10}.png", "conversations": turns("<image>\nis it red?", "yes", *more)}
            )
    return found
