"""Probe features of images: one forward pass of the image prefix gives every layer.

Patch tokens are reduced batch by batch to their mean and their patch structure, so memory does not grow with the
number of images.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import safetensors
import safetensors.numpy
import torch
from PIL import Image
from torch import Tensor

from prebench.errors import DataError, ModelError, StoreError
from prebench.model import visual_states
from prebench.model.builder import encoded_images, vision_features
from prebench.probe.patch_structure import STRUCTURE_METRICS, assign_patches, patch_structure
from prebench.store import write_bytes


@dataclass(frozen=True)
class ProbeFeatures:
    """What the probes know of n images: L decoder layers give L + 1 rows (visual_states), the encoder one more."""

    pooled: np.ndarray
    """[n, L + 1, D] float32: mean visual token at each layer."""
    encoder_pooled: np.ndarray
    """[n, D_v] float32: mean token of the vision encoder's output (the reference R)."""
    structure: np.ndarray
    """[n, L + 1, K] float32: patch structure at each layer; NaN where undefined."""
    encoder_structure: np.ndarray
    """[n, K] float32: patch structure of the vision encoder's output."""
    structure_metrics: tuple[str, ...] = STRUCTURE_METRICS
    """Names of the K columns."""

    def __len__(self) -> int:
        """Return n, the number of images."""
        return len(self.pooled)

    @property
    def num_layers(self) -> int:
        """Return L, the number of decoder layers."""
        return self.pooled.shape[1] - 1

    def save(self, path: Path) -> None:
        """Write a safetensors file atomically.

        Raises:
            StoreError: the folder can't be written.
        """
        arrays = {name: np.ascontiguousarray(getattr(self, name)) for name in _ARRAYS}
        metadata = {"structure_metrics": json.dumps(self.structure_metrics)}
        write_bytes(path, safetensors.numpy.save(arrays, metadata))

    @classmethod
    def load(cls, path: Path) -> ProbeFeatures:
        """Read what `save` wrote.

        Raises:
            StoreError: the file is missing, damaged or holds something else.
        """
        if not path.is_file():
            raise StoreError(f"{path}: not found")
        try:
            with safetensors.safe_open(path, framework="numpy") as file:
                arrays = {name: file.get_tensor(name) for name in _ARRAYS}
                metrics = tuple(json.loads(file.metadata()["structure_metrics"]))
        except (safetensors.SafetensorError, KeyError, TypeError, ValueError, OSError) as error:
            raise StoreError(f"{path}: no probe features ({error}); delete it to compute it again") from error
        return cls(**arrays, structure_metrics=metrics)

    @classmethod
    def concatenate(cls, parts: Sequence[ProbeFeatures]) -> ProbeFeatures:
        """Return the images of all parts, one part after another.

        Raises:
            DataError: there are no parts, or they come from models of different shape.
        """
        if not parts:
            raise DataError("probe features: no parts to concatenate; extract features of at least one image")
        shapes = {tuple(getattr(part, name).shape[1:] for name in _ARRAYS) for part in parts}
        if len(shapes) > 1 or len({part.structure_metrics for part in parts}) > 1:
            raise DataError("probe features: the parts have different shapes; take all from one model and version")
        arrays = {name: np.concatenate([getattr(part, name) for part in parts]) for name in _ARRAYS}
        return cls(**arrays, structure_metrics=parts[0].structure_metrics)


_ARRAYS = tuple(field.name for field in fields(ProbeFeatures) if field.name != "structure_metrics")


def extract_features(
    model: Any,
    processor: Any,
    images: Sequence[Image.Image],
    masks: Sequence[np.ndarray | None],
    batch_size: int = 16,
) -> ProbeFeatures:
    """Run images through vision encoder and decoder and return their probe features.

    The prompt is the chat template of a user turn that holds nothing but the image, cut after the last image token:
    under causal attention nothing behind the image can change it. The values do not depend on `batch_size` beyond
    float round-off.

    Args:
        model: LlavaForConditionalGeneration on the device to use; is put into evaluation mode.
        processor: its processor, with a chat template.
        images: n images of any size.
        masks: per image object ids, [H, W] of the image's aspect ratio (0 = background), or None: structure is NaN.
        batch_size: images per forward pass.

    Raises:
        DataError: no images, other numbers of images and masks, or a mask that does not fit its image.
        ModelError: visual tokens that form no square grid, or hidden states that are not finite.
    """
    if not images or len(images) != len(masks):
        raise DataError(f"probe: {len(images)} images and {len(masks)} masks; give each image a mask or None")
    for number, (image, mask) in enumerate(zip(images, masks, strict=True)):
        _check_mask(processor, number, image, mask)
    model.eval()
    starts = range(0, len(images), batch_size)
    parts = [
        _extract_batch(model, processor, images[start : start + batch_size], masks[start : start + batch_size])
        for start in starts
    ]
    features = ProbeFeatures.concatenate(parts)
    if not (np.isfinite(features.pooled).all() and np.isfinite(features.encoder_pooled).all()):
        raise ModelError("probe: the model's hidden states have NaN or infinite values; check its weights and dtype")
    return features


