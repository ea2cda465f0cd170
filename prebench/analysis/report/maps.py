"""Similarity maps of two variants side by side: to which patches of a picture is one of them alike, layer by layer."""

from __future__ import annotations

import base64
import dataclasses
import io
import xml.etree.ElementTree as ElementTree
from collections.abc import Sequence
from pathlib import Path

import matplotlib
import numpy as np
from markupsafe import Markup
from PIL import Image

from prebench.analysis import verdict
from prebench.analysis.join import Run, Study
from prebench.analysis.report.parts import Figure, Group, Section, source
from prebench.analysis.report.pictures import Album
from prebench.errors import StoreError
from prebench.records import MAPS_FILE, SimilarityMap, from_dict
from prebench.store import read_json

CELL = 78
GAP = 6
HEAD = 18
"""Height of the line above the columns, and above each row."""
COLOURS = "viridis"
"""Readable without colour vision, and the same in print: dark is 0 or less, light is 1."""
PIXELS = 96
"""Longest side of a map's picture, at least: a small grid is enlarged."""
_HEADING = "To which patches one patch is alike, layer by layer"
_NOTE = (
    "Cosine of every visual token with that of the outlined patch; dark: 0 or less, light: 1. Where structure is lost, "
    "the likeness leaves the object. Same pictures and patches for both; the seed is the lowest that both have. A few "
    "pictures show what the layer curves mean; they prove nothing."
)


def with_maps(section: Section, study: Study, mirror: Path) -> Section:
    """Return the section with the similarity maps behind its figures; as it is, where no run has some.

    Args:
        section: the page's on layers.
        study: the study.
        mirror: the data that were probed, for the pictures.

    Raises:
        StoreError: a run's maps are damaged.
    """
    pair = _pair(study)
    maps = [(run, _read(run)) for run in pair]
    keys = [(found.image_hash, found.query) for found in maps[0][1]] if maps else []
    shared = [key for key in dict.fromkeys(keys) if all(_chosen(found, key) for _, found in maps)]
    if not shared:
        return section
    album = Album(mirror)
    probe = study.config.suite.probe
    if probe is not None:
        album.add(probe.task, {found.image_hash: [found.image_id] for _, own in maps for found in own})
    figures = []
    for number, key in enumerate(shared):
        rows = [(run.variant, run.seed, _chosen(found, key)) for run, found in maps]
        title = f"picture {rows[0][2][0].image_id}, patch {key[1]}"
        figures.append(Figure(title, _draw(f"map-{number}", title, rows, album.pictures.get(key[0]))))
    files = tuple(source(study, f"runs/{run.folder.name}/{MAPS_FILE}") for run in pair)
    group = Group(_HEADING, figures, _NOTE, folded=True)
    return dataclasses.replace(section, groups=(*section.groups, group), sources=(*section.sources, *files))


def _pair(study: Study) -> list[Run]:
    """Return the baseline's run and the first other variant's, of one seed; one alone where the other has no maps."""
    plain = [name for name in study.variants if name == study.baseline or not verdict.is_control(study, name)]
    ordered = sorted(plain, key=lambda name: name != study.baseline)
    runs = {
        name: {run.seed: run for run in study.of_variant(name) if (run.folder / MAPS_FILE).is_file()}
        for name in ordered
    }
    known = [name for name in ordered if runs[name]][:2]
    if not known:
        return []
    common = set.intersection(*(set(runs[name]) for name in known))
    return [runs[name][min(common)] for name in known] if common else [runs[known[0]][min(runs[known[0]])]]


def _read(run: Run) -> list[SimilarityMap]:
    path = run.folder / MAPS_FILE
    try:
        return [from_dict(SimilarityMap, values) for values in read_json(path)["maps"]]
    except (KeyError, TypeError) as error:
        raise StoreError(f"{path}: no similarity maps ({error}); delete it and probe.parquet to probe again") from error


def _chosen(maps: Sequence[SimilarityMap], key: tuple[str, int]) -> list[SimilarityMap]:
    return sorted((m for m in maps if (m.image_hash, m.query) == key), key=lambda m: m.layer)


