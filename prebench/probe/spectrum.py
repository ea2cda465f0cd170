"""Token statistics of a layer: how many directions the visual tokens use, how alike they are, how long.

Sums over all images are enough, so nothing is kept per token. docs/probes.md has the formulas and their sources.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields

import numpy as np
import torch
from torch import Tensor

STATISTICS = ("participation_ratio", "effective_rank", "feature_correlation", "norm", "anisotropy")
FLOAT64_DIMS = 1024
"""Wider tokens have their second moments in float32: in a model of 7B parameters they take 2 GB."""


@dataclass(frozen=True)
class Moments:
    """Sums over the visual tokens of S layers."""

    count: np.ndarray
    """[S] int64: sampled tokens, of which mean and scatter are."""
    mean: np.ndarray
    """[S, D] float64."""
    scatter: np.ndarray
    """[S, D, D] float64 (float32 in wide models): sum of (h - mean) (h - mean)^T over the sampled tokens."""
    tokens: np.ndarray
    """[S] int64: all tokens."""
    images: np.ndarray
    """[S] int64."""
    pairs: np.ndarray
    """[S] float64: ordered pairs of tokens of one image, each with itself included: sum of N_i^2."""
    norm: np.ndarray
    """[S] float64: sum of all tokens' lengths."""
    direction: np.ndarray
    """[S, D] float64: sum of all tokens' unit vectors."""
    within: np.ndarray
    """[S] float64: sum over images of the squared length of the sum of the image's unit vectors."""

    def arrays(self) -> dict[str, np.ndarray]:
        """Return the fields by name."""
        return {field.name: getattr(self, field.name) for field in fields(self)}

    @classmethod
    def join(cls, parts: Sequence[Moments]) -> Moments:
        """Return the moments of all parts' tokens (Chan, Golub and LeVeque, 1983)."""
        total = parts[0]
        for part in parts[1:]:
            count = total.count + part.count
            share = part.count / np.maximum(count, 1)
            shift = part.mean - total.mean
            between = (total.count * share)[:, None, None] * shift[:, :, None] * shift[:, None, :]
            summed = {
                name: getattr(total, name) + getattr(part, name)
                for name in ("tokens", "images", "pairs", "norm", "direction", "within")
            }
            scatter = (total.scatter + part.scatter + between).astype(total.scatter.dtype)
            total = cls(count, total.mean + share[:, None] * shift, scatter, **summed)
        return total


class MomentSums:
    """Running sums of `Moments`, on the device of the tokens.

    Args:
        layers: S.
    """

    def __init__(self, layers: int) -> None:
        self._layers: list[_LayerSums | None] = [None] * layers

    def add(self, layer: int, tokens_BND: Tensor, sample_BM: Tensor) -> None:
        """Add the tokens of B images at one layer.

        Args:
            layer: 0..S-1.
            tokens_BND: float32, all tokens of each image.
            sample_BM: which of them count for mean and scatter.
        """
        rows = torch.arange(len(tokens_BND), device=tokens_BND.device)[:, None]
        sample = tokens_BND[rows, sample_BM].flatten(0, 1)
        sums = self._layers[layer]
        if sums is None:
            sums = self._layers[layer] = _LayerSums(sample)
        sums.add(tokens_BND, sample)

    def moments(self) -> Moments:
        """Return the sums so far."""
        parts = [sums.moments() for sums in self._layers if sums is not None]
        return Moments(**{name: np.stack([part[name] for part in parts]) for name in parts[0]})


class _LayerSums:
    def __init__(self, sample_MD: Tensor) -> None:
        dims, device = sample_MD.shape[1], sample_MD.device
        dtype = torch.float64 if dims <= FLOAT64_DIMS else torch.float32
        # Tokens have a large common part: sums of squares are taken about a point near the mean.
        self.shift = sample_MD.mean(dim=0)
        self.sum = torch.zeros(dims, dtype=torch.float64, device=device)
        self.square = torch.zeros(dims, dims, dtype=dtype, device=device)
        self.direction = torch.zeros(dims, dtype=torch.float64, device=device)
        self.norm = torch.zeros((), dtype=torch.float64, device=device)
        self.within = torch.zeros_like(self.norm)
        self.count = self.tokens = self.images = self.pairs = 0

    def add(self, tokens_BND: Tensor, sample_MD: Tensor) -> None:
        centred = sample_MD - self.shift
        self.sum += centred.sum(dim=0, dtype=torch.float64)
        self.square += centred.T @ centred
        norm_BN = tokens_BND.norm(dim=-1)
        inverse = torch.where(norm_BN > 0, norm_BN.reciprocal(), 0.0)
        direction_BD = torch.bmm(inverse[:, None], tokens_BND)[:, 0].double()
        self.norm += norm_BN.sum(dtype=torch.float64)
        self.direction += direction_BD.sum(dim=0)
        self.within += direction_BD.square().sum()
        images, size = norm_BN.shape
        self.count += len(sample_MD)
        self.images += images
        self.tokens += images * size
        self.pairs += images * size * size

    def moments(self) -> dict[str, np.ndarray]:
        offset = self.sum / self.count
        scatter = self.square - (self.count * torch.outer(offset, offset)).to(self.square.dtype)
        mean = self.shift.double() + offset
        counts = {name: np.int64(getattr(self, name)) for name in ("count", "tokens", "images")}
        sums = {name: getattr(self, name).cpu().numpy() for name in ("norm", "direction", "within")}
        values = {"mean": mean.cpu().numpy(), "scatter": scatter.cpu().numpy(), "pairs": np.float64(self.pairs)}
        return {name: np.asarray(value) for name, value in (counts | sums | values).items()}


def statistics(moments: Moments, layer: int) -> dict[str, float]:
    """Return the token statistics of one layer, keys as in `STATISTICS`; NaN where undefined.

    Args:
        moments: of at least two sampled tokens.
        layer: index into the S layers.
    """
    covariance = moments.scatter[layer].astype(np.float64) / max(1, int(moments.count[layer]))
    eigenvalues = np.clip(np.linalg.eigvalsh(covariance), 0, None)
    total = float(eigenvalues.sum())
    tokens, pairs = int(moments.tokens[layer]), float(moments.pairs[layer])
    between = tokens * tokens - pairs
    direction = moments.direction[layer]
    return {
        "participation_ratio": total**2 / float((eigenvalues**2).sum()) if total else math.nan,
        "effective_rank": _effective_rank(eigenvalues / total) if total else math.nan,
        "feature_correlation": _mean_correlation(covariance),
        "norm": float(moments.norm[layer]) / tokens,
        "anisotropy": float(direction @ direction - moments.within[layer]) / between if between else math.nan,
    }


def _effective_rank(shares: np.ndarray) -> float:
    positive = shares[shares > 0]
    return float(np.exp(-(positive * np.log(positive)).sum()))


def _mean_correlation(covariance: np.ndarray) -> float:
    """Return the mean absolute correlation over pairs of different features; constant features are left out."""
    variance = covariance.diagonal()
    kept = variance > 1e-12 * variance.max(initial=0)
    deviation = np.sqrt(variance[kept])
    size = len(deviation)
    if size < 2:
        return math.nan
    correlation = np.abs(covariance[np.ix_(kept, kept)]) / np.outer(deviation, deviation)
    return float((correlation.sum() - np.trace(correlation)) / (size * (size - 1)))
