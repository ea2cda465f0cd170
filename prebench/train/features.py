"""The frozen vision tower's outputs, computed once per study and shared by all runs.

Stored as one safetensors file with a key made of the tower's weights and the data's fingerprint: another tower or other
data never read it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor
from transformers import LlavaForConditionalGeneration

from prebench.data.examples import TrainingData
from prebench.model.builder import vision_features
from prebench.records import content_hash
from prebench.store import write_bytes

BATCH_SIZE = 64


class FeatureCache:
    """Features by image id: [I, N_p, D_v] float32."""

    def __init__(self, image_ids: Sequence[str], features: Tensor) -> None:
        self._row = {image_id: row for row, image_id in enumerate(image_ids)}
        self._features = features

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
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> FeatureCache:
    """Read the features of all training images, or compute and store them.

    Args:
        folder: the study's cache folder.
        model: any model of the study (the tower is frozen and shared).
        processor: the study's processor.
        data: the training images.
        progress: called with images done and in all.
    """
    key = content_hash({"tower": tower_hash(model), "data": data.fingerprint()})
    path = folder / f"vision-features-{key}.safetensors"
    stored = _read(path)
    if stored is None:
        stored = _compute(model, processor, data, progress)
        write_bytes(path, save({"features": stored}))
    return FeatureCache(data.image_ids, stored)


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


@torch.no_grad()
def _compute(
    model: LlavaForConditionalGeneration, processor: Any, data: TrainingData, progress: Callable[[int, int], None]
) -> Tensor:
    ids = data.image_ids
    rows = []
    for first in range(0, len(ids), BATCH_SIZE):
        images = [data.image(i) for i in ids[first : first + BATCH_SIZE]]
        pixels = processor.image_processor(images, return_tensors="pt")["pixel_values"]
        rows.append(vision_features(model, pixels))
        progress(min(first + BATCH_SIZE, len(ids)), len(ids))
    return torch.cat(rows)
