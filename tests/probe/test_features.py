"""The files and sums that a probe pass leaves: equal after saving, joined in any order, read a part at a time."""

from __future__ import annotations

import dataclasses
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.numpy
from transformers import AutoModelForImageTextToText, AutoProcessor

from prebench.data.scenes import generate_scene, render
from prebench.errors import StoreError
from prebench.probe import features as features_file
from prebench.probe.extract import PIXEL_SIDE, extract_features
from prebench.probe.features import ROWS, ProbeFeatures, RowFile

COUNT = 6


class Lazy(Sequence[Any]):
    """Pictures (0) or masks (1) of scenes, made when asked for; notes the order of asking."""

    def __init__(self, which: int, asked: list[str]) -> None:
        self._which, self._asked = which, asked

    def __len__(self) -> int:
        return COUNT

    def __getitem__(self, index: Any) -> Any:
        self._asked.append(f"{'im'[self._which]}{index}")
        return render(generate_scene(0, "probe", index))[self._which]


@pytest.fixture(scope="module")
def loaded(tiny_export: Path):
    return AutoModelForImageTextToText.from_pretrained(tiny_export), AutoProcessor.from_pretrained(tiny_export)


@pytest.fixture(scope="module")
def features(loaded) -> ProbeFeatures:
    return extract_features(*loaded, Lazy(0, []), Lazy(1, []), batch_size=3)


def assert_equal(one: ProbeFeatures, other: ProbeFeatures) -> None:
    for name in ROWS:
        np.testing.assert_array_equal(getattr(one, name), getattr(other, name), err_msg=name)
    for name in ("moments", "encoder_moments", "decoded"):
        first, second = getattr(one, name), getattr(other, name)
        for key, value in first.arrays().items():
            np.testing.assert_array_equal(value, second.arrays()[key], err_msg=f"{name}.{key}")
            assert value.dtype == second.arrays()[key].dtype
    plain = ("attention", "injected", "structure_metrics")
    assert all(getattr(one, name) == getattr(other, name) for name in plain)
    assert one.decoded.texts == other.decoded.texts


def test_images_are_read_batch_by_batch(loaded):
    asked: list[str] = []
    handle = loaded[0].model.language_model.register_forward_hook(lambda *_: asked.append("pass"))
    extract_features(*loaded, Lazy(0, asked), Lazy(1, asked), batch_size=4)
    handle.remove()
    first, second = ["i0", "i1", "i2", "i3", "m0", "m1", "m2", "m3"], ["i4", "i5", "m4", "m5"]
    assert asked == [*first, "pass", *second, "pass"]


def test_rows_lie_on_disk_and_sums_know_every_image(features):
    assert all(isinstance(getattr(features, name), np.memmap) for name in ROWS)
    assert features.pixels.shape == (COUNT, 3 * PIXEL_SIDE**2)
    image = render(generate_scene(0, "probe", 2))[0].convert("RGB").resize((PIXEL_SIDE, PIXEL_SIDE), 4)
    np.testing.assert_allclose(features.pixels[2], np.asarray(image).reshape(-1) / 255, atol=1e-6)
    assert features.moments.images.tolist() == [COUNT] * 5 and features.moments.tokens.tolist() == [COUNT * 64] * 5
    assert features.moments.count.tolist() == [COUNT * 16] * 5 and features.decoded.total == COUNT * 8


def test_saved_features_load_equal_with_all_their_sums(features, tmp_path, monkeypatch: pytest.MonkeyPatch):
    whole, pieces = tmp_path / "whole.safetensors", tmp_path / "pieces.safetensors"
    features.save(whole)
    monkeypatch.setattr(features_file, "COPY_BYTES", 100)
    features.save(pieces)
    assert whole.read_bytes() == pieces.read_bytes()
    assert_equal(ProbeFeatures.load(whole), features)
    standard = safetensors.numpy.load_file(whole)  # the format is the library's own
    np.testing.assert_array_equal(standard["pooled"], features.pooled)
    np.testing.assert_array_equal(standard["moments.scatter"], features.moments.scatter)


def test_a_file_that_is_cut_off_or_strange_is_named(features, tmp_path):
    path = tmp_path / "shard.safetensors"
    features.save(path)
    content = path.read_bytes()
    for damaged in (content[: len(content) // 2], content[:7], b"", b"\xff" * 100):
        path.write_bytes(damaged)
        with pytest.raises(StoreError, match=r"shard\.safetensors: no probe features .*delete it") as caught:
            ProbeFeatures.load(path)
        assert "\n" not in str(caught.value)


def test_features_without_sums_are_saved_too(features, tmp_path):
    bare = ProbeFeatures(features.pooled, features.encoder_pooled, features.structure, features.encoder_structure)
    path = tmp_path / "bare.safetensors"
    bare.save(path)
    found = ProbeFeatures.load(path)
    assert found.pixels is None and found.moments is None and found.decoded is None
    np.testing.assert_array_equal(found.structure, features.structure)


def test_parts_in_another_order_are_the_whole(loaded, features):
    pictures, masks = Lazy(0, []), Lazy(1, [])
    shares = [[1, 4], [0, 2, 3, 5]]
    parts = [extract_features(*loaded, [pictures[i] for i in own], [masks[i] for i in own]) for own in shares]
    joined = ProbeFeatures.concatenate(parts).take(np.argsort(np.concatenate(shares)))
    for name in ROWS:
        np.testing.assert_allclose(getattr(joined, name), getattr(features, name), rtol=1e-4, atol=2e-5, err_msg=name)
    assert joined.decoded.total == features.decoded.total
    for field in dataclasses.fields(features.moments):
        one, other = getattr(joined.moments, field.name), getattr(features.moments, field.name)
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-4 * np.abs(other).max(), err_msg=field.name)


def test_a_folder_that_takes_no_files_is_named(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(tempfile, "tempdir", "/nowhere")
    with pytest.raises(StoreError, match="/nowhere: can't be written"):
        RowFile().append(np.zeros((1, 2)))
