"""Tiny random instances of transformers' own multimodal classes, each with two prompts: text, one image, text."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import transformers as hf
from torch import Tensor

LAYERS = 3
IMAGE, VIDEO, START, END = 90, 91, 92, 93
TEXT = {
    "vocab_size": 100,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 512,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
VISION = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 16,
    "patch_size": 4,
}
QWEN_VISION = {"depth": 2, "num_heads": 2, "patch_size": 4, "spatial_merge_size": 2, "temporal_patch_size": 1}
GRIDS = [[1, 8, 4], [1, 4, 12]]
"""Rows and columns of patches of the two images of a Qwen-VL prompt: 8 and 12 visual tokens."""
NEXT_SIZES = [[8, 40], [30, 20]]
"""Heights and widths of the two images of a LLaVA-NeXT prompt."""


@dataclass(frozen=True)
class Tiny:
    """A model and the keyword arguments of a forward pass over two prompts."""

    model: Any
    inputs: dict[str, Any]
    newlines: list[list[int]] = field(default_factory=lambda: [[], []])
    """Which of an image's placeholders are line breaks."""
    name: str = ""

    @property
    def placeholders(self) -> Tensor:
        """Return where image features go, [2, T]."""
        return self.inputs["input_ids"] == self.model.config.image_token_id

    @property
    def mask(self) -> Tensor:
        """Return where visual tokens are, [2, T], as the test case defines them."""
        mask = self.placeholders
        for row, breaks in zip(mask, self.newlines, strict=True):
            row[row.nonzero()[breaks]] = False
        return mask


def _build(kind: Callable[..., Any], config: Any) -> Any:
    torch.manual_seed(0)
    return kind(config).eval()


def _prompts(*images: list[int]) -> dict[str, Tensor]:
    """Return ids and mask of [text, image, text] padded on the right, and where images are as `mm_token_type_ids`."""
    rows = [[1, 10 + i, *image, 20 + i, 21, 22] for i, image in enumerate(images)]
    width = max(map(len, rows))
    ids = torch.tensor([row + [0] * (width - len(row)) for row in rows])
    return {"input_ids": ids, "attention_mask": (ids != 0).long()}


def _pixels(*shape: int) -> Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(1)) * 2 - 1


def _siglip(**changes: Any) -> Any:
    return hf.SiglipVisionConfig(**VISION | {"vision_use_head": False} | changes)


def _parts(vision: Any, text: Any = None) -> dict[str, Any]:
    return {"vision_config": vision, "text_config": text or hf.LlamaConfig(**TEXT), "image_token_index": IMAGE}


def llava() -> Tiny:
    choice = {"vision_feature_layer": -1, "vision_feature_select_strategy": "full"}
    model = _build(hf.LlavaForConditionalGeneration, hf.LlavaConfig(**_parts(_siglip()), **choice))
    return Tiny(model, _prompts([IMAGE] * 16, [IMAGE] * 16) | {"pixel_values": _pixels(2, 3, 16, 16)})


def llava_clip() -> Tiny:
    """LLaVA-1.5's shape: CLIP with a class token that is dropped, the last layer but one."""
    model = _build(hf.LlavaForConditionalGeneration, hf.LlavaConfig(**_parts(hf.CLIPVisionConfig(**VISION))))
    return Tiny(model, _prompts([IMAGE] * 16, [IMAGE] * 16) | {"pixel_values": _pixels(2, 3, 16, 16)})


def _tiled(kind: Callable[..., Any], config: Any) -> Tiny:
    """Tiles of 4 x 4 tokens behind the whole view, 1 x 2 and 2 x 2 of them; padding is cut off, rows end in a break."""
    model = _build(kind, config)
    rows_cols = [(2, 8), (8, 6)]
    newlines = [[16 + row * (cols + 1) + cols for row in range(rows)] for rows, cols in rows_cols]
    images = [[IMAGE] * (16 + rows * (cols + 1)) for rows, cols in rows_cols]
    pixels = _pixels(2, 5, 3, 16, 16)
    pixels[0, 3:] = 0  # the processor pads the number of tiles
    inputs = _prompts(*images) | {"pixel_values": pixels, "image_sizes": torch.tensor(NEXT_SIZES)}
    return Tiny(model, inputs, newlines)


PINPOINTS = [[16, 32], [32, 16], [32, 32]]


def llava_next() -> Tiny:
    parts = _parts(hf.CLIPVisionConfig(**VISION))
    config = hf.LlavaNextConfig(**parts, image_grid_pinpoints=PINPOINTS, image_seq_length=16)
    return _tiled(hf.LlavaNextForConditionalGeneration, config)


def llava_onevision() -> Tiny:
    parts = _parts(_siglip(), hf.Qwen2Config(**TEXT))
    config = hf.LlavaOnevisionConfig(**parts, video_token_index=VIDEO, image_grid_pinpoints=PINPOINTS)
    return _tiled(hf.LlavaOnevisionForConditionalGeneration, config)


