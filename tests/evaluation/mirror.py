"""A tiny mirror in upstream's schemas, and a tiny data set for the probe task."""

from __future__ import annotations

from pathlib import Path

import datasets
import numpy as np
from PIL import Image

NUM_IMAGES = 6
QUESTIONS = ["is there a red circle?", "what color is the circle?", "is the square blue?", "yes or no?"]
NUM_PROBE = 60


def image(seed: int) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def write_questions(folder: Path) -> None:
    _gqa(folder / "lmms-lab-encoder" / "GQA")
    _easy_vqa(folder / "prebench" / "easy_vqa")


def write_mirror(folder: Path) -> Path:
    write_questions(folder)
    _probe(folder / "prebench" / "visual_probe")
    return folder


def _write(folder: Path, configs: dict[str, tuple[str, datasets.Dataset]]) -> None:
    folder.mkdir(parents=True)
    lines = ["---", "configs:"]
    for name, (split, rows) in configs.items():
        rows.to_parquet(folder / f"{name}.parquet")
        lines += [f"- config_name: {name}", "  data_files:", f"  - split: {split}", f"    path: {name}.parquet"]
    (folder / "README.md").write_text("\n".join([*lines, "---", ""]), encoding="utf-8")


def _gqa(folder: Path) -> None:
    images = {"id": [f"n{i}" for i in range(NUM_IMAGES)], "image": [image(i) for i in range(NUM_IMAGES)]}
    pairs = [(i, q) for q in range(len(QUESTIONS)) for i in range(NUM_IMAGES)]
    instructions = {
        "id": [f"{i}-{q}" for i, q in pairs],
        "imageId": [f"n{i}" for i, _ in pairs],
        "question": [QUESTIONS[q] for _, q in pairs],
        "answer": ["yes" if (i + q) % 2 else "no" for i, q in pairs],
        "types": [{"structural": "verify" if q % 2 else "query", "semantic": "attr", "detailed": ""} for _, q in pairs],
    }
    features = datasets.Features({"id": datasets.Value("string"), "image": datasets.Image()})
    _write(
        folder,
        {
            "testdev_balanced_images": ("testdev", datasets.Dataset.from_dict(images, features=features)),
            "testdev_balanced_instructions": ("testdev", datasets.Dataset.from_dict(instructions)),
        },
    )


def _easy_vqa(folder: Path) -> None:
    rows = [(i, q) for i in range(NUM_IMAGES) for q in range(len(QUESTIONS))]
    columns = {
        "image": [image(100 + i) for i, _ in rows],
        "image_id": [f"{i}" for i, _ in rows],
        "question": [QUESTIONS[q] for _, q in rows],
        "answer": ["yes" if (i + q) % 2 else "no" for i, q in rows],
        "type": ["yes/no" for _ in rows],
    }
    dataset = datasets.Dataset.from_dict(columns).cast_column("image", datasets.Image())
    _write(folder, {"default": ("test", dataset)})


def _probe(folder: Path) -> None:
    """Backgrounds of two brightnesses, one square each: both linearly readable from pixels."""
    rng = np.random.default_rng(7)
    images, masks, labels = [], [], []
    for index in range(NUM_PROBE):
        bright = index % 2
        pixels = rng.integers(0, 60, (64, 64, 3), dtype=np.uint8) + np.uint8(120 * bright)
        mask = np.zeros((64, 64), dtype=np.uint8)
        mask[16:48, 16:32], mask[16:48, 32:56] = 1, 2
        pixels[mask > 0] = 200
        images.append(Image.fromarray(pixels))
        masks.append(Image.fromarray(mask))
        labels.append(bright)
    subsets = ["train"] * 30 + ["val"] * 10 + ["test"] * 20
    columns = {
        "image": images,
        "mask": masks,
        "image_id": [f"p{i}" for i in range(NUM_PROBE)],
        "subset": subsets,
        "background": labels,
        "fill": [(i // 2) % 2 for i in range(NUM_PROBE)],
        "num_objects": [1 + i % 3 for i in range(NUM_PROBE)],
        "num_large": [i % 2 for i in range(NUM_PROBE)],
    }
    dataset = datasets.Dataset.from_dict(columns)
    dataset = dataset.cast_column("image", datasets.Image()).cast_column("mask", datasets.Image())
    _write(folder, {"default": ("test", dataset)})