def _check_mask(processor: Any, number: int, image: Image.Image, mask: np.ndarray | None) -> None:
    if mask is None:
        return
    where = f"probe: the mask of image {number}"
    if np.ndim(mask) != 2 or np.size(mask) == 0 or image.width * mask.shape[0] != image.height * mask.shape[1]:
        raise DataError(
            f"{where} has shape {np.shape(mask)}, but the image is {image.height} x {image.width} pixels; a mask may "
            "be of another size, but must be [height, width] of the same aspect ratio"
        )
    resizer = processor.image_processor
    reshaped = getattr(resizer, "do_center_crop", None) or getattr(resizer, "do_pad", None)
    if reshaped and image.width != image.height:
        raise DataError(
            f"{where} can't be aligned: the processor crops or pads the image ({image.height} x {image.width} pixels); "
            "give square images"
        )


@torch.inference_mode()
def _extract_batch(
    model: Any, processor: Any, images: Sequence[Image.Image], masks: Sequence[np.ndarray | None]
) -> ProbeFeatures:
    inputs = _image_prefix(model, processor, images)
    pixels = inputs["pixel_values"].to(model.device, model.dtype)
    encoder_BND = vision_features(model, pixels)
    # The tower's output goes on to the projector as it is, so that one pass of the tower serves both rows.
    projected = model.model.multi_modal_projector(encoder_BND)
    input_ids = inputs["input_ids"].to(model.device)
    depth = visual_states.num_layers(model)
    with visual_states.capture(model, input_ids, range(depth + 1)) as states:
        model.model(
            input_ids=input_ids,
            attention_mask=inputs["attention_mask"].to(model.device),
            mm_encoder_outputs=encoded_images(projected),
            use_cache=False,
        )
    layers_BND = [states.at(layer).unflatten(0, (len(images), -1)) for layer in range(depth + 1)]
    assignment = _assign(masks, layers_BND[0].shape[1])
    layers = [_reduce(tokens_BND, assignment) for tokens_BND in layers_BND]
    if encoder_BND.shape[1] != layers_BND[0].shape[1]:  # a projector that merges patches
        assignment = _assign(masks, encoder_BND.shape[1])
    encoder_pooled, encoder_structure = _reduce(encoder_BND, assignment)
    return ProbeFeatures(
        pooled=np.stack([pooled for pooled, _ in layers], axis=1),
        encoder_pooled=encoder_pooled,
        structure=np.stack([structure for _, structure in layers], axis=1),
        encoder_structure=encoder_structure,
    )


def _image_prefix(model: Any, processor: Any, images: Sequence[Image.Image]) -> dict[str, Tensor]:
    """Return the processor's tensors for the chat prompt up to the last image token.

    Raises:
        ModelError: the images of the batch have different numbers of visual tokens, or none.
    """
    conversations = [
        [{"role": "user", "content": [{"type": "image", "image": image.convert("RGB")}]}] for image in images
    ]
    inputs = processor.apply_chat_template(conversations, tokenize=True, return_dict=True, return_tensors="pt")
    mask_BT = visual_states.visual_mask(model, inputs["input_ids"])
    counts = mask_BT.sum(dim=1)
    if int(counts.min()) == 0 or int(counts.min()) != int(counts.max()):
        raise ModelError(
            f"{type(model).__name__}: between {int(counts.min())} and {int(counts.max())} visual tokens per image; "
            "probes need the same number, at least one, for every image"
        )
    end = int(mask_BT.any(dim=0).nonzero().max()) + 1
    return {
        "input_ids": inputs["input_ids"][:, :end],
        "attention_mask": inputs["attention_mask"][:, :end],
        "pixel_values": inputs["pixel_values"],
    }


def _assign(masks: Sequence[np.ndarray | None], count: int) -> Tensor:
    """Return the object of each of an image's `count` visual tokens, [B, count]; none where there is no mask.

    Raises:
        ModelError: the tokens form no square grid.
    """
    side = math.isqrt(count)
    if side * side != count:
        raise ModelError(f"probe: {count} visual tokens per image form no square grid; patch structure needs one")
    rows = [np.zeros(count, dtype=np.int64) if m is None else assign_patches(m, (side, side)) for m in masks]
    return torch.from_numpy(np.stack(rows))


def _reduce(tokens_BND: Tensor, assignment_BN: Tensor) -> tuple[np.ndarray, np.ndarray]:
    """Return the mean token, [B, D], and the patch structure, [B, K], of a batch at one layer, both float32."""
    tokens = tokens_BND.float()
    structure = patch_structure(tokens, assignment_BN)
    return tokens.mean(dim=1).cpu().numpy(), structure.float().cpu().numpy()
