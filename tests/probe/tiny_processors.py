"""Processors for the tiny models: transformers' own classes around a tokenizer of a hundred words."""

from __future__ import annotations

from typing import Any

import transformers as hf
from tokenizers import Tokenizer, models, pre_tokenizers

from tests.model.tiny_models import IMAGE, PINPOINTS, VIDEO

SIDE = {"height": 16, "width": 16}
TEMPLATE = (
    "{% for m in messages %}<s>user : {% for part in m['content'] %}{% if part['type'] == 'image' %}IMAGE"
    "{% else %}{{ part['text'] }}{% endif %}{% endfor %} </s>{% endfor %}"
)
WORDS = ["<pad>", "<s>", "</s>", "<unk>", "user", ":", "what", "is", "this", "?", "red", "blue", "a", "and", "here"]
MARKS = ["<fake_token_around_image>", "<global-img>", "<end_of_utterance>", "<boi>", "<eoi>", "<img>", "</img>"]
MARKS += [f"<row_{row}_col_{col}>" for row in range(1, 4) for col in range(1, 4)]
NAMED = ("start_image_token", "end_image_token", "boi_token", "eoi_token", "context_image_token")


def tokenizer(image: str = "<image>", **named: str) -> Any:
    """A tokenizer of single words; `named` are attributes such as `boi_token`."""
    words = dict(enumerate(WORDS)) | dict(enumerate(MARKS, start=30)) | {IMAGE: image, VIDEO: "<video>"}
    vocab = {words.get(i, f"w{i}"): i for i in range(100)}
    raw = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))  # noqa: S106
    raw.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    special = {"image_token": image, "video_token": "<video>"} | named
    return hf.PreTrainedTokenizerFast(
        tokenizer_object=raw,
        pad_token="<pad>",  # noqa: S106
        bos_token="<s>",  # noqa: S106
        eos_token="</s>",  # noqa: S106
        unk_token="<unk>",  # noqa: S106
        additional_special_tokens=[image, "<video>", *MARKS],
        extra_special_tokens=special,
    )


def _template(image: str = "<image>") -> str:
    return TEMPLATE.replace("IMAGE", image)


def llava() -> Any:
    images = hf.SiglipImageProcessor(size=SIDE)
    return hf.LlavaProcessor(
        images, tokenizer(), patch_size=4, vision_feature_select_strategy="full", chat_template=_template()
    )


def llava_clip() -> Any:
    images = hf.CLIPImageProcessor(size={"shortest_edge": 16}, crop_size=SIDE)
    return hf.LlavaProcessor(
        images,
        tokenizer(),
        patch_size=4,
        vision_feature_select_strategy="default",
        chat_template=_template(),
        num_additional_image_tokens=1,
    )


def llava_next() -> Any:
    images = hf.LlavaNextImageProcessor(size={"shortest_edge": 16}, crop_size=SIDE, image_grid_pinpoints=PINPOINTS)
    return hf.LlavaNextProcessor(
        images,
        tokenizer(),
        patch_size=4,
        vision_feature_select_strategy="default",
        chat_template=_template(),
        num_additional_image_tokens=1,
    )


def llava_onevision() -> Any:
    images = hf.LlavaOnevisionImageProcessor(size=SIDE, image_grid_pinpoints=PINPOINTS)
    return hf.LlavaOnevisionProcessor(
        images,
        tokenizer(),
        hf.LlavaOnevisionVideoProcessor(),
        num_image_tokens=16,
        vision_feature_select_strategy="full",
        chat_template=_template(),
    )


def _qwen(kind: Any, videos: Any) -> Any:
    size = {"shortest_edge": 64, "longest_edge": 1024}
    images = hf.Qwen2VLImageProcessor(patch_size=4, merge_size=2, temporal_patch_size=1, size=size)
    pad = "<|image_pad|>"
    return kind(images, tokenizer(pad), videos, chat_template=_template(f"<img> {pad} </img>"))


def qwen2_vl() -> Any:
    return _qwen(hf.Qwen2VLProcessor, hf.Qwen2VLVideoProcessor())


def qwen2_5_vl() -> Any:
    return _qwen(hf.Qwen2_5_VLProcessor, hf.Qwen2VLVideoProcessor())


def qwen3_vl() -> Any:
    return _qwen(hf.Qwen3VLProcessor, hf.Qwen3VLVideoProcessor())


def internvl() -> Any:
    images = hf.GotOcr2ImageProcessor(size=SIDE, crop_to_patches=True, min_patches=1, max_patches=3)
    named = {"start_image_token": "<img>", "end_image_token": "</img>", "context_image_token": "<IMG_CONTEXT>"}
    words = tokenizer("<IMG_CONTEXT>", **named)
    return hf.InternVLProcessor(
        images, words, hf.InternVLVideoProcessor(), image_seq_length=4, chat_template=_template("<IMG_CONTEXT>")
    )


def idefics3() -> Any:
    images = hf.Idefics3ImageProcessor(size={"longest_edge": 32}, max_image_size={"longest_edge": 16})
    return hf.Idefics3Processor(images, tokenizer(), image_seq_len=4, chat_template=_template())


def paligemma() -> Any:
    images = hf.SiglipImageProcessor(size=SIDE)
    images.image_seq_length = 16
    return hf.PaliGemmaProcessor(images, tokenizer())


def gemma3() -> Any:
    images = hf.Gemma3ImageProcessor(size=SIDE)
    words = tokenizer("<image>", boi_token="<boi>", eoi_token="<eoi>")  # noqa: S106
    return hf.Gemma3Processor(images, words, chat_template=_template("<boi>"), image_seq_length=4)


PROCESSORS = {
    build.__name__: build
    for build in (
        llava,
        llava_clip,
        llava_next,
        llava_onevision,
        qwen2_vl,
        qwen2_5_vl,
        qwen3_vl,
        internvl,
        idefics3,
        paligemma,
        gemma3,
    )
} | {"smolvlm": idefics3}
"""SmolVLM's processor needs a package of its own for video; its images are Idefics3's."""
