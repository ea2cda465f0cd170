"""How alike two layers see the same images: linear CKA, and CKNNA on a subset. docs/probes.md has the formulas."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property

import numpy as np

CHUNK_ROWS = 1024
CKNNA_IMAGES = 1000
"""CKNNA compares all pairs of images: it takes the first ones."""
CKNNA_NEIGHBOURS = 10


@dataclass(frozen=True)
class Representation:
    """Features of n images, read some rows at a time: they may lie on disk."""

    rows: Callable[[slice], np.ndarray]
    """Gives [b, D] of a slice of the images."""
    count: int
    """n."""

    @cached_property
    def _mean(self) -> np.ndarray:
        total = sum(self.rows(part).astype(np.float64).sum(axis=0) for part in _chunks(self.count))
        return np.asarray(total / self.count)

    def centred(self) -> Iterator[np.ndarray]:
        """Yield the rows in order less their mean, [b, D] float64."""
        for part in _chunks(self.count):
            yield self.rows(part).astype(np.float64) - self._mean

    @cached_property
    def strength(self) -> float:
        """Return || X^T X || (Frobenius) of the centred features."""
        return float(np.linalg.norm(sum(x.T @ x for x in self.centred())))


def linear_cka(first: Representation, second: Representation) -> float:
    """Return the linear CKA of two representations of the same images, 0..1; NaN where one is constant."""
    scale = first.strength * second.strength
    if not scale:
        return math.nan
    cross = sum(x.T @ y for x, y in zip(first.centred(), second.centred(), strict=True))
    return float(np.linalg.norm(cross) ** 2 / scale)


def cknna(first: np.ndarray, second: np.ndarray, neighbours: int = CKNNA_NEIGHBOURS) -> float:
    """Return CKNNA: the alignment of two kernels over pairs of images that are neighbours in both.

    Args:
        first: [n, D_1].
        second: [n, D_2], the same images.
        neighbours: k nearest neighbours of each image; at most n - 1.

    Returns:
        At most 1, which equal neighbourhoods give; NaN where it is undefined (constant features, fewer than 3 images).
    """
    if len(first) < 3:
        return math.nan
    kernels, near = [], []
    for values in (first, second):
        centred = values.astype(np.float64) - values.astype(np.float64).mean(axis=0)
        length = np.linalg.norm(centred, axis=1, keepdims=True)
        unit = np.divide(centred, length, out=np.zeros_like(centred), where=length > 0)
        kernel = unit @ unit.T
        near.append(_nearest(kernel, min(neighbours, len(first) - 1)))
        kernels.append(kernel - kernel.mean(axis=1, keepdims=True))
    a, b = kernels
    both = float((a * b)[near[0] & near[1]].sum())
    scale = float((a * a)[near[0]].sum()) * float((b * b)[near[1]].sum())
    return both / math.sqrt(scale) if scale > 0 else math.nan


def _nearest(kernel: np.ndarray, k: int) -> np.ndarray:
    """Return which images are among the k nearest of each, [n, n] bool; no image is its own neighbour."""
    others = kernel.copy()
    np.fill_diagonal(others, -np.inf)
    order = np.argpartition(-others, k - 1, axis=1)[:, :k]
    near = np.zeros(kernel.shape, dtype=bool)
    np.put_along_axis(near, order, True, axis=1)
    return near


def _chunks(count: int) -> list[slice]:
    return [slice(start, min(start + CHUNK_ROWS, count)) for start in range(0, count, CHUNK_ROWS)]
