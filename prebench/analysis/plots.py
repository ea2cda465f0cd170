"""Figures as deterministic SVG and PDF: equal records give equal bytes; colours and markers safe for all readers."""

from __future__ import annotations

import io
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import matplotlib
import pandas as pd
from matplotlib.backends.backend_pdf import FigureCanvasPdf
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch

from prebench.analysis import degradation, dynamics, learning_curves, verdict
from prebench.analysis.join import Study
from prebench.analysis.tables import regularised_layers
from prebench.records import ENCODER as ENCODER_LAYER
from prebench.store import write_bytes

if TYPE_CHECKING:
    from matplotlib.axes import Axes

COLOURS = ("#000000", "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00")
"""Okabe and Ito's palette without yellow, which is too light for lines."""
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
PER_ROW = 3
"""Panels side by side: more could not be read in a README or on a phone."""
GREY = "#555555"
STYLE: dict[str, Any] = {
    "svg.hashsalt": "prebench",
    "svg.fonttype": "none",
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlesize": 9,
    "axes.titlelocation": "left",
}
_PATCH = {"centred_difference": "patches: centred difference", "auc": "patches: AUC, same object"}


@dataclass(frozen=True)
class _Line:
    """How a variant is drawn; a control is thinner and lighter, so that more than three lines stay readable."""

    colour: str
    marker: str
    width: float
    alpha: float
    band: float
    """Opacity of the band over seeds."""


@dataclass(frozen=True)
class _Panel:
    title: str
    values: pd.DataFrame
    """Columns variant, seed, x, y."""
    percent: bool = False
    reference: float | None = None
    """A dashed line: the vision encoder."""


def write_figures(study: Study) -> list[Path]:
    """Write every figure of a study, each as SVG and as PDF, and return the paths.

    Raises:
        StoreError: a file can't be written, or a record is damaged.
    """
    folder = study.folder / "figures"
    paths = layer_curves(study, folder / "layer_curves.svg")
    curves = learning_curves.curves(study)
    if not curves.empty:
        paths += training_curves(study, curves, folder / "learning_curves.svg")
    moved = dynamics.points(study)
    if not moved.empty:
        paths += dynamics_curves(study, moved, folder / "dynamics.svg")
    from prebench.analysis import model_plots  # it draws with this module's colours and styles

    paths += model_plots.scatter(study, folder / "correlation.svg")
    paths += model_plots.dose_curves(study, folder / "dose_response.svg")
    return paths


def layer_curves(study: Study, path: Path) -> list[Path]:
    """Draw the probes over the layers of every variant; return the paths of the SVG and of the PDF beside it.

    Panels: probe accuracy of each attribute of the suite, the reference attribute first; centred difference and AUC of
    patch similarity. Line: mean over seeds; band: lowest to highest seed; dashed: the vision encoder; ring: the layer
    that the variant regularises.

    Raises:
        StoreError: a file can't be written, or a probe is damaged.
    """
    frames = [run.probe().assign(variant=run.variant, seed=run.seed) for run in study.runs.values()]
    frames = [frame for frame in frames if not frame.empty]
    panels: list[_Panel] = []
    if frames:
        probes = pd.concat(frames, ignore_index=True)
        panels = [_probe_panel(probes, name, "accuracy") for name in degradation.attributes(study)]
        panels += [_probe_panel(probes, "", metric) for metric in _PATCH] if panels else []
    rings = {variant: regularised_layers(study, variant) for variant in study.variants}
    with matplotlib.rc_context(STYLE):
        figure = _figure(panels, study.variants, study, "decoder layer (0: its input)", rings)
        if not panels:
            figure.text(0.5, 0.5, "no probe results yet", ha="center", va="center")
        return save(figure, path, f"{study.name}: probes by layer")


