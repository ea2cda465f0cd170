import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from prebench.data.scenes import (
    BACKGROUNDS,
    COLORS,
    FILLS,
    RGB,
    SHAPES,
    SIZES,
    Scene,
    SceneObject,
    generate_scene,
    labels,
    object_labels,
    patch_objects,
    render,
)


def covered_patches(mask: np.ndarray, number: int) -> int:
    blocks = [mask[r : r + 16, c : c + 16] for r in range(0, 96, 16) for c in range(0, 96, 16)]
    return sum(int((block == number).sum()) >= 32 for block in blocks)


def test_every_object_covers_four_patches():
    for index in range(500):
        scene = generate_scene(3, "test", index)
        _, mask = render(scene)
        for number in range(1, len(scene.objects) + 1):
            assert covered_patches(mask, number) >= 4, (index, number)
            assert (patch_objects(mask) == number).sum() == covered_patches(mask, number)


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**40), st.sampled_from(["train", "test", "probe"]), st.integers(0, 10**7))
def test_scenes_are_a_pure_function_of_seed_split_and_index(seed, split, index):
    scene = generate_scene(seed, split, index)
    assert scene == generate_scene(seed, split, index)
    image, mask = render(scene)
    again, same_mask = render(scene)
    assert image.tobytes() == again.tobytes()
    assert (mask == same_mask).all()
    assert image.mode == "RGB"
    assert image.size == (96, 96)
    assert mask.dtype == np.uint8
    assert set(np.unique(mask)) == set(range(len(scene.objects) + 1))
    cells = [(item.row, item.col) for item in scene.objects]
    assert cells == sorted(set(cells))
    assert len({item.name for item in scene.objects}) == len(scene.objects)


def test_splits_and_seeds_are_disjoint():
    seen = set()
    for seed in (0, 1, 2**32, 2**32 + 1):
        for split in ("train", "validation", "test", "pretrain", "probe"):
            seen |= {render(generate_scene(seed, split, index))[0].tobytes() for index in range(20)}
    assert len(seen) == 4 * 5 * 20


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("fill", FILLS)
def test_the_mask_is_exact(shape, size, fill):
    item = SceneObject(shape, "blue", size, 1, 2)
    scene = Scene((item,), "plain-grey", fill, 0, "test")
    image, mask = render(scene)
    inside = mask == 1
    # Blue is far from every background: a pixel is the object's exactly where it is dark in red and green.
    pixels = np.asarray(image).astype(int)
    assert ((pixels[..., 0] < 120) == inside).all()
    rows, cols = np.nonzero(inside)
    box = 24 if size == "small" else 32
    assert rows.max() - rows.min() < box
    assert cols.max() - cols.min() < box
    assert rows.min() >= 32
    assert rows.max() < 64
    assert cols.min() >= 64
    assert cols.max() < 96


def test_labels_describe_the_scene():
    scene = Scene(
        (SceneObject("star", "teal", "large", 0, 0), SceneObject("circle", "red", "small", 0, 2)),
        BACKGROUNDS[5],
        FILLS[2],
        0,
        "test",
    )
    found = labels(scene)
    assert (found["background"], found["fill"], found["num_objects"], found["num_large"]) == (5, 2, 2, 1)
    assert [s for s, there in zip(SHAPES, found["shapes"], strict=True) if there] == ["circle", "star"]
    assert [c for c, there in zip(COLORS, found["colors"], strict=True) if there] == ["red", "teal"]
    assert object_labels(scene).tolist() == [[4, 4, 1], [0, 0, 0]]


def test_attributes_are_balanced_and_the_object_count_is_as_asked():
    scenes = [generate_scene(0, "train", index, 3, 6) for index in range(1200)]
    assert {len(scene.objects) for scene in scenes} == {3, 4, 5, 6}
    backgrounds = np.bincount([labels(scene)["background"] for scene in scenes], minlength=12)
    assert len(BACKGROUNDS) == len(backgrounds) == 12
    assert backgrounds.min() > 60
    assert np.bincount([labels(scene)["fill"] for scene in scenes]).min() > 320


def test_colors_are_well_separated():
    colors = np.asarray(list(RGB.values()), dtype=float)
    distance = np.linalg.norm(colors[:, None] - colors[None], axis=-1)
    assert distance[~np.eye(len(colors), dtype=bool)].min() > 80


def test_drawing_is_fast_enough_for_training():
    def rate(first):
        start = time.process_time()
        for index in range(first, first + 100):
            render(generate_scene(0, "train", index))
        return 100 / (time.process_time() - start)

    assert max(rate(first) for first in (0, 100, 200)) > 400
