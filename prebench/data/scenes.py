"""Generated scenes: coloured shapes on a 3 x 3 grid over a textured background, with exact object masks.

A text may mention shape and colour (asked) and size (the rare questions). No text mentions the
background, or the fill pattern, which the objects of a scene share; the tower is pretrained without the fill.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
from PIL import Image, ImageDraw

IMAGE_SIZE = 96
"""Height and width of a scene in pixels."""
PATCH_SIZE = 16
"""Side of a vision patch in pixels."""
CELL_SIZE = 32
"""Side of a grid cell in pixels: 2 x 2 patches."""
GRID = IMAGE_SIZE // CELL_SIZE
"""Cells per row and column."""
MIN_PATCH_PIXELS = PATCH_SIZE * PATCH_SIZE // 8
"""Pixels of an object that make a patch one of its patches."""
MIN_OBJECT_PATCHES = 4
"""Patches that every object covers: with fewer, cohesion within an object means nothing."""

SHAPES = ("circle", "square", "triangle", "cross", "star")
COLORS = ("red", "green", "blue", "yellow", "teal", "brown")
SIZES = ("small", "large")
FILLS = ("solid", "striped", "dotted")
TEXTURES = ("plain", "lines", "checks", "slope")
TINTS = ("warm", "cool", "grey")
BACKGROUNDS = tuple(f"{texture}-{tint}" for texture in TEXTURES for tint in TINTS)

SPLITS = {"train": 0, "validation": 1, "test": 2, "pretrain": 3, "probe": 4}
"""Each split draws from random streams of its own, so splits are disjoint for any seed."""

BOX = {"small": 24, "large": 32}
"""Side of an object's bounding box in pixels."""
RGB = {
    "red": (205, 30, 35),
    "green": (35, 150, 45),
    "blue": (30, 55, 205),
    "yellow": (240, 205, 25),
    "teal": (20, 165, 165),
    "brown": (110, 65, 25),
}
TINT_RGB = {"warm": (222, 204, 186), "cool": (186, 200, 224), "grey": (204, 206, 202)}
COLOR_JITTER = 12
PATTERN_DARKNESS = 0.55
TEXTURE_CONTRAST = 16
NOISE = 6


@dataclass(frozen=True)
class SceneObject:
    """One object in its cell of the grid."""

    shape: str
    color: str
    size: str
    row: int
    col: int

    @property
    def name(self) -> str:
        """Return colour and shape ("red circle"); unique within a scene."""
        return f"{self.color} {self.shape}"


@dataclass(frozen=True)
class Scene:
    """What a picture shows; `render` draws it. Objects stand in reading order (row, then column)."""

    objects: tuple[SceneObject, ...]
    background: str
    fill: str
    index: int
    split: str
    seed: int = 0


def scene_rng(seed: int, split: str, index: int, stream: int = 0) -> np.random.Generator:
    """Return the generator of one scene; streams: 0 content, 1 pixels, 2 and up free for texts."""
    key = (SPLITS[split], index, stream)
    return np.random.default_rng(np.random.SeedSequence(seed, spawn_key=key))


def generate_scene(seed: int, split: str, index: int, min_objects: int = 2, max_objects: int = 5) -> Scene:
    """Return scene `index` of a split: the same arguments always give the same scene.

    Args:
        seed: data seed, not negative.
        split: a key of `SPLITS`.
        index: number of the scene within the split.
        min_objects: fewest objects.
        max_objects: most objects, at most 9 (cells).
    """
    rng = scene_rng(seed, split, index)
    count = int(rng.integers(min_objects, max_objects + 1))
    cells = np.sort(rng.permutation(GRID * GRID)[:count])
    kinds = rng.permutation(len(SHAPES) * len(COLORS))[:count]
    sizes = rng.integers(0, len(SIZES), size=count)
    objects = tuple(
        SceneObject(
            shape=SHAPES[kind // len(COLORS)],
            color=COLORS[kind % len(COLORS)],
            size=SIZES[size],
            row=int(cell) // GRID,
            col=int(cell) % GRID,
        )
        for cell, kind, size in zip(cells, kinds, sizes, strict=True)
    )
    background = BACKGROUNDS[rng.integers(len(BACKGROUNDS))]
    return Scene(objects, background, FILLS[rng.integers(len(FILLS))], index, split, seed)


def render(scene: Scene) -> tuple[Image.Image, np.ndarray]:
    """Draw a scene.

    Returns:
        The picture (RGB, 96 x 96) and the exact mask (uint8 [96, 96]): 0 is background, i is the i-th object.
    """
    rng = scene_rng(scene.seed, scene.split, scene.index, stream=1)
    phase = rng.integers(0, IMAGE_SIZE, size=2)
    pixels = np.roll(_background(scene.background), phase, axis=(0, 1))
    pixels += rng.integers(-NOISE, NOISE + 1, size=(IMAGE_SIZE, IMAGE_SIZE, 1), dtype=np.int16)
    mask = np.zeros((IMAGE_SIZE, IMAGE_SIZE), dtype=np.uint8)
    choices = rng.integers(0, 1 << 16, size=len(scene.objects))
    jitter = rng.integers(-COLOR_JITTER, COLOR_JITTER + 1, size=(len(scene.objects), 3))
    pattern = _pattern(scene.fill)
    for number, item in enumerate(scene.objects, start=1):
        stencils = _stencils(item.shape, item.size)
        inside = stencils[choices[number - 1] % len(stencils)]
        color = (np.asarray(RGB[item.color]) + jitter[number - 1]) * pattern
        rows = slice(item.row * CELL_SIZE, (item.row + 1) * CELL_SIZE)
        cols = slice(item.col * CELL_SIZE, (item.col + 1) * CELL_SIZE)
        pixels[rows, cols][inside] = color[inside]
        mask[rows, cols][inside] = number
    return Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8)), mask