def _qwen(kind: Callable[..., Any], config_kind: Callable[..., Any], vision: dict[str, Any], mrope: list[int]) -> Tiny:
    rope = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": mrope}
    ids = {"image_token_id": IMAGE, "video_token_id": VIDEO, "vision_start_token_id": START, "vision_end_token_id": END}
    text = TEXT | {"rope_parameters": rope}
    model = _build(kind, config_kind(text_config=text, vision_config=QWEN_VISION | vision, **ids))
    counts = [t * h * w // 4 for t, h, w in GRIDS]
    inputs = _prompts(*[[START, *[IMAGE] * count, END] for count in counts])
    return Tiny(
        model,
        inputs
        | {
            "pixel_values": _pixels(4 * sum(counts), 3 * 4 * 4),
            "image_grid_thw": torch.tensor(GRIDS),
            "mm_token_type_ids": (inputs["input_ids"] == IMAGE).int(),
        },
    )


def qwen2_vl() -> Tiny:
    vision = {"embed_dim": 16, "hidden_size": 32, "mlp_ratio": 2}
    return _qwen(hf.Qwen2VLForConditionalGeneration, hf.Qwen2VLConfig, vision, [1, 1, 2])


def qwen2_5_vl() -> Tiny:
    """Windows of 2 x 2 visual tokens, so that the encoder's order is not the reading order."""
    sizes = {"hidden_size": 16, "intermediate_size": 24, "out_hidden_size": 32}
    vision = sizes | {"window_size": 16, "fullatt_block_indexes": [1]}
    return _qwen(hf.Qwen2_5_VLForConditionalGeneration, hf.Qwen2_5_VLConfig, vision, [1, 1, 2])


def qwen3_vl() -> Tiny:
    sizes = {"hidden_size": 16, "intermediate_size": 24, "out_hidden_size": 32, "num_position_embeddings": 16}
    vision = sizes | {"deepstack_visual_indexes": [0, 1]}
    return _qwen(hf.Qwen3VLForConditionalGeneration, hf.Qwen3VLConfig, vision, [1, 1, 2])


def internvl() -> Tiny:
    """One tile of 2 x 2 tokens for the first image, two tiles and the whole image for the second."""
    vision = hf.InternVLVisionConfig(**VISION | {"image_size": (16, 16), "patch_size": (4, 4)})
    text = hf.Qwen2Config(**TEXT)
    config = hf.InternVLConfig(vision_config=vision, text_config=text, image_token_id=IMAGE, image_seq_length=4)
    model = _build(hf.InternVLForConditionalGeneration, config)
    return Tiny(model, _prompts([IMAGE] * 4, [IMAGE] * 12) | {"pixel_values": _pixels(4, 3, 16, 16)})


def _idefics(kind: Callable[..., Any], config_kind: Callable[..., Any]) -> Tiny:
    """As for InternVL; text tokens stand between the tiles."""
    text = hf.LlamaConfig(**TEXT)
    config = config_kind(vision_config=dict(VISION), text_config=text, image_token_id=IMAGE, scale_factor=2)
    model = _build(kind, config)
    pixels = _pixels(2, 3, 3, 16, 16)
    pixels[0, 1:] = 0  # the processor pads the number of tiles
    tile = [IMAGE] * 4
    inputs = _prompts([START, *tile, START], [START, *tile, END, *tile, END, *tile, START])
    mask = torch.ones(2, 3, 16, 16, dtype=torch.long)
    return Tiny(model, inputs | {"pixel_values": pixels, "pixel_attention_mask": mask})


def idefics3() -> Tiny:
    return _idefics(hf.Idefics3ForConditionalGeneration, hf.Idefics3Config)


def smolvlm() -> Tiny:
    return _idefics(hf.SmolVLMForConditionalGeneration, hf.SmolVLMConfig)


def paligemma() -> Tiny:
    """Every token of the prompt is of type 0: the model was trained with a prompt that sees itself."""
    parts = _parts(_siglip(projection_dim=32), hf.GemmaConfig(**TEXT))
    config = hf.PaliGemmaConfig(**parts, projection_dim=32)
    model = _build(hf.PaliGemmaForConditionalGeneration, config)
    inputs = _prompts([IMAGE] * 16, [IMAGE] * 16) | {"pixel_values": _pixels(2, 3, 16, 16)}
    return Tiny(model, inputs | {"token_type_ids": torch.zeros_like(inputs["input_ids"])})


def gemma3() -> Tiny:
    """Four patches become one visual token; the first layers see a window of 8 tokens."""
    text = hf.Gemma3TextConfig(
        **TEXT, sliding_window=8, layer_types=["sliding_attention", "sliding_attention", "full_attention"]
    )
    config = hf.Gemma3Config(**_parts(_siglip(), text), mm_tokens_per_image=4)
    model = _build(hf.Gemma3ForConditionalGeneration, config)
    with torch.no_grad():
        model.model.multi_modal_projector.mm_input_projection_weight.normal_()  # starts at zero
    inputs = _prompts([START, *[IMAGE] * 4, END], [START, *[IMAGE] * 4, END])
    types = (inputs["input_ids"] == IMAGE).int()
    return Tiny(model, inputs | {"pixel_values": _pixels(2, 3, 16, 16), "token_type_ids": types})


ARCHITECTURES = {
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
        smolvlm,
        paligemma,
        gemma3,
    )
}
