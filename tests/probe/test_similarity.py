"""CKA and CKNNA: their invariances, and a direct computation."""

from __future__ import annotations

import numpy as np
import pytest

from prebench.probe.similarity import Representation, cknna, linear_cka


def representation(values: np.ndarray) -> Representation:
    return Representation(lambda part: values[part], len(values))


def cka(first: np.ndarray, second: np.ndarray) -> float:
    return linear_cka(representation(first), representation(second))


@pytest.fixture
def features() -> np.ndarray:
    rng = np.random.default_rng(0)
    return rng.normal(size=(300, 8)).astype(np.float32) * np.geomspace(1, 0.1, 8, dtype=np.float32) + 7


def rotated(values: np.ndarray) -> np.ndarray:
    rotation, _ = np.linalg.qr(np.random.default_rng(1).normal(size=(8, 8)))
    return 3 * values @ rotation + 100


def test_cka_is_one_under_rotation_scale_and_shift_and_low_for_strangers(features):
    assert cka(features, rotated(features)) == pytest.approx(1)
    assert cka(features, features[:, ::-1] * np.geomspace(1, 0.01, 8)) < 0.9
    assert cka(features, np.random.default_rng(2).normal(size=(300, 8))) < 0.1
    assert np.isnan(cka(features, np.ones((300, 3))))


def test_cka_equals_the_kernel_form_whatever_the_chunks(features, monkeypatch: pytest.MonkeyPatch):
    other = np.tanh(features[:, :5] - 7)
    centring = np.eye(300) - 1 / 300
    kernels = [centring @ (v.astype(float) @ v.T.astype(float)) @ centring for v in (features, other)]
    hsic = [[(a * b).sum() for b in kernels] for a in kernels]
    expected = hsic[0][1] / np.sqrt(hsic[0][0] * hsic[1][1])
    assert cka(features, other) == pytest.approx(expected, rel=1e-9)
    monkeypatch.setattr("prebench.probe.similarity.CHUNK_ROWS", 37)
    assert cka(features, other) == pytest.approx(expected, rel=1e-9)


def direct_cknna(first: np.ndarray, second: np.ndarray, k: int) -> float:
    def kernel(values: np.ndarray) -> np.ndarray:
        unit = values - values.mean(axis=0)
        unit = unit / np.linalg.norm(unit, axis=1, keepdims=True)
        return unit @ unit.T

    def neighbours(values: np.ndarray, i: int) -> set[int]:
        own = kernel(values)[i]
        return set(sorted((j for j in range(len(own)) if j != i), key=lambda j: -own[j])[:k])

    def align(one: np.ndarray, other: np.ndarray) -> float:
        total = 0.0
        a, b = kernel(one), kernel(other)
        for i in range(len(one)):
            for j in neighbours(one, i) & neighbours(other, i):
                total += (a[i, j] - a[i].mean()) * (b[i, j] - b[i].mean())
        return total

    return align(first, second) / np.sqrt(align(first, first) * align(second, second))


def test_cknna_equals_the_direct_computation(features):
    first, second = features[:25].astype(float), np.tanh(features[:25, :3].astype(float) - 7)
    assert cknna(first, second, neighbours=4) == pytest.approx(direct_cknna(first, second, 4), rel=1e-9)


def test_cknna_of_like_and_unlike_features(features):
    assert cknna(features, rotated(features)) == pytest.approx(1)
    assert cknna(features, np.random.default_rng(2).normal(size=(300, 8))) < 0.2
    assert cknna(features[:5], features[:5]) == pytest.approx(1)  # fewer images than neighbours
    assert np.isnan(cknna(features[:2], features[:2])) and np.isnan(cknna(features, np.ones((300, 2))))
