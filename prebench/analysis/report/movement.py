"""The page's section on dynamics: what the layers keep and what is answered, at snapshots of the training."""

from __future__ import annotations

import pandas as pd

from prebench.analysis import dynamics
from prebench.analysis.join import Study
from prebench.analysis.report.charts import Panel, Series, lines
from prebench.analysis.report.curves import is_light, mean_points
from prebench.analysis.report.parts import Figure, Group, Section, from_csv, source
from prebench.analysis.tables import Made, regularised_layers

FILE = "tables/dynamics_points.csv"
NONE = (
    "No snapshots were kept during training (train.snapshots, such as [0.25, 0.5, 0.75]), so probes and benchmarks are "
    "those of the finished models alone."
)


def during_training(study: Study, moved: pd.DataFrame, made: Made | None) -> Section:
    """Return every outcome over the steps, the attributes by layer at every step, and the table.

    Args:
        study: the study.
        moved: its `dynamics.points`.
        made: the table `dynamics`; None where there are no snapshots.
    """
    if made is None:
        return Section(notes=(NONE,))
    figures = [_by_step(study, moved, *key, title) for key, title in dynamics.titles(study).items()]
    groups = [Group("Probes and benchmarks over the instruct steps", [found for found in figures if found is not None])]
    for (kind, attribute), title in dynamics.titles(study).items():
        if kind == dynamics.PROBE:
            name = title.partition(",")[0]
            heading = f"By layer at every snapshot: {name}"
            groups.append(Group(heading, _by_layer(study, moved, attribute, name), folded=True))
    words = ("Step",)
    columns = {title: [f"{title}{end}" for end in ("", " ±", " low", " high")] for title in made[1].columns[2:]}
    table = from_csv(study, "dynamics", made, lambda title: [*columns[title], "n_seeds"], heads=2, words=words)
    return Section([group for group in groups if group.figures], (table,), sources=(source(study, FILE),))


def _by_step(study: Study, moved: pd.DataFrame, kind: str, outcome: str, title: str) -> Figure | None:
    mine = moved[(moved["kind"] == kind) & (moved["outcome"] == outcome)]
    shown = dynamics.summarised(mine).rename(columns={"step": "x", "value": "y"})
    if shown.empty:
        return None
    encoder = mine.loc[mine["layer"] == "encoder", "value"]
    panel = Panel(
        f"m-{kind}-{outcome}",
        f"{title}, %",
        "instruct step",
        [_series(study, variant, shown, "step") for variant in study.variants],
        reference=100 * float(encoder.mean()) if len(encoder) else None,
        most=100.0,
        least_span=2.0,
    )
    return Figure(panel.title, lines(panel))


def _by_layer(study: Study, moved: pd.DataFrame, attribute: str, name: str) -> list[Figure]:
    mine = moved[(moved["kind"] == dynamics.PROBE) & (moved["outcome"] == attribute)]
    layers = mine[~mine["layer"].isin([dynamics.MIDDLE, "encoder"])]
    figures = []
    for step, found in layers.groupby("step", sort=True):
        shown = found.assign(x=found["layer"].astype(int)).rename(columns={"value": "y"})
        title = f"{name}, step {step}: accuracy, %"
        encoder = mine.loc[(mine["layer"] == "encoder") & (mine["step"] == step), "value"]
        panel = Panel(
            f"m-{attribute}-{step}",
            title,
            "decoder layer (0: its input)",
            [_series(study, variant, shown, f"step {step}, layer", True) for variant in study.variants],
            reference=100 * float(encoder.mean()),
            most=100.0,
            least_span=2.0,
            whole_steps=True,
        )
        figures.append(Figure(title, lines(panel)))
    return figures


def _series(study: Study, variant: str, shown: pd.DataFrame, what: str, ringed: bool = False) -> Series:
    mine = shown[shown["variant"] == variant]
    rings = {float(layer) for layer in regularised_layers(study, variant)} if ringed else set()
    points = mean_points(mine, 100.0, f"{FILE}: {variant}, {what}", rings)
    return Series(study.variants.index(variant), variant, points, is_light(study, variant))
