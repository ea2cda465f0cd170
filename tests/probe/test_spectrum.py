"""Token statistics against direct computation over all tokens, joined parts, and known cases."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from prebench.probe.spectrum import Moments, MomentSums, statistics

LAYERS = 2


def sums_of(images: list[np.ndarray], layers: int = 1, batch: int = 3) -> Moments:
    """Every token counts; images of equal length are added together, as extraction does."""
    sums = MomentSums(layers)
    for layer in range(layers):
        for start in range(0, len(images), batch):
            some = images[start : start + batch]
            for size in sorted({len(image) for image in some}):
                tokens = torch.from_numpy(np.stack([image for image in some if len(image) == size])) * (layer + 1)
                sums.add(layer, tokens, torch.arange(size).expand(len(tokens), -1))
    return sums.moments()


def direct(images: list[np.ndarray]) -> dict[str, float]:
    tokens = np.concatenate(images).astype(np.float64)
    covariance = np.cov(tokens.T, bias=True)
    values = np.clip(np.linalg.eigvalsh(covariance), 0, None)
    shares = values[values > 0] / values.sum()
    correlation = np.corrcoef(tokens.T)
    upper = np.triu_indices(len(correlation), 1)
    cosines = []
    for i, one in enumerate(images):
        for other in images[i + 1 :]:
            for a in one.astype(np.float64):
                cosines += [a @ b / np.linalg.norm(a) / np.linalg.norm(b) for b in other.astype(np.float64)]
    return {
        "participation_ratio": values.sum() ** 2 / (values**2).sum(),
        "effective_rank": np.exp(-(shares * np.log(shares)).sum()),
        "feature_correlation": np.abs(correlation[upper]).mean(),
        "norm": np.linalg.norm(tokens, axis=1).mean(),
        "anisotropy": np.mean(cosines),
    }


@settings(max_examples=25)
@given(st.integers(0, 2**32 - 1), st.sampled_from([0.0, 5.0, 300.0]), st.integers(2, 7))
def test_statistics_equal_the_direct_computation(seed, common, dims):
    rng = np.random.default_rng(seed)
    images = [rng.normal(size=(rng.integers(2, 6), dims)).astype(np.float32) + np.float32(common) for _ in range(7)]
    found = statistics(sums_of(images), 0)
    for name, value in direct(images).items():
        assert found[name] == pytest.approx(value, rel=2e-3 if common > 100 else 1e-4, abs=1e-5), name


def test_known_spectra():
    tokens = np.concatenate([np.eye(4), -np.eye(4)]).astype(np.float32)
    equal = statistics(sums_of([tokens]), 0)
    assert equal["participation_ratio"] == pytest.approx(4) and equal["effective_rank"] == pytest.approx(4)
    assert equal["feature_correlation"] == pytest.approx(0, abs=1e-7) and equal["norm"] == pytest.approx(1)
    assert np.isnan(equal["anisotropy"])  # one image alone has no pairs of different images
    line = statistics(sums_of([np.outer(np.arange(1, 5), [1, 2]).astype(np.float32)] * 2), 0)
    assert line["participation_ratio"] == pytest.approx(1) and line["feature_correlation"] == pytest.approx(1)
    assert line["anisotropy"] == pytest.approx(1)
    constant = statistics(sums_of([np.ones((3, 2), dtype=np.float32)] * 2), 0)
    assert np.isnan(constant["participation_ratio"]) and np.isnan(constant["feature_correlation"])


def test_zero_tokens_have_no_direction():
    images = [np.array([[0, 0], [1, 0]], dtype=np.float32), np.array([[2, 0]], dtype=np.float32)]
    assert statistics(sums_of(images), 0)["anisotropy"] == pytest.approx(0.5)


def test_joined_parts_equal_the_whole():
    rng = np.random.default_rng(1)
    images = [(rng.normal(size=(4, 5)) + number).astype(np.float32) for number in range(9)]
    whole = sums_of(images, LAYERS)
    parts = [sums_of(images[:2], LAYERS), sums_of(images[2:3], LAYERS), sums_of(images[3:], LAYERS)]
    joined = Moments.join(parts)
    for field in dataclasses.fields(Moments):
        found, expected = getattr(joined, field.name), getattr(whole, field.name)
        np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5, err_msg=field.name)
    assert whole.count.tolist() == [36, 36] and whole.images.tolist() == [9, 9]
    assert statistics(whole, 1)["norm"] == pytest.approx(2 * statistics(whole, 0)["norm"], rel=1e-6)


def test_wide_tokens_are_summed_in_float32(monkeypatch: pytest.MonkeyPatch):
    rng = np.random.default_rng(2)
    images = [rng.normal(size=(4, 6)).astype(np.float32) + 20 for _ in range(50)]
    expected = statistics(sums_of(images), 0)
    monkeypatch.setattr("prebench.probe.spectrum.FLOAT64_DIMS", 5)
    narrow = sums_of(images)
    assert narrow.scatter.dtype == np.float32
    assert statistics(narrow, 0) == pytest.approx(expected, rel=1e-4)
