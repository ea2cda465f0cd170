"""Patch structure: how alike the visual tokens of one object are, and how alike those of different objects.

Intra-object cohesion and inter-object coupling are those of arXiv 2603.20808 (its diagnosis by segmentation masks); the
centred forms and the AUC are ours, for the raw ratio cohesion / coupling explodes where coupling crosses zero.
docs/probes.md has every formula.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from prebench.errors import DataError

STRUCTURE_METRICS = ("cohesion", "coupling", "centred_cohesion", "centred_coupling", "auc")
"""The columns of `patch_structure`, in this order."""

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
    values = tokens.detach().double()
    ids = assignment.to(values.device)
    most = int((ids != 0).sum(dim=1).max())
    result = torch.full((len(values), len(STRUCTURE_METRICS)), torch.nan, dtype=torch.float64, device=values.device)
    if most < 2:
        return result
    # The assigned patches of each image come first; images with fewer keep zeros behind, which no pair counts.
    order = (ids == 0).to(torch.uint8).argsort(dim=1, stable=True)[:, :most]
    ids = ids.gather(1, order)
    centred = values - values.mean(dim=1, keepdim=True)
    floor = ZERO_NORM * values.norm(dim=-1, keepdim=True).amax(dim=1, keepdim=True)
    raw_BP = _pair_cosines(values, order, torch.zeros_like(floor))
    centred_BP = _pair_cosines(centred, order, floor)

    first, second = torch.triu_indices(most, most, offset=1, device=ids.device)
    known = (ids[:, first] != 0) & (ids[:, second] != 0)
    same_BP = known & (ids[:, first] == ids[:, second])
    different_BP = known & (ids[:, first] != ids[:, second])
    columns = [_mean(c, which) for c in (raw_BP, centred_BP) for which in (same_BP, different_BP)]
    columns.append(_auc(centred_BP, same_BP, different_BP))
    finite = torch.isfinite(values).all(dim=2).all(dim=1)
    return torch.where(finite[:, None], torch.stack(columns, dim=1), result)


def _pair_cosines(vectors_BND: Tensor, order_BM: Tensor, floor_B11: Tensor) -> Tensor:
    """Return the cosines of the unordered pairs of the picked tokens, [B, M (M - 1) / 2]; 0 at or below the floor."""
    picked = vectors_BND.gather(1, order_BM[..., None].expand(-1, -1, vectors_BND.shape[2]))
    norm = picked.norm(dim=-1, keepdim=True)
    unit = torch.where(norm > floor_B11, picked / norm, 0.0)
    cosines = unit @ unit.transpose(1, 2)
    first, second = torch.triu_indices(cosines.shape[1], cosines.shape[1], offset=1, device=cosines.device)
    return cosines[:, first, second]


def _mean(values_BP: Tensor, which_BP: Tensor) -> Tensor:
    # 0 / 0 is the NaN of an image without such pairs
    return torch.where(which_BP, values_BP, 0.0).sum(dim=1) / which_BP.sum(dim=1)


def _auc(values_BP: Tensor, same_BP: Tensor, different_BP: Tensor) -> Tensor:
    """Return the Mann-Whitney probability P(same > different) + P(same = different) / 2 of each row, [B]."""
    values = values_BP.round(decimals=TIE_DECIMALS)
    sorted_different = torch.where(different_BP, values, torch.inf).sort(dim=1).values
    below = torch.searchsorted(sorted_different, values, right=False)
    not_above = torch.searchsorted(sorted_different, values, right=True)
    wins = torch.where(same_BP, (below + not_above).double() / 2, 0.0).sum(dim=1)
    return wins / (same_BP.sum(dim=1) * different_BP.sum(dim=1))
