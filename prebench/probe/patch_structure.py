"""Patch structure: how alike the visual tokens of one object are, and how alike those of different objects.

Intra-object cohesion and inter-object coupling are those of arXiv 2603.20808 (its diagnosis by segmentation masks); the
centred forms and the AUC are ours, for the raw ratio cohesion / coupling explodes where coupling crosses zero.
docs/probes.md has every formula.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from prebench.errors import DataError

STRUCTURE_METRICS = ("cohesion", "coupling", "centred_cohesion", "centred_coupling", "auc")
"""The columns of `patch_structure`, in this order."""
OBJECT_METRICS = STRUCTURE_METRICS[:4]
"""What is known of each object by itself, in this order."""

ZERO_NORM = 1e-7
"""A centred token shorter than this share of the image's longest token is float32 round-off: it has no direction."""
TIE_DECIMALS = 9
"""Cosines that agree to so many decimals are ties, so that equal tokens tie whatever the order of a sum."""


def assign_patches(mask: np.ndarray, grid: tuple[int, int], min_share: float = 1 / 8) -> np.ndarray:
    """Assign each patch of a grid to the object that covers most of it.

    Patch borders need not fall on pixel borders: a mask of any size is resampled by exact area (in integer units of
    1 / (rows * cols) pixel), as an image that the processor stretches to the tower's size.

    Args:
        mask: [H, W] integers, 0 = background, i = object i.
        grid: rows and columns of the patch grid.
        min_share: smallest share of the patch's area that makes the covering object its owner, in (0, 1].

    Returns:
        [rows * cols] int64 in reading order: 0 where no object covers `min_share` of the patch, else the object's id.
        Ties go to the lower id. Background stays out of every pair, so no separate "ignore" value exists.

    Raises:
        DataError: the mask is no two-dimensional, non-empty array of non-negative integers.
    """
    mask = np.asarray(mask)
    if mask.ndim != 2 or mask.size == 0:
        raise DataError(f"mask: shape {mask.shape}, but it must be [height, width] and not empty")
    if mask.dtype.kind not in "biu":
        raise DataError(f"mask: type {mask.dtype}, but object ids must be integers (0 = background)")
    if int(mask.min()) < 0:
        raise DataError(f"mask: object id {int(mask.min())} is negative; 0 is the background, objects count from 1")
    rows, cols = grid
    ids = [int(i) for i in np.unique(mask) if i != 0]
    if not ids:
        return np.zeros(rows * cols, dtype=np.int64)
    height, width = mask.shape
    overlap_rows = _overlaps(height, rows)
    overlap_cols = _overlaps(width, cols)
    covered = np.stack([(overlap_rows @ (mask == i) @ overlap_cols.T).reshape(-1) for i in ids])
    winner = covered.argmax(axis=0)  # the first of equal values: the lower id
    enough = covered.max(axis=0) >= max(min_share * height * width, 1)
    return np.where(enough, np.asarray(ids, dtype=np.int64)[winner], 0)


def _overlaps(pixels: int, patches: int) -> np.ndarray:
    """Return [patches, pixels] int64: the length that each pixel shares with each patch, in 1 / patches pixels."""
    pixel = np.arange(pixels, dtype=np.int64) * patches
    patch = np.arange(patches, dtype=np.int64)[:, None] * pixels
    return np.clip(np.minimum(pixel + patches, patch + pixels) - np.maximum(pixel, patch), 0, None)


def patch_structure(tokens: Tensor, assignment: Tensor) -> Tensor:
    """Return the patch structure of each image, [B, K] float64, columns as in `STRUCTURE_METRICS`.

    - cohesion: mean cosine over unordered pairs of distinct patches of the same object;
    - coupling: mean cosine over pairs of patches of different objects;
    - centred_cohesion, centred_coupling: the same after the image's mean token (over all patches) is subtracted;
    - auc: probability that a same-object pair has a higher centred cosine than a different-object pair, ties half.

    Background patches are in no pair. A token without direction (zero; centred: at float32 round-off) has cosine 0 with
    every other. A value is NaN where it has no pairs (no object with two patches; fewer than two objects) and where
    one of the image's tokens is not finite.

    Args:
        tokens: [B, N, D], the visual tokens of B images at one layer.
        assignment: [B, N], 0 = background, i = object i (`assign_patches`).
    """
    images = zip(tokens.detach(), assignment.cpu().numpy(), strict=True)
    return torch.stack([ObjectPatches(ids).structure(own) for own, ids in images])


