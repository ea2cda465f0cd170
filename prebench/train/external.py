"""The anchor "external": features of another, frozen vision model on the grid of the visual tokens.

Any Hugging Face vision model that gives a grid serves: a ViT's patch tokens behind its class and register tokens, or a
convolutional net's [C, h, w]. Pictures are squeezed to the model's square as the study's own tower squeezes them, never
cropped: a patch must stand where its visual token stands.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F

from prebench.errors import ModelError
from prebench.runtime import file_hash


class VisionModel:
    """A frozen vision model from a local folder.

    Args:
        folder: of a Hugging Face vision model with its image processor, in safetensors.

    Raises:
        ModelError: the folder holds no such model.
    """

    def __init__(self, folder: Path) -> None:
        if not (folder / "config.json").is_file():
            raise ModelError(
                f"{folder}: no config.json; regularizer.anchor_model is a Hugging Face vision model's folder"
            )
        self.folder = folder

    @cached_property
    def _loaded(self) -> tuple[nn.Module, Any]:
        """Return model and image processor; only who computes features needs them."""
        from transformers import AutoImageProcessor, AutoModel

        options: dict[str, Any] = {"local_files_only": True, "trust_remote_code": False}
        try:
            model = AutoModel.from_pretrained(self.folder, use_safetensors=True, dtype=torch.float32, **options)
            processor = AutoImageProcessor.from_pretrained(self.folder, **options)
        except (OSError, ValueError, ImportError) as error:
            raise ModelError(f"{self.folder}: can't be loaded as a vision model: {error}") from error
        vision: nn.Module = getattr(model, "vision_model", model)
        return vision.requires_grad_(False).eval(), processor

    @property
    def hash(self) -> str:
        """Return a content hash of what decides the features: weights and settings."""
        names = ("config.json", "preprocessor_config.json")
        paths = [self.folder / name for name in names if (self.folder / name).is_file()]
        return "-".join(file_hash(path) for path in [*paths, *sorted(self.folder.glob("*.safetensors"))])

    @torch.inference_mode()
    def features(self, images: Sequence[Image.Image], side: int) -> Tensor:
        """Return the model's features at the places of the visual tokens, [I, side * side, C] float16, row by row.

        Args:
            images: RGB.
            side: visual tokens along an edge of the picture.

        Raises:
            ModelError: the model's output is no grid of patches.
        """
        model, processor = self._loaded
        size = getattr(processor, "crop_size", None) or processor.size
        pixels = int(size.get("height") or size["shortest_edge"])
        square = {"height": pixels, "width": pixels}
        inputs = processor(list(images), size=square, do_center_crop=False, return_tensors="pt")
        grid_ICHW = self._grid(model(pixel_values=inputs["pixel_values"]).last_hidden_state, model, pixels)
        # On the way down every patch counts (antialias), on the way up it is interpolated between patches.
        resampled = F.interpolate(grid_ICHW, size=(side, side), mode="bilinear", align_corners=False, antialias=True)
        return resampled.flatten(2).transpose(1, 2).half()

    def _grid(self, hidden: Tensor, model: Any, pixels: int) -> Tensor:
        """Return [I, C, h, w]; a ViT's class and register tokens stand before its patches."""
        if hidden.ndim == 4:
            return hidden
        patch = getattr(getattr(model.config, "vision_config", model.config), "patch_size", None)
        edge = pixels // patch if isinstance(patch, int) else math.isqrt(hidden.shape[1])
        extra = hidden.shape[1] - edge * edge
        if extra < 0:
            raise ModelError(f"{self.folder}: {hidden.shape[1]} tokens are no {edge} x {edge} patches")
        return hidden[:, extra:].transpose(1, 2).unflatten(2, (edge, edge))
