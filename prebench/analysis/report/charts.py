"""Charts as inline SVG: they follow the page's colour scheme, and every mark carries its values as a title.

Drawn by hand, because matplotlib's SVG has fixed colours and repeats its fonts and styles in every figure. Colours and
markers are those of `prebench.analysis.plots`; the page's style sheet holds the colours for light and dark.
"""

from __future__ import annotations

import math
import xml.etree.ElementTree as ElementTree
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from markupsafe import Markup

WIDTH, HEIGHT = 340, 226
LEFT, RIGHT, TOP, BOTTOM = 42, 12, 10, 36
ROW = 40
"""Height of a row of a forest plot."""
LABEL = 31
"""Characters of a forest plot's label that fit beside its value."""
FEW_POINTS = 14
"""A line of more points gets a marker at every few of them."""
SHAPES = 7


@dataclass(frozen=True)
class Point:
    """One mark: its place, the range of its seeds, and what the reader is told about it."""

    x: float
    y: float
    low: float
    high: float
    title: str
    ringed: bool = False


@dataclass(frozen=True)
class Series:
    """One variant's points; `index` decides colour and marker."""

    index: int
    name: str
    points: Sequence[Point]
    light: bool = False
    """A control: thinner, lighter, without a band."""


@dataclass(frozen=True)
class Panel:
    """A chart's content. Values are in the unit that the axis shows."""

    id: str
    title: str
    x_label: str
    series: Sequence[Series]
    reference: float | None = None
    """A dashed line: the vision encoder."""
    most: float | None = None
    """Upper end of the scale, whatever the margin: 100 for per cent."""
    least_span: float = 0.0
    """Smallest span of the scale: where all lines are flat it would magnify rounding noise."""
    whole_steps: bool = False
    """x counts layers."""
    band_name: str = "lowest to highest seed"


@dataclass(frozen=True)
class Interval:
    """A row of a forest plot: a difference with its interval, None where there is none."""

    label: str
    text: str
    value: float
    low: float | None
    high: float | None
    title: str
    decided: bool
    """The verdict is a difference; drawn in full."""


class _Axis:
    """Values to coordinates."""

    def __init__(self, low: float, high: float, start: float, end: float) -> None:
        self.low, self.high, self._start, self._end = low, high, start, end

    def __call__(self, value: float) -> float:
        return self._start + (value - self.low) / (self.high - self.low) * (self._end - self._start)


def ticks(low: float, high: float, most: int = 5) -> list[float]:
    """Return round numbers between two limits: steps of 1, 2 or 5 times a power of ten."""
    step = 10.0 ** math.floor(math.log10((high - low) / most))
    step *= next(factor for factor in (1, 2, 5, 10) if (high - low) / (step * factor) <= most)
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [number * step for number in range(first, last + 1)]


def number(value: float, step: float = 0.0) -> str:
    """Return a number with as many decimals as a scale of that step needs, and a real minus."""
    digits = max(0, -math.floor(math.log10(step) + 1e-9)) if step else 3
    text = f"{value:.{digits}f}"
    return (text.lstrip("-") if float(text) == 0 else text).replace("-", "−")


def lines(panel: Panel) -> Markup:
    """Draw mean and band of every series over x, with a ring where a layer is regularised."""
    root = _root(panel.id, panel.title, _in_words(panel))
    x, y = _scales(panel)
    _grid(root, x, y, panel)
    if panel.reference is not None:
        level = _at(y(panel.reference))
        line = _add(root, "line", x1=LEFT, x2=WIDTH - RIGHT, y1=level, y2=level, class_="encoder")
        _add(line, "title", f"vision encoder: {number(panel.reference)}")
    # Controls first, so that they lie below what they control.
    for series in sorted(panel.series, key=lambda found: not found.light):
        if series.points:
            _draw_series(root, series, x, y)
    return _markup(root)


def scatter(panel: Panel, y_label: str) -> Markup:
    """Draw single points, and lines at zero where zero lies inside."""
    words = [f"{series.name}: {len(series.points)} trained models" for series in panel.series if series.points]
    root = _root(panel.id, panel.title, f"{panel.x_label} against {y_label}. {'; '.join(words)}.")
    x, y = _scales(panel)
    _grid(root, x, y, panel)
    for axis, across in ((x, True), (y, False)):
        if axis.low < 0 < axis.high:
            place = _at(axis(0))
            ends = (place, place, TOP, HEIGHT - BOTTOM) if across else (LEFT, WIDTH - RIGHT, place, place)
            _add(root, "line", x1=ends[0], x2=ends[1], y1=ends[2], y2=ends[3], class_="zero")
    for series in panel.series:
        group = _group(root, series)
        for point in series.points:
            _marker(group, series.index, x(point.x), y(point.y), 4.2, point.title)
    return _markup(root)


