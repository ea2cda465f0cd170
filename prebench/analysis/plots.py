"""Figures as deterministic SVG: equal records give equal bytes, colours are safe for colour-blind readers."""

from __future__ import annotations

import io
from pathlib import Path
from typing import TYPE_CHECKING, Any

import matplotlib
import pandas as pd
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure

from prebench.analysis.join import Study
from prebench.analysis.tables import regularised_layers
from prebench.store import write_bytes

if TYPE_CHECKING:
    from matplotlib.axes import Axes

COLOURS = ("#000000", "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00")
"""Okabe and Ito's palette without yellow, which is too light for lines."""
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
ENCODER_LAYER = -1
_STYLE: dict[str, Any] = {
    "svg.hashsalt": "prebench",
    "svg.fonttype": "none",
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlesize": 9,
    "axes.titlelocation": "left",
}
_LEGEND = "thick: mean over seeds; thin: one seed; ring: the layer that is regularised; dashed: vision encoder"
_PANELS = (
    ("patch", "", "centred_difference", "centred difference of patch similarity"),
    ("patch", "", "auc", "AUC: same object against others"),
)


def layer_curves(study: Study, path: Path) -> Path:
    """Draw the probes over the layers of every variant, and return the path.

    Panels: accuracy of the reference attribute, centred difference, AUC. Thick: mean over seeds; thin: each seed;
    dashed grey: the vision encoder; a ring: the layer that the variant regularises.

    Raises:
        StoreError: the file can't be written, or a probe is damaged.
    """
    frames = [run.probe().assign(variant=run.variant, seed=run.seed) for run in study.runs.values()]
    frames = [frame for frame in frames if not frame.empty]
    panels: list[tuple[str, str, str, str]] = []
    if frames and study.config.suite.probe is not None:
        attribute = study.config.suite.probe.reference_attribute
        panels = [("global", attribute, "accuracy", f"accuracy of a linear probe: {attribute}"), *_PANELS]
    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=(3.9 * max(1, len(panels)), 3.0), layout="constrained")
        FigureCanvasSVG(figure)
        if panels:
            _draw(figure, panels, pd.concat(frames, ignore_index=True), study)
            figure.supxlabel(_LEGEND, fontsize=8, color="#444444")
        else:
            figure.text(0.5, 0.5, "no probe results yet", ha="center", va="center")
        buffer = io.BytesIO()
        # Without a date the file depends on the records alone.
        figure.savefig(buffer, format="svg", metadata={"Date": None, "Title": f"{study.name}: probes by layer"})
    write_bytes(path, buffer.getvalue())
    return path


def _draw(figure: Figure, panels: list[tuple[str, str, str, str]], probes: pd.DataFrame, study: Study) -> None:
    axes = figure.subplots(1, len(panels), squeeze=False)[0]
    for axis, (level, attribute, metric, title) in zip(axes, panels, strict=True):
        chosen = probes[(probes["level"] == level) & (probes["attribute"] == attribute) & (probes["metric"] == metric)]
        _panel(axis, chosen, study)
        axis.set_title(title)
        axis.set_xlabel("decoder layer (0: its input)")


def _panel(axis: Axes, probes: pd.DataFrame, study: Study) -> None:
    layers = probes[probes["layer"] >= 0]
    ends: list[tuple[float, str, str]] = []
    last = int(layers["layer"].max()) if len(layers) else 0
    for i, variant in enumerate(study.variants):
        mine = layers[layers["variant"] == variant]
        if mine.empty:
            continue
        colour = COLOURS[i % len(COLOURS)]
        by_seed = mine.pivot_table(index="layer", columns="seed", values="value")
        mean = by_seed.mean(axis=1)
        if by_seed.shape[1] > 1:
            axis.plot(by_seed.index, by_seed, color=colour, linewidth=0.6, alpha=0.45)
        axis.plot(mean.index, mean, color=colour, linewidth=1.8, marker=MARKERS[i % len(MARKERS)], markersize=3.5)
        for layer in sorted(regularised_layers(study, variant) & set(mean.index)):
            axis.plot([layer], [mean[layer]], "o", markersize=11, markerfacecolor="none", markeredgecolor=colour)
        ends.append((float(mean.iloc[-1]), variant, colour))
    encoder = probes.loc[probes["layer"] == ENCODER_LAYER, "value"]
    if len(encoder):
        value = float(encoder.mean())
        axis.hlines(value, 0, last, color="#777777", linewidth=1, linestyle="--")
        ends.append((value, "encoder", "#555555"))
    axis.set_xticks(range(0, last + 1, max(1, last // 8)))
    _label(axis, ends, last)


def _label(axis: Axes, ends: list[tuple[float, str, str]], last: int) -> None:
    """Name each line at its right end, moved apart so that no two names overlap."""
    low, high = axis.get_ylim()
    # Where all lines are flat the axis would magnify rounding noise.
    if high - low < 0.02:
        low, high = low - 0.01, high + 0.01
    gap = (high - low) * 0.07
    placed: list[float] = []
    for value, name, colour in sorted(ends):
        height = max(value, placed[-1] + gap) if placed else value
        placed.append(height)
        axis.annotate(name, (last, height), xytext=(8, 0), textcoords="offset points", color=colour, va="center")
    axis.set_ylim(low, max([high, *(height + gap / 2 for height in placed)]))
    axis.set_xlim(-0.3, last + 0.3)
