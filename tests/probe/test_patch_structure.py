"""Patch assignment and patch structure against direct loops."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from prebench.errors import DataError
from prebench.probe.patch_structure import (
    OBJECT_METRICS,
    STRUCTURE_METRICS,
    ObjectPatches,
    assign_patches,
    patch_structure,
)


def direct_structure(tokens: np.ndarray, assignment: np.ndarray) -> list[float]:
    """The definitions, pair by pair, for one image: tokens [N, D], assignment [N]."""

    def cosine(a: np.ndarray, b: np.ndarray) -> float:
        lengths = float(np.sqrt(a @ a) * np.sqrt(b @ b))
        return float(a @ b) / lengths if lengths > 0 else 0.0

    def mean(values: list[float]) -> float:
        return sum(values) / len(values) if values else math.nan

    raw = {True: [], False: []}
    centred = {True: [], False: []}
    shifted = tokens - tokens.mean(axis=0)
    for i, j in itertools.combinations(range(len(tokens)), 2):
        if assignment[i] and assignment[j]:
            same = bool(assignment[i] == assignment[j])
            raw[same].append(cosine(tokens[i], tokens[j]))
            centred[same].append(cosine(shifted[i], shifted[j]))
    wins = [(s > d) + (s == d) / 2 for s in centred[True] for d in centred[False]]
    return [mean(raw[True]), mean(raw[False]), mean(centred[True]), mean(centred[False]), mean(wins)]


@st.composite
def _batches(draw: st.DrawFn) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    batch, side, dims = draw(st.integers(1, 3)), draw(st.integers(1, 5)), draw(st.integers(1, 8))
    tokens = rng.normal(size=(batch, side * side, dims)).astype(np.float32)
    tokens += np.float32(draw(st.sampled_from([0.0, 1.0, 30.0])))  # a large common part, as in deep layers
    masks = rng.integers(0, draw(st.integers(1, 6)), size=(batch, side, side))
    return tokens, np.stack([assign_patches(mask, (side, side)) for mask in masks])


@settings(max_examples=60, deadline=None)
@given(_batches())
def test_structure_equals_the_direct_computation(batch):
    tokens, assignment = batch
    found = patch_structure(torch.from_numpy(tokens), torch.from_numpy(assignment))
    expected = [direct_structure(t.astype(np.float64), a) for t, a in zip(tokens, assignment, strict=True)]
    np.testing.assert_allclose(found.numpy(), expected, rtol=0, atol=1e-5, equal_nan=True)


def test_separate_objects_have_auc_one_and_equal_tokens_tie():
    first, second = torch.tensor([1.0, 0.0]), torch.tensor([0.0, 1.0])
    assignment = torch.tensor([[1, 1, 2, 2], [1, 2, 1, 2]])
    tokens = torch.stack([first, first, second, second]).expand(2, -1, -1)
    right, wrong = patch_structure(tokens, assignment).tolist()
    assert dict(zip(STRUCTURE_METRICS, right, strict=True)) == pytest.approx(
        {"cohesion": 1, "coupling": 0, "centred_cohesion": 1, "centred_coupling": -1, "auc": 1}
    )
    assert wrong[STRUCTURE_METRICS.index("auc")] == pytest.approx(0.25)
    equal = patch_structure(torch.full((1, 4, 3), 0.1), assignment[:1])[0].tolist()
    assert equal == pytest.approx([1, 1, 0, 0, 0.5])


def test_background_is_in_no_pair_but_in_the_mean_token():
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randn((1, 6, 4), generator=generator)
    assignment = torch.tensor([[1, 1, 2, 2, 0, 0]])
    changed = tokens.clone()
    changed[0, 4:] += 5
    before, after = patch_structure(tokens, assignment)[0], patch_structure(changed, assignment)[0]
    assert torch.equal(before[:2], after[:2])
    assert not torch.allclose(before[2:4], after[2:4])


def test_undefined_values_are_nan_for_their_image_only():
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randn((5, 4, 3), generator=generator)
    tokens[4, 0, 0] = torch.nan
    assignment = torch.tensor([[0, 0, 0, 0], [1, 1, 1, 0], [1, 2, 3, 4], [1, 1, 2, 2], [1, 1, 2, 2]])
    defined = torch.isfinite(patch_structure(tokens, assignment)).tolist()
    nothing, cohesion, coupling, everything = [False] * 5, [True, False] * 2 + [False], [False, True] * 2 + [False], 5
    assert defined == [nothing, cohesion, coupling, [True] * everything, nothing]
    assert torch.isnan(patch_structure(tokens[:1], assignment[:1])).all()


def test_a_patch_goes_to_the_object_that_covers_most_of_it():
    mask = np.zeros((4, 8), dtype=np.uint8)
    mask[0:2, 0:2] = 3  # 4 of 16 pixels
    mask[2:4, 0:3] = 2  # 6 of 16
    mask[0, 4] = 7  # 1 of 16
    assert assign_patches(mask, (1, 2)).tolist() == [2, 0]
    assert assign_patches(mask, (1, 2), min_share=1 / 16).tolist() == [2, 7]
    mask[2:4, 2] = 0  # 4 of 16 each: the lower id
    assert assign_patches(mask, (1, 2)).tolist() == [2, 0]


def test_the_smallest_share_itself_is_enough():
    mask = np.zeros((8, 8), dtype=np.uint8)
    mask[0] = 1
    assert assign_patches(mask, (1, 1), min_share=1 / 8).tolist() == [1]
    mask[0, 0] = 0
    assert assign_patches(mask, (1, 1), min_share=1 / 8).tolist() == [0]


def test_a_mask_that_does_not_divide_is_resampled_by_area():
    mask = np.array([[1, 2, 2]])  # one patch edge cuts the middle pixel: shares 2/3 and 1/3, then 1
    assert assign_patches(mask, (1, 2)).tolist() == [1, 2]
    assert assign_patches(np.array([[2, 1, 1]]), (1, 2)).tolist() == [2, 1]
    assert assign_patches(np.array([[1, 2], [0, 0]]), (4, 4)).tolist() == [1, 1, 2, 2] * 2 + [0] * 8


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 7), st.integers(1, 7), st.integers(1, 5), st.integers(1, 5), st.integers(0, 2**32 - 1))
def test_assignment_equals_counting_on_the_common_refinement(height, width, rows, cols, seed):
    mask = np.random.default_rng(seed).integers(0, 4, size=(height, width))
    fine = np.kron(mask, np.ones((rows, cols), dtype=int))  # each patch is now height x width whole pixels
    expected = []
    for row, col in itertools.product(range(rows), range(cols)):
        patch = fine[row * height : (row + 1) * height, col * width : (col + 1) * width]
        counts = np.bincount(patch.reshape(-1), minlength=4)[1:]
        expected.append(int(counts.argmax()) + 1 if counts.max() >= patch.size / 8 else 0)
    assert assign_patches(mask, (rows, cols)).tolist() == expected


def test_an_empty_mask_assigns_nothing():
    assert assign_patches(np.zeros((64, 64), dtype=np.uint8), (8, 8)).tolist() == [0] * 64


@pytest.mark.parametrize(
    ("mask", "message"),
    [
        (np.zeros((2, 2, 3), dtype=np.uint8), "shape"),
        (np.zeros((0, 4), dtype=np.uint8), "empty"),
        (np.full((2, 2), 0.5), "integers"),
        (np.full((2, 2), -1), "negative"),
    ],
)
def test_a_wrong_mask_is_one_clear_line(mask, message):
    with pytest.raises(DataError, match=message) as caught:
        assign_patches(mask, (2, 2))
    assert "\n" not in str(caught.value)


def direct_objects(tokens: np.ndarray, assignment: np.ndarray) -> list[list[float]]:
    """Each object's cohesion and coupling, plain and centred, pair by pair."""
    found = []
    for own in sorted(set(assignment[assignment > 0].tolist())):
        row = []
        for values in (tokens, tokens - tokens.mean(axis=0)):
            length = np.linalg.norm(values, axis=1, keepdims=True)
            unit = np.divide(values, length, out=np.zeros_like(values), where=length > 0)
            mine = [i for i, owner in enumerate(assignment) if owner == own]
            others = [i for i, owner in enumerate(assignment) if owner not in (0, own)]
            same = [float(unit[i] @ unit[j]) for i, j in itertools.combinations(mine, 2)]
            different = [float(unit[i] @ unit[j]) for i in mine for j in others]
            row += [np.mean(pairs) if pairs else math.nan for pairs in (same, different)]
        found.append(row)
    return found


@settings(max_examples=40, deadline=None)
@given(_batches())
def test_single_objects_equal_the_direct_computation(batch):
    for tokens, assignment in zip(*batch, strict=True):
        objects = ObjectPatches(assignment)
        found = objects.measure(torch.from_numpy(tokens))[1].numpy()
        assert objects.ids.tolist() == sorted(set(assignment[assignment > 0].tolist()))
        assert found.shape == (len(objects.ids), len(OBJECT_METRICS))
        if (assignment > 0).sum() >= 2:
            expected = direct_objects(tokens.astype(np.float64), assignment)
            np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5, equal_nan=True)
        else:
            assert np.isnan(found).all()