def forest(name: str, title: str, rows: Sequence[Interval], scale: Sequence[float]) -> Markup:
    """Draw differences with their intervals below each other around zero.

    Args:
        name: unique on the page.
        title: what is compared.
        rows: from top to bottom.
        scale: values that the scale holds, so that charts side by side have the same one.
    """
    height = ROW * len(rows) + 30
    words = "; ".join(f"{row.label}: {row.text}" for row in rows)
    root = _root(name, title, f"{words}.", height)
    low, high = _padded([0.0, *scale], 1.0)
    x = _Axis(low, high, 12, WIDTH - RIGHT)
    marks = ticks(low, high)
    for mark in marks:
        place = _at(x(mark))
        _add(root, "line", x1=place, x2=place, y1=6, y2=height - 22, class_="grid" if mark else "zero")
        text = number(mark, marks[1] - marks[0] if len(marks) > 1 else 1)
        _add(root, "text", text, x=place, y=height - 8, class_="tick", text_anchor="middle")
    for i, row in enumerate(rows):
        top = ROW * i + 6
        label = row.label if len(row.label) <= LABEL else f"{row.label[: LABEL - 1]}…"
        _add(root, "text", label, x=12, y=top + 12, class_="row")
        _add(root, "text", row.text, x=WIDTH - RIGHT, y=top + 12, class_="row", text_anchor="end")
        group = _add(root, "g", class_="decided" if row.decided else "undecided")
        _add(group, "title", row.title)
        level = top + 24
        if row.low is not None and row.high is not None:
            _add(group, "line", x1=_at(x(row.low)), x2=_at(x(row.high)), y1=level, y2=level, class_="whisker")
        _add(group, "circle", cx=_at(x(row.value)), cy=level, r=4, class_="estimate")
    return _markup(root)


def swatch(index: int, light: bool = False) -> Markup:
    """Draw a legend's sample of a series."""
    root = ElementTree.Element("svg", {"viewBox": "0 0 28 14", "class": "swatch", "aria-hidden": "true"})
    group = _group(root, Series(index, "", (), light))
    _add(group, "path", d="M1 7H27", class_="line")
    _marker(group, index, 14, 7, 3.6, "")
    return _markup(root)


# --- parts ---------------------------------------------------------------------------------------------------


def _root(name: str, title: str, words: str, height: int = HEIGHT) -> ElementTree.Element:
    attributes = {"viewBox": f"0 0 {WIDTH} {height}", "role": "img", "class": "chart"}
    attributes["aria-labelledby"] = f"{name}-t {name}-d"
    root = ElementTree.Element("svg", attributes)
    _add(root, "title", title, id=f"{name}-t")
    _add(root, "desc", words, id=f"{name}-d")
    return root


def _add(parent: ElementTree.Element, tag: str, text: str = "", **attributes: object) -> ElementTree.Element:
    named = {name.rstrip("_").replace("_", "-"): str(value) for name, value in attributes.items()}
    child = ElementTree.SubElement(parent, tag, named)
    child.text = text or None
    return child


def _markup(root: ElementTree.Element) -> Markup:
    # ElementTree has escaped every text and attribute.
    return Markup(ElementTree.tostring(root, encoding="unicode", short_empty_elements=False))  # noqa: S704


def _at(value: float) -> str:
    return f"{value:.1f}".removesuffix(".0")


def _group(root: ElementTree.Element, series: Series) -> ElementTree.Element:
    look = "series light" if series.light else "series"
    return _add(root, "g", class_=f"{look} s{series.index % SHAPES} d{series.index // SHAPES % 3}", data_v=series.index)


def _scales(panel: Panel) -> tuple[_Axis, _Axis]:
    points = [point for series in panel.series for point in series.points]
    across = sorted({point.x for point in points}) or [0.0, 1.0]
    up = [point.y for point in points]
    up += [end for series in panel.series if not series.light for p in series.points for end in (p.low, p.high)]
    up += [] if panel.reference is None else [panel.reference]
    low, high = _padded(up or [0.0, 1.0], panel.least_span)
    if panel.most is not None:
        high = min(high, panel.most + 0.015 * (panel.most - low))
    if panel.whole_steps:
        left, right = across[0] - 0.3, across[-1] + 0.3
    else:
        left, right = _padded(across, 0.0)
    return _Axis(left, right, LEFT, WIDTH - RIGHT), _Axis(low, high, HEIGHT - BOTTOM, TOP)


def _padded(values: Iterable[float], least: float) -> tuple[float, float]:
    known = list(values)
    low, high = min(known), max(known)
    spare = max(0.0, (least - (high - low)) / 2)
    low, high = low - spare, high + spare
    margin = 0.06 * (high - low) or abs(high) * 0.1 or 1.0
    return low - margin, high + margin