def _draw(id_: str, title: str, rows: Sequence[tuple[str, int, list[SimilarityMap]]], picture: str | None) -> Markup:
    columns = max(len(maps) for _, _, maps in rows)
    width = (columns + 1) * (CELL + GAP)
    height = len(rows) * (CELL + HEAD) + HEAD
    root = ElementTree.Element("svg", {"class": "chart", "viewBox": f"0 0 {width} {height}", "role": "img"})
    root.set("aria-labelledby", id_)
    ElementTree.SubElement(root, "title", {"id": id_}).text = f"Similarity maps, {title}"
    for column, text in enumerate(["", *(f"layer {found.layer}" for found in rows[0][2])]):
        _text(root, column * (CELL + GAP), HEAD - 6, text)
    for row, (variant, seed, maps) in enumerate(rows):
        top = HEAD + row * (CELL + HEAD)
        _text(root, 0, top + CELL + 12, f"{variant}, seed {seed}")
        if picture is not None:
            _cell(root, 0, top, maps[0], picture, "the picture")
        for column, found in enumerate(maps, start=1):
            _cell(root, column * (CELL + GAP), top, found, _image(found), _told(variant, seed, found))
    # ElementTree has escaped every text and attribute.
    return Markup(ElementTree.tostring(root, encoding="unicode", short_empty_elements=False))  # noqa: S704


def _text(root: ElementTree.Element, x: float, y: float, text: str) -> None:
    ElementTree.SubElement(root, "text", {"class": "tick", "x": str(x), "y": str(y)}).text = text


def _cell(root: ElementTree.Element, x: float, y: float, found: SimilarityMap, uri: str, told: str) -> None:
    place = {"x": str(x), "y": str(y), "width": str(CELL), "height": str(CELL)}
    group = ElementTree.SubElement(root, "g")
    ElementTree.SubElement(group, "title").text = told
    ElementTree.SubElement(group, "image", {"href": uri, "preserveAspectRatio": "none", **place})
    row, col = divmod(found.query, found.cols)
    wide, high = CELL / found.cols, CELL / found.rows
    outline = {"x": f"{x + col * wide:.2f}", "y": f"{y + row * high:.2f}", "width": f"{wide:.2f}", "fill": "none"}
    for colour, thick in (("#000000", "3"), ("#ffffff", "1.4")):  # seen on every colour
        line = {"height": f"{high:.2f}", "stroke": colour, "stroke-width": thick}
        ElementTree.SubElement(group, "rect", outline | line)


def _image(found: SimilarityMap) -> str:
    """Return the map as a PNG's data URI: SVG squares would take a hundred bytes a patch."""
    values = np.clip(np.reshape(found.cosine, (found.rows, found.cols)), 0, 1)
    pixels = (255 * matplotlib.colormaps[COLOURS](values)[..., :3]).round().astype(np.uint8)
    factor = -(-PIXELS // max(found.rows, found.cols))
    picture = Image.fromarray(pixels).resize((found.cols * factor, found.rows * factor), Image.Resampling.NEAREST)
    buffer = io.BytesIO()
    picture.save(buffer, format="PNG", optimize=True)
    return f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}"


def _told(variant: str, seed: int, found: SimilarityMap) -> str:
    """Return where the map stands, and its means over the query's object, other objects and background."""
    cosine, objects = np.asarray(found.cosine), np.asarray(found.objects)
    others = np.arange(len(objects)) != found.query
    parts = {
        "same object": others & (objects == found.object_id) & (objects != 0),
        "other objects": (objects != found.object_id) & (objects != 0),
        "background": others & (objects == 0),
    }
    means = [f"{name} {cosine[where].mean():.2f}" for name, where in parts.items() if where.any()]
    where = f"runs/{variant}-s{seed}/{MAPS_FILE}, image_id {found.image_id}, query {found.query}, layer {found.layer}"
    return f"{where}: mean cosine: {', '.join(means)}"