class ObjectPatches:
    """The patches of one image's objects: worked out once, asked at every layer.

    Args:
        assignment: [N] object ids, 0 = background.
    """

    def __init__(self, assignment: np.ndarray) -> None:
        self._patches = torch.from_numpy(np.flatnonzero(assignment))
        self.ids, owners = np.unique(assignment[assignment != 0], return_inverse=True)
        """[O] the objects that own a patch, ascending."""
        owners = owners.reshape(-1)
        self._members_OM = torch.from_numpy(owners == np.arange(owners.max(initial=-1) + 1)[:, None]).double()
        first, second = np.triu_indices(len(owners), 1)
        same = owners[first] == owners[second]
        cells = first * len(owners) + second
        self._same, self._different = torch.from_numpy(cells[same]), torch.from_numpy(cells[~same])
        sizes = self._members_OM.sum(dim=1)
        pairs = torch.stack([sizes * (sizes - 1) / 2, sizes * (len(owners) - sizes)], dim=1)
        self._pairs_O2 = torch.where(pairs > 0, pairs, torch.nan)

    def structure(self, tokens_ND: Tensor) -> Tensor:
        """Return the image's patch structure at one layer, [K] float64 on the CPU (`patch_structure`)."""
        return self.measure(tokens_ND)[0]

    def measure(self, tokens_ND: Tensor) -> tuple[Tensor, Tensor]:
        """Return the image's patch structure, [K], and that of each of its objects, [O, 4], float64 on the CPU.

        An object's cohesion is the mean cosine over its own pairs of patches, its coupling that over pairs of one of
        its patches and one of another object's; columns as in `OBJECT_METRICS`, rows as in `ids`.
        """
        result = torch.full((len(STRUCTURE_METRICS),), torch.nan, dtype=torch.float64)
        values = tokens_ND.double()
        longest = values.norm(dim=-1).max()
        if len(self._patches) < 2 or not math.isfinite(longest):
            return result, torch.full((len(self.ids), len(OBJECT_METRICS)), torch.nan, dtype=torch.float64)
        raw = values[self._patches.to(values.device)]
        result[:2], plain = self._means(*_unit(raw, 0.0))
        directions, known = _unit(raw - values.mean(dim=0), ZERO_NORM * float(longest))
        result[2:4], centred = self._means(directions, known)
        result[4] = self._auc(directions)
        return result, torch.cat([plain, centred], dim=1)

    def _means(self, unit_MD: Tensor, known_M: Tensor) -> tuple[Tensor, Tensor]:
        """Return the mean cosine over same-object and different-object pairs: [2], and by object, [O, 2].

        From the objects' sums: O(M D).
        """
        members = self._members_OM.to(unit_MD.device)
        sums = members @ unit_MD
        squares = sums.square().sum(dim=1)
        total = sums.sum(dim=0)
        objects = float(squares.sum())
        same = (objects - int(known_M.sum())) / 2  # a direction times itself is 1 and no pair
        different = (float(total.square().sum()) - objects) / 2
        means = torch.tensor(
            [_over(same, len(self._same)), _over(different, len(self._different))], dtype=torch.float64
        )
        own = torch.stack([(squares - members @ known_M.double()) / 2, sums @ total - squares], dim=1).cpu()
        return means, own / self._pairs_O2

    def _auc(self, unit_MD: Tensor) -> float:
        """Return the Mann-Whitney probability P(same > different) + P(same = different) / 2."""
        if len(self._same) == 0 or len(self._different) == 0:
            return math.nan
        cosines = (unit_MD @ unit_MD.T).flatten().cpu()
        same, different = (
            np.sort(cosines[cells].round(decimals=TIE_DECIMALS).numpy()) for cells in (self._same, self._different)
        )
        below = np.searchsorted(different, same, side="left")
        not_above = np.searchsorted(different, same, side="right")
        return float(below.sum() + not_above.sum()) / 2 / len(same) / len(different)


def _unit(vectors_MD: Tensor, floor: float) -> tuple[Tensor, Tensor]:
    """Return the vectors' directions, zero at or below the floor, and which are above it, [M]."""
    norm = vectors_MD.norm(dim=-1, keepdim=True)
    known = norm > floor
    return vectors_MD * torch.where(known, norm.reciprocal(), 0.0), known[:, 0]


def _over(total: float, count: int) -> float:
    return total / count if count else math.nan