def _grid(root: ElementTree.Element, x: _Axis, y: _Axis, panel: Panel) -> None:
    marks = ticks(y.low, y.high)
    step = marks[1] - marks[0] if len(marks) > 1 else 1.0
    for mark in marks:
        level = _at(y(mark))
        _add(root, "line", x1=LEFT, x2=WIDTH - RIGHT, y1=level, y2=level, class_="grid")
        _add(root, "text", number(mark, step), x=LEFT - 6, y=_at(y(mark) + 4), class_="tick", text_anchor="end")
    if panel.whole_steps:
        last = math.floor(x.high)
        places = [float(value) for value in range(math.ceil(x.low), last + 1, max(1, math.ceil(last / 8)))]
    else:
        places = ticks(x.low, x.high)
    step = places[1] - places[0] if len(places) > 1 else 1.0
    for place in places:
        shown = number(place, step)
        _add(root, "text", shown, x=_at(x(place)), y=HEIGHT - BOTTOM + 15, class_="tick", text_anchor="middle")
    middle = _at((LEFT + WIDTH - RIGHT) / 2)
    _add(root, "text", panel.x_label, x=middle, y=HEIGHT - 5, class_="axis", text_anchor="middle")


def _draw_series(root: ElementTree.Element, series: Series, x: _Axis, y: _Axis) -> None:
    group = _group(root, series)
    points = sorted(series.points, key=lambda point: point.x)
    if not series.light and any(point.low < point.high for point in points):
        upper = [f"{_at(x(point.x))} {_at(y(point.high))}" for point in points]
        lower = [f"{_at(x(point.x))} {_at(y(point.low))}" for point in reversed(points)]
        _add(group, "path", d=f"M{'L'.join([*upper, *lower])}Z", class_="band")
    path = "L".join(f"{_at(x(point.x))} {_at(y(point.y))}" for point in points)
    _add(group, "path", d=f"M{path}", class_="line")
    every = 1 if len(points) <= FEW_POINTS else math.ceil(len(points) / 8)
    for i, point in enumerate(points):
        if point.ringed:
            _add(group, "circle", cx=_at(x(point.x)), cy=_at(y(point.y)), r=7.5, class_="ring")
        size = (2.6 if series.light else 3.4) if i % every == 0 else 0.0
        _marker(group, series.index, x(point.x), y(point.y), size, point.title)


def _marker(parent: ElementTree.Element, index: int, x: float, y: float, size: float, title: str) -> None:
    """Draw a marker with a title; of size 0, only the place where the pointer finds the title."""
    group = _add(parent, "g", class_="mark")
    if title:
        _add(group, "title", title)
        _add(group, "circle", cx=_at(x), cy=_at(y), r=8, class_="target")
    if size:
        _add(group, "path", d=_shape(index % SHAPES, x, y, size))


def _shape(kind: int, x: float, y: float, r: float) -> str:
    """Return matplotlib's markers o, s, ^, D, v, P, X as paths."""
    if kind == 0:
        size = f"{_at(r)} {_at(r)} 0 1 0"
        return f"M{_at(x - r)} {_at(y)}a{size} {_at(2 * r)} 0a{size} {_at(-2 * r)} 0Z"
    q = r / 2.6
    outlines: dict[int, list[tuple[float, float]]] = {
        1: [(-r, -r), (r, -r), (r, r), (-r, r)],
        2: [(0, -1.2 * r), (1.2 * r, r), (-1.2 * r, r)],
        3: [(0, -1.3 * r), (1.3 * r, 0), (0, 1.3 * r), (-1.3 * r, 0)],
        4: [(0, 1.2 * r), (1.2 * r, -r), (-1.2 * r, -r)],
        5: [(-q, -r), (q, -r), (q, -q), (r, -q), (r, q), (q, q), (q, r), (-q, r), (-q, q), (-r, q), (-r, -q), (-q, -q)],
    }
    outlines[6] = [((a - b) * 0.78, (a + b) * 0.78) for a, b in outlines[5]]
    corners = outlines[kind]
    return "M" + "L".join(f"{_at(x + a)} {_at(y + b)}" for a, b in corners) + "Z"


def _in_words(panel: Panel) -> str:
    """Return what a reader who can't see the chart needs: per series first, lowest, highest and last value."""
    parts = []
    if panel.reference is not None:
        parts.append(f"vision encoder {number(panel.reference)}")
    for series in panel.series:
        points = sorted(series.points, key=lambda point: point.x)
        if not points:
            continue
        low, high = min(points, key=lambda p: p.y), max(points, key=lambda p: p.y)
        ends = f"{number(points[0].y)} at {points[0].x:g}, {number(points[-1].y)} at {points[-1].x:g}"
        parts.append(
            f"{series.name}: {ends}; lowest {number(low.y)} at {low.x:g}, highest {number(high.y)} at {high.x:g}"
        )
    return f"Mean over seeds by {panel.x_label}. {'. '.join(parts)}. Band: {panel.band_name}."
