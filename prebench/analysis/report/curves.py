"""The page's figures over layers, training steps, trained models and doses."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Mapping, Sequence

import pandas as pd

from prebench.analysis import degradation, learning_curves, verdict
from prebench.analysis.join import Study
from prebench.analysis.plots import PER_ROW
from prebench.analysis.render import NOT_DEFINED, marked, p_value, percent
from prebench.analysis.report.charts import Panel, Point, Series, lines, number, scatter
from prebench.analysis.report.parts import Cell, Figure, Group, Section, Table, source
from prebench.analysis.tables import Made, as_correlated, regularised_layers, trained_models
from prebench.records import ENCODER

FEWEST_LAYERS = 3
"""A metric known at fewer decoder layers is no curve: a control, say."""
MOST_TOKENS = 5
MOST_SEEDS = 6
"""Single seeds that a mark's title names."""
_LEVELS = {
    "global": "What a linear probe decodes from the mean visual token",
    "patch": "How well visual tokens keep objects apart",
    "object": "How well visual tokens keep objects apart, every object counted once",
    "category": "How well visual tokens keep objects apart, by the object's category",
    "statistics": "Statistics of the visual tokens",
    "similarity": "Likeness of the mean visual token to layer 0 and to the encoder",
}
_METRICS = {
    "accuracy": "accuracy, %",
    "accuracy_10_per_class": "accuracy from 10 images per class, %",
    "accuracy_100_per_class": "accuracy from 100 images per class, %",
    "shuffled_label_accuracy": "accuracy with shuffled labels, %",
    "raw_pixel_accuracy": "accuracy from raw pixels, %",
    "auc": "AUC: tokens of one object are more alike",
    "centred_difference": "centred difference: cohesion minus coupling",
    "cohesion": "cohesion: cosine within objects",
    "coupling": "coupling: cosine between objects",
    "contrast_ratio": "contrast ratio: cohesion / coupling",
    "cka_layer_0": "linear CKA with layer 0",
    "cka_encoder": "linear CKA with the encoder",
    "cknna_layer_0": "CKNNA with layer 0",
    "cknna_encoder": "CKNNA with the encoder",
    "top10_share": "share of the ten most frequent tokens, %",
    "share": "share of the tokens, %",
}


def is_light(study: Study, variant: str) -> bool:
    """Tell whether a variant is drawn lighter, as in `prebench.analysis.plots`: a control among several variants."""
    return len(study.variants) > PER_ROW and verdict.is_control(study, variant)


def by_layer(study: Study) -> Section:
    """Return a figure per probed attribute and metric over the decoder layers, and a table of what has no curve."""
    frames = [run.probe().assign(variant=run.variant, seed=run.seed) for run in study.runs.values()]
    frames = [frame for frame in frames if not frame.empty]
    if not frames:
        return Section(notes=("No run was probed: `prebench probe` does that.",))
    probes = pd.concat(frames, ignore_index=True)
    known = degradation.attributes(study)
    groups, single = [], []
    # The model's own facts are cautions, decoded tokens a table of their own: neither is a curve.
    levels = set(probes["level"]) - {"model", "lm_head"}
    for level in sorted(levels, key=lambda name: (_place(list(_LEVELS), name), name)):
        mine = probes[probes["level"] == level]
        keys = sorted(set(zip(mine["attribute"], mine["metric"], strict=True)), key=lambda k: (_place(known, k[0]), k))
        shown: list[Figure] = []
        folded: list[Figure] = []
        for attribute, metric in keys:
            chosen = mine[(mine["attribute"] == attribute) & (mine["metric"] == metric)]
            if level == "category" and metric != "centred_difference":
                continue  # stands in the records: four figures per category would hide the others
            if chosen.loc[chosen["layer"] > ENCODER, "layer"].nunique() < FEWEST_LAYERS:
                single.append(chosen)
            else:
                aside = level in ("object", "category") or (level == "global" and metric != "accuracy")
                figures = folded if aside else shown
                figures.append(_layer_figure(study, level, attribute, metric, chosen))
        heading = _LEVELS.get(level, _words(level))
        groups += [Group(heading, shown)] if shown else []
        more = f"{heading}: fewer training images" if level == "global" else heading
        groups += [Group(more, folded, folded=True)] if folded else []
    tables = [_single_layers(study, single)] if single else []
    decoded = probes[probes["level"] == "lm_head"]
    tables += [_decoded_tokens(study, decoded)] if not decoded.empty else []
    files = (source(study, "tables/probes.csv"),)
    where = "Single runs: runs/<variant>-s<seed>/probe.parquet, whose hashes stand under Provenance."
    return Section(groups, tables, (*_cautions(probes), where), files)


def _place(order: Sequence[str], name: str) -> int:
    return order.index(name) if name in order else len(order)


def _words(name: object) -> str:
    return str(name).replace("_", " ")


def _metric(metric: str) -> str:
    return _METRICS.get(metric) or _words(metric) + (", %" if _is_percent(metric) else "")


def _is_percent(metric: str) -> bool:
    return "accuracy" in metric or metric.endswith("share")