def labels(scene: Scene) -> dict[str, Any]:
    """Return the scene's attributes: class indices, counts, and multi-hot lists over SHAPES and COLORS."""
    shapes = {item.shape for item in scene.objects}
    colors = {item.color for item in scene.objects}
    return {
        "background": BACKGROUNDS.index(scene.background),
        "fill": FILLS.index(scene.fill),
        "num_objects": len(scene.objects),
        "num_large": sum(item.size == "large" for item in scene.objects),
        "shapes": [int(shape in shapes) for shape in SHAPES],
        "colors": [int(color in colors) for color in COLORS],
    }


def object_labels(scene: Scene) -> np.ndarray:
    """Return int64 [num_objects, 3]: indices of shape, colour and size of each object, in mask order."""
    rows = [(SHAPES.index(o.shape), COLORS.index(o.color), SIZES.index(o.size)) for o in scene.objects]
    return np.asarray(rows, dtype=np.int64).reshape(-1, 3)


def patch_objects(mask: np.ndarray) -> np.ndarray:
    """Assign patches to objects: int64 [6, 6], 0 where no object has at least 1/8 of the patch's pixels."""
    grid = IMAGE_SIZE // PATCH_SIZE
    patches = mask.reshape(grid, PATCH_SIZE, grid, PATCH_SIZE).transpose(0, 2, 1, 3).reshape(grid, grid, -1)
    # A patch lies in one cell, and a cell holds one object: its maximum is that object's number.
    number = patches.max(axis=-1).astype(np.int64)
    return np.where((patches > 0).sum(axis=-1) >= MIN_PATCH_PIXELS, number, 0)


@cache
def _background(name: str) -> np.ndarray:
    texture, tint = name.split("-")
    rows, cols = np.indices((IMAGE_SIZE, IMAGE_SIZE))
    if texture == "lines":
        wave = np.where((rows // 4) % 2 == 0, 1.0, -1.0)
    elif texture == "checks":
        wave = np.where((rows // 8 + cols // 8) % 2 == 0, 1.0, -1.0)
    elif texture == "slope":
        wave = np.cos(2 * np.pi * (rows + cols) / IMAGE_SIZE)
    else:
        wave = np.zeros((IMAGE_SIZE, IMAGE_SIZE))
    pixels = np.asarray(TINT_RGB[tint]) + TEXTURE_CONTRAST * wave[..., None]
    return pixels.astype(np.int16)


@cache
def _pattern(fill: str) -> np.ndarray:
    """Return the brightness of a cell's pixels, float [32, 32, 1]."""
    rows, cols = np.indices((CELL_SIZE, CELL_SIZE))
    if fill == "striped":
        dark = cols % 8 < 4
    elif fill == "dotted":
        dark = (rows % 8 < 4) & (cols % 8 < 4)
    else:
        dark = np.zeros((CELL_SIZE, CELL_SIZE), dtype=bool)
    return np.where(dark, PATTERN_DARKNESS, 1.0)[..., None]


@cache
def _stencils(shape: str, size: str) -> tuple[np.ndarray, ...]:
    """Return the placements of a shape in its cell (bool [32, 32]) that cover enough of all four patches."""
    box = _draw(shape, BOX[size])
    space = CELL_SIZE - BOX[size]
    placements = []
    for top in range(space + 1):
        for left in range(space + 1):
            cell = np.zeros((CELL_SIZE, CELL_SIZE), dtype=bool)
            cell[top : top + BOX[size], left : left + BOX[size]] = box
            quarters = cell.reshape(2, PATCH_SIZE, 2, PATCH_SIZE).sum(axis=(1, 3))
            if (quarters >= MIN_PATCH_PIXELS).sum() >= MIN_OBJECT_PATCHES:
                placements.append(cell)
    assert placements, f"a {size} {shape} has no admissible place in its cell"
    return tuple(placements)


def _draw(shape: str, side: int) -> np.ndarray:
    """Return a shape that fills its box, bool [side, side], drawn at eight times the resolution."""
    scale = 8
    last = side * scale - 1
    canvas = Image.new("L", (side * scale, side * scale))
    draw = ImageDraw.Draw(canvas)
    if shape == "circle":
        draw.ellipse((0, 0, last, last), fill=255)
    elif shape == "cross":
        inner, outer = last * 0.32, last * 0.68
        draw.rectangle((inner, 0, outer, last), fill=255)
        draw.rectangle((0, inner, last, outer), fill=255)
    else:
        draw.polygon([(x * last, y * last) for x, y in _corners(shape)], fill=255)
    coverage = np.asarray(canvas, dtype=np.float32).reshape(side, scale, side, scale).mean(axis=(1, 3))
    return coverage >= 127.5


def _corners(shape: str) -> list[tuple[float, float]]:
    """Return a polygon's corners (x, y) in the unit square."""
    if shape == "square":
        return [(0, 0), (1, 0), (1, 1), (0, 1)]
    if shape == "triangle":
        return [(0.5, 0), (1, 1), (0, 1)]
    angles = np.pi * (np.arange(10) / 5 - 0.5)
    radius = np.where(np.arange(10) % 2 == 0, 1.0, 0.45)
    points = np.stack([np.cos(angles) * radius, np.sin(angles) * radius], axis=1)
    low, high = points.min(axis=0), points.max(axis=0)
    return [(float(x), float(y)) for x, y in (points - low) / (high - low)]
