"""How a processor of the LLaVA type sees a picture: how many visual tokens, and padded to a square or not."""

from __future__ import annotations

from typing import Any

from transformers import LlavaImageProcessor

from prebench.errors import ConfigError


def image_tokens(processor: Any) -> int:
    """Return the visual tokens of a picture."""
    resizer = processor.image_processor
    sizes = resizer.crop_size if getattr(resizer, "do_center_crop", None) else resizer.size
    rows, cols = (int(sizes[name]) // processor.patch_size for name in ("height", "width"))
    extra = getattr(processor, "num_additional_image_tokens", 0) or 0
    return rows * cols + extra - (processor.vision_feature_select_strategy == "default")


def pad_to_square(processor: Any) -> None:
    """Let a processor pad pictures to squares with the mean colour, as LLaVA does; exported, it does so everywhere.

    Raises:
        ConfigError: its image processor does not resize to one square.
    """
    resizer = processor.image_processor
    sizes = resizer.crop_size if getattr(resizer, "do_center_crop", None) else resizer.size
    side = sizes.get("height")
    if side is None or side != sizes.get("width"):
        raise ConfigError(f"data.pad_to_square: {type(resizer).__name__} does not make squares of one size")
    processor.image_processor = LlavaImageProcessor(
        do_pad=True,
        size={"height": side, "width": side},
        resample=resizer.resample,
        do_center_crop=False,
        image_mean=list(resizer.image_mean),
        image_std=list(resizer.image_std),
        do_convert_rgb=True,
    )
