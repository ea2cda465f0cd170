"""Outputs of frozen vision models, computed once per study and shared by all runs: the tower's, and external anchors'.

Each is stored as one safetensors file with a key made of the model's weights and the data's fingerprint: another model
or other data never read it. Every computation leaves a line in `features.jsonl` beside the files.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor
from transformers import LlavaForConditionalGeneration

from prebench.data.examples import TrainingData
from prebench.model.builder import vision_features
from prebench.records import content_hash
from prebench.store import read_jsonl, write_bytes, write_jsonl
from prebench.train.external import VisionModel

BATCH_SIZE = 64
COMPUTED = "features.jsonl"
"""In the study's cache: one line per computation, so that "once per study" can be counted."""

Progress = Callable[[int, int], None]


class FeatureCache:
    """Features by image id: [I, N_p, D_v], the tower's in float32, an external model's in float16."""

    def __init__(self, image_ids: Sequence[str], features: Tensor) -> None:
        self._row = {image_id: row for row, image_id in enumerate(image_ids)}
        self._features = features

    @property
    def width(self) -> int:
        """Return D_v."""
        return int(self._features.shape[-1])

    def get(self, image_ids: Sequence[str]) -> Tensor:
        """Return the features of these images, [len(image_ids), N_p, D_v]."""
        return self._features[[self._row[i] for i in image_ids]]


def tower_hash(model: LlavaForConditionalGeneration) -> str:
    """Return a content hash of the vision tower's weights."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.model.vision_tower.state_dict().items()):
        digest.update(name.encode() + tensor.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()[:16]


def cached_features(
    folder: Path,
    model: LlavaForConditionalGeneration,
    processor: Any,
    data: TrainingData,
    progress: Progress = lambda done, total: None,
) -> FeatureCache:
    """Read the frozen tower's features of all training images, or compute and store them.

    Args:
        folder: the study's cache folder.
        model: any model of the study (the tower is frozen and shared).
        processor: the study's processor.
        data: the training images.
        progress: called with images done and in all.
    """
    key = content_hash({"tower": tower_hash(model), "data": data.fingerprint()})
    return _cached(folder, f"vision-features-{key}", _encode(model, processor), data.image_ids, data.image, progress)


def validation_features(
    folder: Path,
    model: LlavaForConditionalGeneration,
    processor: Any,
    data: TrainingData,
    num_images: int,
    progress: Progress = lambda done, total: None,
) -> FeatureCache:
    """Read the frozen tower's features of the pictures that the learning curves ask about, or compute and store them.

    Args:
        folder: the study's cache folder.
        model: any model of the study.
        processor: the study's processor.
        data: whose validation splits.
        num_images: pictures of each source.
        progress: called with images done and in all.
    """
    pictures = {question.image_id: question.image for question in data.validation(num_images)}
    key = content_hash({"tower": tower_hash(model), "data": data.fingerprint(), "validation_images": num_images})
    encode = _encode(model, processor)
    return _cached(folder, f"validation-features-{key}", encode, list(pictures), pictures.__getitem__, progress)


def _encode(model: LlavaForConditionalGeneration, processor: Any) -> Callable[[list[Image.Image]], Tensor]:
    def features(images: list[Image.Image]) -> Tensor:
        pixels = processor.image_processor(images, return_tensors="pt")["pixel_values"]
        return vision_features(model, pixels)

    return features


def external_features(
    folder: Path, model: VisionModel, side: int, data: TrainingData, progress: Progress = lambda done, total: None
) -> FeatureCache:
    """Read an external anchor's features of all training images, or compute and store them.

    Args:
        folder: the study's cache folder.
        model: the external vision model.
        side: visual tokens along an edge of the picture.
        data: the training images.
        progress: called with images done and in all.

    Raises:
        ModelError: the model's output is no grid of patches.
    """
    settings = content_hash({"model": model.hash, "side": side})
    key = content_hash({"tower": settings, "data": data.fingerprint()})
    name = f"anchor-features-{key}"
    return _cached(folder, name, lambda images: model.features(images, side), data.image_ids, data.image, progress)


def _cached(
    folder: Path,
    name: str,
    features: Callable[[list[Image.Image]], Tensor],
    ids: Sequence[str],
    image: Callable[[str], Image.Image],
    progress: Progress,
) -> FeatureCache:
    path = folder / f"{name}.safetensors"
    stored = _read(path)
    if stored is None:
        rows = []
        for first in range(0, len(ids), BATCH_SIZE):
            rows.append(features([image(i) for i in ids[first : first + BATCH_SIZE]]))
            progress(min(first + BATCH_SIZE, len(ids)), len(ids))
        stored = torch.cat(rows)
        write_bytes(path, save({"features": stored}))
        log = folder / COMPUTED
        before = list(read_jsonl(log)) if log.is_file() else []
        write_jsonl(log, [*before, {"file": path.name, "images": len(ids)}])
    return FeatureCache(ids, stored)


def _read(path: Path) -> Tensor | None:
    """Return the stored features; None where the file is missing or damaged (they can be computed again)."""
    if not path.is_file():
        return None
    try:
        with safe_open(path, framework="pt") as file:
            tensor: Tensor = file.get_tensor("features")
            return tensor
    except (SafetensorError, OSError):
        return None
