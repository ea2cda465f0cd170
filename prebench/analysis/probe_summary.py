"""One probed model: a table by layer, lines in words, and a figure."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import matplotlib
import pandas as pd
from matplotlib.backends.backend_pdf import FigureCanvasPdf
from matplotlib.figure import Figure

from prebench.analysis import plots
from prebench.store import write_text

if TYPE_CHECKING:
    from matplotlib.axes import Axes

RANDOM = "random_weights_"
SHUFFLED = "shuffled_label_accuracy"
_PATCH = {
    "contrast_ratio": "cohesion / coupling",
    "centred_difference": "patches: centred difference",
    "auc": "patches: AUC, same object",
}
_TOKENS = {"participation_ratio": "participation ratio", "cka_encoder": "linear CKA with the encoder"}


@dataclass(frozen=True)
class _Panel:
    title: str
    level: str
    attribute: str
    metric: str

    @property
    def percent(self) -> bool:
        return self.metric == "accuracy"


def by_layer(rows: pd.DataFrame) -> pd.DataFrame:
    """Return one line per layer, from -1 (the encoder): a column per value, `_low` and `_high` for its interval.

    Args:
        rows: a `ProbeRow` each, and the columns low and high, NaN where there is no interval. Decoded tokens, which
            only the last layer has, are left out.
    """
    shown = rows[~((rows["level"] == "lm_head") & (rows["metric"] == "share"))]
    names = shown["attribute"].where(shown["attribute"] == "", shown["attribute"] + "_") + shown["metric"]
    columns: dict[str, dict[int, float]] = {}
    for name, row in zip(names, shown.itertuples(index=False), strict=True):
        ends = [("_low", row.low), ("_high", row.high)] if pd.notna(row.low) else []
        for suffix, value in [("", row.value), *ends]:
            columns.setdefault(f"{name}{suffix}", {})[int(row.layer)] = float(value)
    table = pd.DataFrame(columns).sort_index().rename_axis("layer").reset_index()
    depth = int(rows["num_layers"].iloc[0])
    table.insert(1, "depth", table["layer"].where(table["layer"] >= 0) / depth)
    return table


def write_csv(rows: pd.DataFrame, path: Path) -> None:
    """Write `by_layer` as CSV.

    Raises:
        StoreError: the folder can't be written.
    """
    write_text(path, by_layer(rows).to_csv(index=False, float_format="%.6g"))


def sentences(rows: pd.DataFrame) -> list[str]:
    """Return a line per attribute and one on patch structure: encoder, input, the worst layer, the last, controls."""
    depth = int(rows["num_layers"].iloc[0])
    lines = []
    for attribute in _attributes(rows):
        own = rows[(rows["level"] == "global") & (rows["attribute"] == attribute)]
        by = own[own["metric"] == "accuracy"].set_index("layer")
        worst = by.loc[1:, "value"].idxmin()
        places = {-1: "encoder", 0: "layer 0", worst: f"lowest, layer {worst}"}
        places.setdefault(depth, f"last, layer {depth}")
        parts = [f"{name} {_with_interval(by.loc[layer])}" for layer, name in places.items()]
        for metric, name in ((RANDOM + "accuracy", "random weights"), (SHUFFLED, "shuffled labels")):
            found = own[(own["metric"] == metric) & (own["layer"] >= 0)].set_index("layer")["value"]
            if len(found):
                layer = worst if worst in found.index else found.index[0]
                parts.append(f"{name} {100 * found[layer]:.1f} (layer {layer})")
        lines.append(f"{attribute}: accuracy, %: {'; '.join(parts)}")
    auc = rows[(rows["level"] == "patch") & (rows["metric"] == "auc")].set_index("layer")["value"]
    if len(auc) > 1:
        worst = auc.loc[1:].idxmin()
        lines.append(
            f"patches of one object are more alike than those of two (AUC): layer 0 {auc.get(0, math.nan):.3f}; "
            f"lowest, layer {worst}, {auc[worst]:.3f}; last, layer {depth}, {auc.get(depth, math.nan):.3f}"
        )
    return lines


def _attributes(rows: pd.DataFrame) -> list[str]:
    return list(dict.fromkeys(rows.loc[rows["level"] == "global", "attribute"]))


def _with_interval(row: pd.Series) -> str:
    return f"{100 * row['value']:.1f} [{100 * row['low']:.1f}, {100 * row['high']:.1f}]"


def write_curves(rows: pd.DataFrame, path: Path, title: str) -> list[Path]:
    """Draw the probes over the layers of one model; return the paths of the SVG and of the PDF beside it.

    Panels: accuracy of each attribute, patch structure, token statistics. Line: the model, with a band for the
    interval over test images; thin line: random weights; dashed: the vision encoder; dotted: shuffled labels.

    Args:
        rows: as in `by_layer`.
        path: of the SVG.
        title: in the file's metadata.

    Raises:
        StoreError: a file can't be written.
    """
    panels = [_Panel(f"{name}: accuracy, %", "global", name, "accuracy") for name in _attributes(rows)]
    panels += [_Panel(text, "patch", "", metric) for metric, text in _PATCH.items()]
    levels = ("statistics", "similarity")
    panels += [_Panel(text, level, "", metric) for level, (metric, text) in zip(levels, _TOKENS.items(), strict=True)]
    panels = [panel for panel in panels if len(_values(rows, panel, panel.metric))]
    with matplotlib.rc_context(plots.STYLE):
        columns = min(plots.PER_ROW, len(panels))
        lines = math.ceil(len(panels) / columns)
        figure = Figure(figsize=(2.6 * columns + 0.2, 2.15 * lines + 0.6), layout="constrained")
        FigureCanvasPdf(figure)
        axes = [figure.add_subplot(lines, columns, i + 1) for i in range(len(panels))]
        handles: dict[str, object] = {}
        for number, (axis, panel) in enumerate(zip(axes, panels, strict=True)):
            _draw(axis, rows, panel)
            handles |= {str(handle.get_label()): handle for handle in axis.get_legend_handles_labels()[0]}
            if number + columns >= len(panels):
                axis.set_xlabel("decoder layer (0: its input)")
        figure.legend(handles=list(handles.values()), loc="outside lower center", ncols=4, frameon=False)
        return plots.save(figure, path, title)


def _values(rows: pd.DataFrame, panel: _Panel, metric: str) -> pd.DataFrame:
    chosen = (rows["level"] == panel.level) & (rows["attribute"] == panel.attribute) & (rows["metric"] == metric)
    return rows[chosen & (rows["layer"] >= 0)].sort_values("layer")


def _draw(axis: Axes, rows: pd.DataFrame, panel: _Panel) -> None:
    scale = 100 if panel.percent else 1
    axis.set_title(panel.title)
    own = _values(rows, panel, panel.metric)
    if own["low"].notna().all():
        axis.fill_between(own["layer"], scale * own["low"], scale * own["high"], color=plots.COLOURS[1], alpha=0.18)
    axis.plot(own["layer"], scale * own["value"], "o-", color=plots.COLOURS[1], markersize=4, label="the model")
    random = _values(rows, panel, RANDOM + panel.metric)
    if len(random):
        axis.plot(random["layer"], scale * random["value"], "s-", color=plots.COLOURS[2], linewidth=0.9, markersize=3,
                  label="random weights")  # fmt: skip
    encoder = rows[(rows["level"] == panel.level) & (rows["attribute"] == panel.attribute)]
    encoder = encoder[(encoder["metric"] == panel.metric) & (encoder["layer"] == plots.ENCODER_LAYER)]["value"]
    if len(encoder):
        height = scale * float(encoder.iloc[0])
        axis.axhline(height, color=plots.GREY, linewidth=1.0, linestyle="--", zorder=0, label="vision encoder")
    shuffled = _values(rows, panel, SHUFFLED)
    if panel.percent and len(shuffled):
        height = scale * float(shuffled["value"].iloc[0])
        axis.axhline(height, color=plots.GREY, linewidth=1.0, linestyle=":", zorder=0, label="shuffled labels")
    axis.grid(axis="y", color="#dddddd", linewidth=0.5)
    axis.set_axisbelow(True)