def _single_layers(study: Study, values: Sequence[pd.DataFrame]) -> Table:
    """Return controls and what else is known at few layers: a row per value and layer, a column per variant."""
    rows = []
    for chosen in values:
        for layer, found in chosen.groupby("layer", sort=True):
            level, attribute, metric = (str(found[name].iloc[0]) for name in ("level", "attribute", "metric"))
            parts = [_LEVELS.get(level, _words(level)), _words(attribute), _metric(metric)]
            cells = [Cell(": ".join(part for part in parts if part))]
            cells.append(Cell("encoder" if layer == ENCODER else str(layer)))
            scale = 100.0 if _is_percent(metric) else 1.0
            for variant in study.variants:
                mine = found[found["variant"] == variant].assign(x=layer, y=found["value"])
                points = mean_points(mine, scale, f"runs/{variant}-s<seed>/probe.parquet, layer")
                text = number(points[0].y, 0.1 if scale == 100 else 0.0) if points else NOT_DEFINED
                cells.append(Cell(text, points[0].title if points else "no record"))
            rows.append(cells)
    header = ["Value", "Layer", *study.variants]
    return Table("single-layers", "Controls and values at single layers, mean over seeds.", header, rows, heads=2)


def _decoded_tokens(study: Study, decoded: pd.DataFrame) -> Table:
    """Return what the LM head makes of the last layer's visual tokens: a row per trained model."""
    rows = []
    for variant in study.variants:
        for run in study.of_variant(variant):
            mine = decoded[(decoded["variant"] == variant) & (decoded["seed"] == run.seed)]
            if mine.empty:
                continue
            path = f"runs/{run.folder.name}/probe.parquet, level lm_head"
            cells = [Cell(run.folder.name)]
            for metric, scale, step in (("token_entropy", 1.0, 0.01), ("top10_share", 100.0, 0.1)):
                found = mine.loc[mine["metric"] == metric, "value"]
                shown = NOT_DEFINED if found.empty else number(scale * float(found.iloc[0]), step)
                cells.append(Cell(shown, "no record" if found.empty else f"{path}: {metric} = {found.iloc[0]:.6f}"))
            tokens = mine[mine["metric"] == "share"].sort_values("value", ascending=False, kind="stable")
            shares = zip(tokens["attribute"], tokens["value"], strict=True)
            words = [f"{text!r} {percent(float(share), digits=0)}%" for text, share in shares]
            cells.append(Cell(", ".join(words[:MOST_TOKENS]) or NOT_DEFINED, f"{path}: {', '.join(words)}"))
            rows.append(cells)
    caption = (
        "The last layer's visual tokens through the LM head: entropy in bits of what they decode to (0: all to one "
        "token), the share of the ten most frequent tokens, and which are the first."
    )
    header = ["Run", "Entropy", "Top ten, %", "Most frequent"]
    return Table("decoded-tokens", caption, header, rows, words=("Most frequent",))


def _cautions(probes: pd.DataFrame) -> list[str]:
    """Say what a reader of the curves has to know about the model."""
    model = probes[(probes["level"] == "model") & (probes["value"] == 1)]
    notes = []
    if "image_tokens_see_the_question" in set(model["metric"]):
        notes.append("Image tokens attend to the question in this model: their states hold its text, too.")
    added = sorted(set(model.loc[model["metric"] == "encoder_features_added", "layer"]))
    if added:
        layers = ", ".join(map(str, added))
        notes.append(f"The model adds features of the vision encoder again at layer {layers}: its curves rise there.")
    return notes


def _layer_figure(study: Study, level: str, attribute: str, metric: str, values: pd.DataFrame) -> Figure:
    scale = 100.0 if _is_percent(metric) else 1.0
    kind = next(iter(values["kind"]), "")
    title = _metric(metric)
    if attribute:
        title = f"{_words(attribute)}{f' ({kind})' if kind else ''}: {title}"
    encoder = values.loc[values["layer"] == ENCODER, "value"]
    layers = values[values["layer"] > ENCODER].rename(columns={"layer": "x", "value": "y"})
    panel = Panel(
        id=f"c-{level}-{attribute}-{metric}".replace("_", "-").replace(" ", "-"),
        title=title,
        x_label="decoder layer (0: its input)",
        series=[_series(study, v, layers, scale, "layer", regularised_layers(study, v)) for v in study.variants],
        reference=scale * float(encoder.mean()) if len(encoder) else None,
        most=100.0 if scale == 100 else None,
        least_span=0.02 * scale,
        whole_steps=True,
    )
    return Figure(title, lines(panel))


def _series(
    study: Study, variant: str, values: pd.DataFrame, scale: float, what: str, ringed: Iterable[float] = ()
) -> Series:
    """Return a variant's line from columns variant, seed, x, y."""
    points = mean_points(values[values["variant"] == variant], scale, f"{variant}, {what}", set(ringed))
    return Series(study.variants.index(variant), variant, points, is_light(study, variant))