def training_curves(study: Study, curves: pd.DataFrame, path: Path) -> list[Path]:
    """Draw validation during the instruct stage; return the paths of the SVG and of the PDF beside it.

    Panels: lm_loss, then accuracy of each question type, against the step; baseline and variants, without controls
    where there are other variants. Line: mean over seeds; band: lowest to highest seed.

    Args:
        study: the study.
        curves: its `learning_curves.curves`.
        path: of the SVG.

    Raises:
        StoreError: a file can't be written.
    """
    controls = {name for name in study.variants if verdict.is_control(study, name)}
    plain = [name for name in study.variants if name not in controls]
    shown = plain if len(plain) > 1 else study.variants
    mine = curves[curves["variant"].isin(shown) & (curves["stage"] == learning_curves.INSTRUCT)]
    kinds = [(name, f"{name.replace('_', ' ')}: accuracy, %") for name in learning_curves.question_types(curves)]
    columns = {"step": "x"}
    panels = [
        _Panel(title, mine.rename(columns=columns | {name: "y"})[["variant", "seed", "x", "y"]], name != "lm_loss")
        for name, title in [("lm_loss", "lm_loss, nats per token"), *kinds]
    ]
    with matplotlib.rc_context(STYLE):
        figure = _figure(panels, shown, study, "instruct step", {})
        return save(figure, path, f"{study.name}: validation during training")


def dynamics_curves(study: Study, moved: pd.DataFrame, path: Path) -> list[Path]:
    """Draw probes over the middle layers and benchmarks against the step; return the paths of the SVG and of the PDF.

    Line: mean over seeds; band: lowest to highest seed; dashed: the vision encoder.

    Args:
        study: the study.
        moved: its `dynamics.points`.
        path: of the SVG.

    Raises:
        StoreError: a file can't be written.
    """
    panels = []
    for (kind, outcome), title in dynamics.titles(study).items():
        mine = moved[(moved["kind"] == kind) & (moved["outcome"] == outcome)]
        shown = dynamics.summarised(mine).rename(columns={"step": "x", "value": "y"})
        encoder = mine.loc[mine["layer"] == "encoder", "value"]
        if len(shown):
            reference = float(encoder.mean()) if len(encoder) else None
            panels.append(_Panel(f"{title}, %", shown[["variant", "seed", "x", "y"]], True, reference))
    with matplotlib.rc_context(STYLE):
        figure = _figure(panels, study.variants, study, "instruct step", {})
        return save(figure, path, f"{study.name}: probes and benchmarks during training")


def _probe_panel(probes: pd.DataFrame, attribute: str, metric: str) -> _Panel:
    level = "global" if attribute else "patch"
    chosen = probes[(probes["level"] == level) & (probes["attribute"] == attribute) & (probes["metric"] == metric)]
    layers = chosen[chosen["layer"] >= 0].rename(columns={"layer": "x", "value": "y"})
    encoder = chosen.loc[chosen["layer"] == ENCODER_LAYER, "value"]
    kind = next(iter(chosen["kind"]), "")
    title = f"{attribute.replace('_', ' ')} ({kind}): accuracy, %" if attribute else _PATCH[metric]
    reference = float(encoder.mean()) if len(encoder) else None
    return _Panel(title, layers[["variant", "seed", "x", "y"]], bool(attribute), reference)


