"""Similarity maps on the page: two variants side by side, the record behind every map, and what is left out."""

from __future__ import annotations

import base64
import io
import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from prebench.errors import StoreError
from prebench.images import pixel_hash
from prebench.records import SimilarityMap
from prebench.store import write_json

from .conftest import StudyMaker
from .test_report import built, scene, small, write_mirror

OBJECTS = [1, 1, 0, 0, 2, 2]
"""Of a grid of two rows and three columns."""
HEADING = "To which patches one patch is alike"


def write_maps(run: Path, cosine: list[float], images: tuple[int, ...] = (3, 5)) -> None:
    maps = [
        SimilarityMap(number, pixel_hash(scene(number)), layer, 4, 2, 3, 0, 1, OBJECTS, cosine, [0.0] * 6)
        for number in images
        for layer in (0, 2, 4)
    ]
    write_json(run / "probe_maps.json", {"hashes": {}, "maps": [vars(found) for found in maps]})


@pytest.fixture
def study(make_study: StudyMaker) -> Path:
    folder = small(make_study, "pre-shuffled", seeds=(0, 1))
    for run in (folder / "runs").iterdir():
        write_maps(run, [1.0, 0.5, 0.25, 0.25, -0.5, 0.0] if run.name.startswith("base") else [1.0] * 6)
    return folder


def figures(html: str) -> list[str]:
    return re.findall(r'<svg class="chart"[^>]*aria-labelledby="map-.*?</svg>', html, re.S)


def test_two_variants_stand_side_by_side_with_the_record_of_every_map(study: Path, tmp_path: Path) -> None:
    mirror = write_mirror(tmp_path / "mirror", {"prebench_visual_probe": [scene(number) for number in range(8)]})
    html, page = built(study, mirror)
    first, second = figures(html)
    assert "baseline, seed 0" in first and "pre, seed 0" in first and "pre-shuffled" not in first + second
    assert first.count("<image") == 2 * (1 + 3) and first.count("data:image/webp") == 2
    told = "runs/baseline-s0/probe_maps.json, image_id 3, query 0, layer 2: mean cosine: "
    assert told + "same object 0.50, other objects -0.25, background 0.25" in first
    assert HEADING in page.text and "runs/pre-s0/probe_maps.json" in page.text
    (own,) = set(re.findall(r"data:image/png;base64,([^\"]+)", first.split("pre, seed 0")[0]))
    pixels = np.asarray(Image.open(io.BytesIO(base64.b64decode(own))))
    assert pixels.shape == (64, 96, 3)
    brightness = pixels[16::32, 16::32].sum(axis=2).reshape(-1).tolist()
    assert brightness[0] > brightness[1] > brightness[2] == brightness[3] > brightness[4] == brightness[5]


def test_pictures_that_one_variant_lacks_are_left_out(study: Path) -> None:
    write_maps(study / "runs" / "pre-s0", [1.0] * 6, images=(5, 7))
    (only,) = figures(built(study)[0])
    assert "image_id 5" in only and "data:image/webp" not in only


def test_without_maps_the_page_is_silent_about_them(make_study: StudyMaker) -> None:
    html, page = built(small(make_study, seeds=(0,)))
    assert not figures(html) and HEADING not in page.text


def test_damaged_maps_are_one_clear_line(study: Path) -> None:
    write_json(study / "runs" / "baseline-s0" / "probe_maps.json", {"maps": [{"layer": 0}]})
    with pytest.raises(StoreError, match=r"baseline-s0/probe_maps\.json: no similarity maps") as caught:
        built(study)
    assert "\n" not in str(caught.value)
