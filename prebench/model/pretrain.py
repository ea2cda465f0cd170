"""`prebench pretrain`: the embedded preset's vision tower and tokenizer, which ship with the package.

The tower plays CLIP's part. It learns from labels of patches (shape, colour, size of the object there) and of whole
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

from prebench.data import scenes
from prebench.data.easy_vqa import load as load_easy_vqa
from prebench.data.easy_vqa import open_image
from prebench.data.examples import corpus
from prebench.data.questions import LETTER_SUFFIX, SHORT_SUFFIX
from prebench.model.builder import PRETRAINED, build_processor, vision_config
from prebench.model.tokenizer import train_tokenizer
from prebench.runtime import derive_seed, file_hash, prepare_cpu, seed_everything, versions
from prebench.schema import VisionTowerConfig
from prebench.store import write_json

EASY_SHAPES = ("circle", "rectangle", "triangle")
EASY_COLORS = ("black", "blue", "brown", "gray", "green", "red", "teal", "yellow")


@dataclass(frozen=True)
class PretrainConfig:
    """The recipe of the shipped tower."""

    seed: int = 0
    steps: int = 1600
    batch_size: int = 64
    easy_vqa_share: float = 0.25
    learning_rate: float = 1e-3
    warmup_steps: int = 50
    vocab_size: int = 640


class _Heads(nn.Module):
    """Linear classifiers on patch tokens and on their mean; thrown away after pretraining."""

    def __init__(self, width: int) -> None:
        super().__init__()
        patch = {"shape": len(scenes.SHAPES), "color": len(scenes.COLORS), "size": len(scenes.SIZES)}
        self.patch = nn.ModuleDict({name: nn.Linear(width, count + 1) for name, count in patch.items()})
        pooled = {
            "background": len(scenes.BACKGROUNDS),
            "easy_shape": len(EASY_SHAPES),
            "easy_color": len(EASY_COLORS),
        }
        self.pooled = nn.ModuleDict({name: nn.Linear(width, count) for name, count in pooled.items()})


@dataclass(frozen=True)
class _Labelled:
    """Pictures with what is known of them: patch labels [N, 3] (0 is no object) or -100, pooled labels or -100."""

    images: list[Any]
    patch: Tensor
    pooled: Tensor


def pretrain(folder: Path, config: PretrainConfig, progress: Callable[[int, int, float], None]) -> dict[str, Any]:
    """Train and write `folder`/vision_tower, `folder`/tokenizer and `folder`/manifest.json; return the manifest.

    Args:
        folder: output folder.
        config: the recipe.
        progress: called with steps done, steps in all and the loss.
    """
    prepare_cpu()
    seed_everything(derive_seed("pretrain", config.seed))
    tower_config = VisionTowerConfig(pretrained=None)
    tokenizer = train_tokenizer(corpus(), config.vocab_size, (SHORT_SUFFIX, LETTER_SUFFIX))
    tokenizer.save_pretrained(folder / "tokenizer")
    processor = build_processor(tower_config, tokenizer)
    tower = SiglipVisionModel(vision_config(tower_config))
    heads = _Heads(tower_config.hidden_size)
    parameters = [*tower.parameters(), *heads.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=config.learning_rate, weight_decay=0.01)
    schedule = get_cosine_schedule_with_warmup(optimizer, config.warmup_steps, config.steps)
    easy = _easy_vqa_pictures("train")
    for step in range(config.steps):
        rng = np.random.default_rng([config.seed, step])
        batch = _join(
            _scene_batch(step * config.batch_size, config.batch_size, config.seed),
            _pick(easy, rng.choice(len(easy.images), round(config.easy_vqa_share * config.batch_size), replace=False)),
        )
        loss = _loss(tower, heads, processor, batch)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
        progress(step + 1, config.steps, loss.item())
    tower.eval().save_pretrained(folder / "vision_tower")
    manifest = {
        "command": "prebench pretrain",
        "config": vars(config),
        "accuracies": _accuracies(tower, heads, processor, config.seed),
        "files": {str(p.relative_to(folder)): file_hash(p) for p in sorted(folder.rglob("*.safetensors"))}
        | {"tokenizer/tokenizer.json": file_hash(folder / "tokenizer" / "tokenizer.json")},
        "versions": versions(),
    }
    write_json(folder / "manifest.json", manifest)
    return manifest


def _scene_batch(first: int, count: int, seed: int) -> _Labelled:
    images, patch, pooled = [], [], []
    for index in range(first, first + count):
        scene = scenes.generate_scene(seed, "pretrain", index)
        image, mask = scenes.render(scene)
        objects = np.vstack([np.zeros((1, 3), dtype=np.int64), scenes.object_labels(scene) + 1])
        images.append(image)
        patch.append(torch.from_numpy(objects[scenes.patch_objects(mask).reshape(-1)]))
        pooled.append(torch.tensor([scenes.labels(scene)["background"], -100, -100]))
    return _Labelled(images, torch.stack(patch), torch.stack(pooled))


def _easy_vqa_pictures(split: str) -> _Labelled:
    source = load_easy_vqa(split)
    patches = (scenes.IMAGE_SIZE // scenes.PATCH_SIZE) ** 2
    images, pooled = [], []
    for image_id, path in source.image_paths.items():
        answers = {answer for _, answer in source.questions[image_id]}
        shape = next((EASY_SHAPES.index(a) for a in answers if a in EASY_SHAPES), -100)
        color = next((EASY_COLORS.index(a) for a in answers if a in EASY_COLORS), -100)
        images.append(open_image(path))
        pooled.append(torch.tensor([-100, shape, color]))
    return _Labelled(images, torch.full((len(images), patches, 3), -100), torch.stack(pooled))


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


DEFAULT_FOLDER = PRETRAINED
