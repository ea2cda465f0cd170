"""Figures whose marks are trained models: gain over reduction of degradation, and outcomes over the dose."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import matplotlib
import pandas as pd
from matplotlib.backends.backend_pdf import FigureCanvasPdf
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from prebench.analysis import degradation, dose
from prebench.analysis.join import Study
from prebench.analysis.plots import GREY, PER_ROW, STYLE, save, variant_lines
from prebench.analysis.render import marked, p_value
from prebench.analysis.statistics import Correlation
from prebench.analysis.tables import as_correlated, correlation_of, trained_models

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def scatter(study: Study, path: Path) -> list[Path]:
    """Draw every trained model's gain over its reduction of degradation, a panel per task, as it is correlated.

    Returns:
        The paths of the SVG and of the PDF beside it; none where no model has both.
    """
    known = [(task, trained_models(study, task.task)) for task in study.tasks]
    panels = [(task, points) for task, points in known if not points.empty]
    if not panels:
        return []
    with matplotlib.rc_context(STYLE):
        figure = _figure(len(panels))
        lines = {name: line for name, line in variant_lines(study).items() if name != study.baseline}
        for i, (task, points) in enumerate(panels):
            axis = figure.add_subplot(*_place(len(panels), i))
            placed, centred = as_correlated(points)
            for variant, mine in placed.groupby("variant", sort=False):
                line = lines[str(variant)]
                style: dict[str, Any] = {"color": line.colour, "marker": line.marker, "alpha": line.alpha, "s": 22}
                axis.scatter(100 * mine["reduction"], 100 * mine["gain"], linewidths=0, **style)
            axis.axhline(0, color=GREY, linewidth=0.6, zorder=0)
            axis.axvline(0, color=GREY, linewidth=0.6, zorder=0)
            axis.set_title(f"{marked(task.label, task.data_source)}\n{_said(correlation_of(points, task.task))}")
            axis.set_xlabel("reduction, points" + (", minus the seed's mean" if centred else ""))
            axis.set_ylabel("gain, points")
        marks = [
            Line2D([], [], color=line.colour, marker=line.marker, alpha=line.alpha, linestyle="none", ms=5, label=name)
            for name, line in lines.items()
        ]
        figure.legend(handles=marks, loc="outside lower center", ncols=min(PER_ROW, len(panels)), frameon=False)
        return save(figure, path, f"{study.name}: gain over reduction of degradation, one mark per trained model")


def _said(found: Correlation) -> str:
    if found.pearson is None or found.interval is None:
        return f"n = {found.n}: {found.note}; no claim"
    bounds = f"[{found.interval.low:+.2f}, {found.interval.high:+.2f}]"
    return f"n = {found.n} models\nr = {found.pearson:+.2f} {bounds}, p {p_value(found.p)}".replace("-", "−")


def dose_curves(study: Study, path: Path) -> list[Path]:
    """Draw reduction and gains over the weight and over the layer; marks: trained models, bars: 95% t intervals.

    Returns:
        The paths of the SVG and of the PDF beside it; none where variants differ in no dose alone.
    """
    panels = [
        (family, str(outcome), found)
        for field in dose.FIELDS
        for family in dose.families(study, field)
        for outcome, found in dose.points(study, family).groupby("outcome", sort=False)
    ]
    if not panels:
        return []
    trends, _, _ = dose.trends(study)
    verdicts = {(row.field, row.outcome): f"{row.verdict} (n = {row.n_models})" for row in trends.itertuples()}
    with matplotlib.rc_context(STYLE):
        figure = _figure(len(panels))
        for i, (family, outcome, found) in enumerate(panels):
            axis = figure.add_subplot(*_place(len(panels), i))
            _draw_dose(axis, found)
            axis.axhline(0, color=GREY, linewidth=0.6, linestyle="--", zorder=0)
            axis.set_title(f"{outcome}, points\n{verdicts.get((family.field, outcome), '')}")
            axis.set_xlabel(
                f"{family.field} (baseline: 0)" if family.field == "weight" else "regularised decoder layer"
            )
        return save(figure, path, f"{study.name}: dose-response over weight and layer")


def _draw_dose(axis: Axes, found: pd.DataFrame) -> None:
    axis.plot(found["dose"], 100 * found["value"], "o", color=GREY, alpha=0.45, ms=3, linewidth=0)
    doses, means, halves = [], [], []
    for value, mine in found.groupby("dose", sort=True):
        estimate = degradation.estimate(mine["value"])
        assert estimate is not None
        doses.append(float(str(value)))
        means.append(100 * estimate.mean)
        halves.append(0.0 if estimate.interval is None else 50 * (estimate.interval.high - estimate.interval.low))
    axis.errorbar(
        doses, means, yerr=halves, color="#0072B2", marker="s", ms=4, linewidth=1.6, elinewidth=1.0, capsize=2
    )


def _place(count: int, index: int) -> Sequence[int]:
    return math.ceil(count / PER_ROW), min(PER_ROW, count), index + 1


def _figure(count: int) -> Figure:
    rows, columns, _ = _place(count, 0)
    figure = Figure(figsize=(2.9 * columns + 0.2, 2.5 * rows + 0.5), layout="constrained")
    FigureCanvasPdf(figure)
    return figure
