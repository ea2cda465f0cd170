"""The embedded preset's vision tower: it plays CLIP's part.

It learns from labels of patches (shape, colour and size of the object there; the cell's row and column) and of whole
pictures (background; easy-VQA's shape and colour, from its training questions). The heads are thrown away. The fill
pattern is in no label, so that one probed attribute was never taught (docs/probes.md). Scenes come from a split of
their own, and easy-VQA pictures from its training split alone.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import SiglipVisionModel, get_cosine_schedule_with_warmup

from prebench.data import easy_vqa, scenes
from prebench.model.builder import vision_config
from prebench.schema import VisionTowerConfig


@dataclass(frozen=True)
class TowerRecipe:
    """The recipe of the shipped tower."""

    steps: int = 1600
    batch_size: int = 64
    easy_vqa_share: float = 0.25
    learning_rate: float = 1e-3
    warmup_steps: int = 50


class _Heads(nn.Module):
    """Linear classifiers on patch tokens and on their mean; thrown away after pretraining."""

    def __init__(self, width: int) -> None:
        super().__init__()
        patch = {"shape": len(scenes.SHAPES), "color": len(scenes.COLORS), "size": len(scenes.SIZES)}
        patch |= {"row": scenes.GRID, "col": scenes.GRID}  # CLIP knows where things are, too
        self.patch = nn.ModuleDict({name: nn.Linear(width, count + 1) for name, count in patch.items()})
        pooled = {
            "background": len(scenes.BACKGROUNDS),
            "easy_shape": len(easy_vqa.SHAPES),
            "easy_color": len(easy_vqa.COLORS),
        }
        self.pooled = nn.ModuleDict({name: nn.Linear(width, count) for name, count in pooled.items()})


@dataclass(frozen=True)
class _Labelled:
    """Pictures with what is known of them: patch labels (0 is no object) or -100, pooled labels or -100."""

    images: list[Any]
    patch: Tensor
    pooled: Tensor


def pretrain_tower(
    folder: Path, processor: Any, recipe: TowerRecipe, seed: int, progress: Callable[[int, float], None]
) -> dict[str, float]:
    """Train the tower, write it to `folder` and return its accuracies on held-out pictures.

    Args:
        folder: output folder, a plain Hugging Face one.
        processor: for its image processor.
        recipe: how to train.
        seed: decides scenes and batches; the caller seeds the initial weights.
        progress: called with steps done and the loss.
    """
    config = VisionTowerConfig(pretrained=None)
    tower = SiglipVisionModel(vision_config(config))
    heads = _Heads(config.hidden_size)
    parameters = [*tower.parameters(), *heads.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=recipe.learning_rate, weight_decay=0.01)
    schedule = get_cosine_schedule_with_warmup(optimizer, recipe.warmup_steps, recipe.steps)
    easy = _easy_vqa_pictures("train")
    for step in range(recipe.steps):
        rng = np.random.default_rng([seed, step])
        batch = _join(
            _scene_batch(step * recipe.batch_size, recipe.batch_size, seed),
            _pick(easy, rng.choice(len(easy.images), round(recipe.easy_vqa_share * recipe.batch_size), replace=False)),
        )
        loss = _loss(tower, heads, processor, batch)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
        progress(step + 1, loss.item())
    tower.eval().save_pretrained(folder)
    return _accuracies(tower, heads, processor, seed)


_SIDE = scenes.IMAGE_SIZE // scenes.PATCH_SIZE
_PATCHES_PER_CELL = scenes.CELL_SIZE // scenes.PATCH_SIZE
_CELLS = np.indices((_SIDE, _SIDE)).reshape(2, -1).T // _PATCHES_PER_CELL + 1
"""Row and column of each patch's cell, from 1, [N_p, 2]."""


def _scene_batch(first: int, count: int, seed: int) -> _Labelled:
    images, patch, pooled = [], [], []
    for index in range(first, first + count):
        scene = scenes.generate_scene(seed, "pretrain", index)
        image, mask = scenes.render(scene)
        objects = np.vstack([np.zeros((1, 3), dtype=np.int64), scenes.object_labels(scene) + 1])
        images.append(image)
        patch.append(torch.from_numpy(np.hstack([objects[scenes.patch_objects(mask).reshape(-1)], _CELLS])))
        pooled.append(torch.tensor([scenes.labels(scene)["background"], -100, -100]))
    return _Labelled(images, torch.stack(patch), torch.stack(pooled))


def _easy_vqa_pictures(split: str) -> _Labelled:
    source = easy_vqa.load(split)
    images, pooled = [], []
    for image_id, path in source.image_paths.items():
        shape, color = easy_vqa.shape_and_color(source.questions[image_id])
        images.append(easy_vqa.open_image(path))
        pooled.append(
            torch.tensor(
                [
                    -100,
                    -100 if shape is None else easy_vqa.SHAPES.index(shape),
                    -100 if color is None else easy_vqa.COLORS.index(color),
                ]
            )
        )
    return _Labelled(images, torch.full((len(images), _SIDE**2, 5), -100), torch.stack(pooled))


def _pick(source: _Labelled, rows: np.ndarray) -> _Labelled:
    return _Labelled([source.images[r] for r in rows], source.patch[rows], source.pooled[rows])


def _join(a: _Labelled, b: _Labelled) -> _Labelled:
    return _Labelled(a.images + b.images, torch.cat([a.patch, b.patch]), torch.cat([a.pooled, b.pooled]))


def _features(tower: SiglipVisionModel, processor: Any, images: list[Any]) -> Tensor:
    pixels = processor.image_processor(images, return_tensors="pt")["pixel_values"]
    features: Tensor = tower(pixels, output_hidden_states=True).hidden_states[-1]
    return features


def _loss(tower: SiglipVisionModel, heads: _Heads, processor: Any, batch: _Labelled) -> Tensor:
    features = _features(tower, processor, batch.images)
    loss = torch.zeros(())
    for column, head in enumerate(heads.patch.values()):
        loss = loss + F.cross_entropy(head(features).flatten(0, 1), batch.patch[..., column].flatten())
    for column, head in enumerate(heads.pooled.values()):
        labels = batch.pooled[:, column]
        if (labels != -100).any():
            loss = loss + F.cross_entropy(head(features.mean(1)), labels)
    return loss


@torch.no_grad()
def _accuracies(tower: SiglipVisionModel, heads: _Heads, processor: Any, seed: int) -> dict[str, float]:
    """Return held-out accuracies: scenes never drawn in training, easy-VQA's validation pictures."""
    tower.eval()
    held_out = _join(_scene_batch(10_000_000, 512, seed), _easy_vqa_pictures("validation"))
    features = torch.cat(
        [_features(tower, processor, held_out.images[i : i + 64]) for i in range(0, len(held_out.images), 64)]
    )
    found = {}
    for column, (name, head) in enumerate(heads.patch.items()):
        labels = held_out.patch[..., column]
        hit = head(features).argmax(-1) == labels
        found[f"patch_{name}"] = hit[labels > 0].float().mean().item()
    for column, (name, head) in enumerate(heads.pooled.items()):
        labels = held_out.pooled[:, column]
        hit = head(features.mean(1)).argmax(-1) == labels
        found[name] = hit[labels != -100].float().mean().item()
    return {name: round(value, 4) for name, value in found.items()}