def mean_points(values: pd.DataFrame, scale: float, what: str, ringed: Collection[float] = ()) -> list[Point]:
    """Return mean, lowest and highest over the seeds at every x, from columns seed, x, y."""
    points = []
    for place, found in values.dropna(subset=["y"]).groupby("x", sort=True):
        seeds = dict(zip(found["seed"], scale * found["y"].astype(float), strict=True))
        mean, low, high = math.fsum(seeds.values()) / len(seeds), min(seeds.values()), max(seeds.values())
        digits = 0.1 if scale == 100 else 0.0
        shown = ", ".join(f"seed {seed}: {number(value, digits)}" for seed, value in sorted(seeds.items()))
        if len(seeds) > MOST_SEEDS:
            shown = f"{number(low, digits)} to {number(high, digits)} over {len(seeds)} seeds"
        end = ", regularised" if place in ringed else ""
        title = f"{what} {place:g}{end}: {number(mean, digits)} ({shown})"
        points.append(Point(float(place), mean, low, high, title, place in ringed))
    return points


# --- training ------------------------------------------------------------------------------------------------


def by_step(study: Study, curves: pd.DataFrame) -> Section:
    """Return validation during the instruct stage: lm_loss, then the accuracy of each question type."""
    mine = curves[curves["stage"] == learning_curves.INSTRUCT] if not curves.empty else curves
    if mine.empty:
        return Section(notes=("Training was not validated (train.validate_every), so there are no learning curves.",))
    kinds = learning_curves.question_types(mine)
    mean = mine[kinds].mean(axis=1)
    figures = [_step_figure(study, mine, mine["lm_loss"], "loss", "lm_loss, nats per token", 1.0)]
    figures.append(_step_figure(study, mine, mean, "mean", "mean over question types: accuracy, %", 100.0))
    by_type = [
        _step_figure(study, mine, mine[kind], f"k{i}", f"{_words(kind)}: accuracy, %", 100.0)
        for i, kind in enumerate(kinds)
    ]
    groups = (Group("Validation during the instruct stage", figures), Group("By question type", by_type, folded=True))
    return Section(groups, sources=(source(study, "tables/learning_curves.csv"),))


def _step_figure(study: Study, curves: pd.DataFrame, values: pd.Series, name: str, title: str, scale: float) -> Figure:
    known = pd.DataFrame({"variant": curves["variant"], "seed": curves["seed"], "x": curves["step"], "y": values})
    series = [_series(study, variant, known, scale, "step") for variant in study.variants]
    most = 100.0 if scale == 100 else None
    return Figure(title, lines(Panel(f"t-{name}", title, "instruct step", series, most=most, least_span=0.02 * scale)))


# --- trained models ------------------------------------------------------------------------------------------


def correlation(study: Study, made: Made) -> Section:
    """Return a scatter of degradation reduction and gain per task, with n and what can be said."""
    numbers = made[0].set_index("task")
    figures = []
    for task in study.tasks:
        points = trained_models(study, task.task)
        if points.empty:
            continue
        title = marked(task.label, task.data_source)
        placed, centred = as_correlated(points)
        series = []
        for variant, mine in placed.groupby("variant", sort=False):
            raw = points.loc[mine.index]
            told = [_told(*row) for row in zip(raw["variant"], raw["seed"], raw["reduction"], raw["gain"], strict=True)]
            pairs = zip(100 * mine["reduction"], 100 * mine["gain"], told, strict=True)
            marks = [Point(x, y, y, y, words) for x, y, words in pairs]
            series.append(Series(study.variants.index(variant), str(variant), marks, is_light(study, str(variant))))
        what = "reduction, points" + (", minus the mean of the seed" if centred else "")
        panel = Panel(f"r-{task.task}", title, what, series, least_span=0.5)
        figures.append(Figure(title, scatter(panel, "gain, points"), _statement(numbers.loc[task.task])))
    if not figures:
        note = "No trained model other than the baseline has both a probe and a score, so there is no correlation."
        return Section(notes=(note,))
    return Section((Group("Gain (up) over reduction of degradation (right), one mark per trained model", figures),))


def _told(variant: str, seed: int, reduction: float, found: float) -> str:
    values = f"reduction {percent(reduction, signed=True)}, gain {percent(found, signed=True)} points"
    return f"{variant}-s{seed}: {values} (tables/seeds.csv)"


def _statement(row: Mapping[str, object]) -> str:
    n = row["n_models"]
    if pd.isna(row["r"]):
        return f"n = {n} trained models: {row['note'] or 'not defined'}; no claim."
    r, low, high, rho = (number(float(row[name]), 0.01) for name in ("r", "low", "high", "rho"))  # type: ignore[arg-type]
    p = p_value(float(row["p"]))  # type: ignore[arg-type]
    without = " to ".join(number(float(row[f"without_{end}"]), 0.01) for end in ("low", "high"))  # type: ignore[arg-type]
    return (
        f"n = {n} trained models: r = {r} [{low}, {high}] ({without} with one model left out), ρ = {rho}, permutation "
        f"p = {p}."
    )