def variant_lines(study: Study) -> dict[str, _Line]:
    """Return how each variant is drawn in all figures of the study."""
    several = len(study.variants) > PER_ROW
    lines = {}
    for i, variant in enumerate(study.variants):
        light = several and verdict.is_control(study, variant)
        look = (0.9, 0.65, 0.0) if light else (1.8, 1.0, 0.18)
        marker = MARKERS[(i + i // len(COLOURS)) % len(MARKERS)]  # colours come again with another marker
        lines[variant] = _Line(COLOURS[i % len(COLOURS)], marker, *look)
    return lines


def _figure(
    panels: Sequence[_Panel], variants: Sequence[str], study: Study, x_label: str, rings: dict[str, set[int]]
) -> Figure:
    columns = min(PER_ROW, max(1, len(panels)))
    rows = max(1, math.ceil(len(panels) / columns))
    figure = Figure(figsize=(2.6 * columns + 0.2, 2.15 * rows + 0.75), layout="constrained")
    FigureCanvasPdf(figure)
    lines = {name: line for name, line in variant_lines(study).items() if name in variants}
    for i, panel in enumerate(panels):
        axis = figure.add_subplot(rows, columns, i + 1)
        _draw(axis, panel, lines, rings)
        axis.set_title(panel.title)
        if i + columns >= len(panels):
            axis.set_xlabel(x_label)
    if panels:
        handles = _legend(lines, any(rings.values()), any(panel.reference is not None for panel in panels))
        figure.legend(handles=handles, loc="outside lower center", ncols=2 if columns == 1 else 4, frameon=False)
    return figure


def _legend(lines: dict[str, _Line], ringed: bool, encoder: bool) -> list[Any]:
    handles: list[Any] = [
        Line2D([], [], color=line.colour, marker=line.marker, linewidth=line.width, alpha=line.alpha, ms=4, label=name)
        for name, line in lines.items()
    ]
    if encoder:
        handles.append(Line2D([], [], color=GREY, linewidth=1, linestyle="--", label="vision encoder"))
    if ringed:
        ring = Line2D([], [], linestyle="none", marker="o", ms=9, label="regularised layer")
        ring.set(markerfacecolor="none", markeredgecolor=GREY)
        handles.append(ring)
    handles.append(Patch(color=GREY, alpha=0.25, linewidth=0, label="line: mean, band: min to max over seeds"))
    return handles


def _draw(axis: Axes, panel: _Panel, lines: dict[str, _Line], rings: dict[str, set[int]]) -> None:
    scale = 100 if panel.percent else 1
    # Controls first, so that they lie below what they control.
    for variant, line in sorted(lines.items(), key=lambda item: item[1].width):
        by_seed = panel.values[panel.values["variant"] == variant].pivot_table(index="x", columns="seed", values="y")
        if by_seed.empty:
            continue
        mean, low, high = (scale * getattr(by_seed, name)(axis=1) for name in ("mean", "min", "max"))
        if line.band and by_seed.shape[1] > 1:
            axis.fill_between(mean.index, low, high, color=line.colour, alpha=line.band, linewidth=0)
        style: dict[str, Any] = {"color": line.colour, "alpha": line.alpha, "linewidth": line.width}
        every = max(1, len(mean) // 8)
        axis.plot(mean.index, mean, **style, marker=line.marker, markersize=3 + 0.5 * line.width, markevery=every)
        for layer in sorted(rings.get(variant, set()) & set(mean.index)):
            ring: dict[str, Any] = {"markerfacecolor": "none", "markeredgecolor": line.colour, "alpha": line.alpha}
            axis.plot([layer], [mean[layer]], "o", markersize=9 + 1.5 * line.width, **ring)
    if panel.reference is not None:
        axis.axhline(scale * panel.reference, color=GREY, linewidth=1, linestyle="--", zorder=0)
    _scale(axis, panel, scale)


def _scale(axis: Axes, panel: _Panel, scale: float) -> None:
    low, high = axis.get_ylim()
    # Where all lines are flat the axis would magnify rounding noise.
    if high - low < 0.02 * scale:
        low, high = low - 0.01 * scale, high + 0.01 * scale
    axis.set_ylim(low, min(high, 101.5) if panel.percent else high)
    if len(panel.values) and panel.values["x"].max() <= 64 and panel.reference is not None:
        last = int(panel.values["x"].max())
        axis.set_xticks(range(0, last + 1, max(1, math.ceil(last / 8))))
    axis.grid(axis="y", color="#dddddd", linewidth=0.5)
    axis.set_axisbelow(True)


def save(figure: Figure, path: Path, title: str) -> list[Path]:
    """Write a figure as SVG and PDF; without dates the files depend on the records alone."""
    # One drawing settles the layout; a second format would start from its result and differ from run to run.
    figure.draw_without_rendering()
    figure.set_layout_engine("none")
    paths = []
    for form, undated in (("svg", "Date"), ("pdf", "CreationDate")):
        buffer = io.BytesIO()
        figure.savefig(buffer, format=form, metadata={undated: None, "Title": title})
        paths.append(path.with_suffix(f".{form}"))
        write_bytes(paths[-1], buffer.getvalue())
    return paths
