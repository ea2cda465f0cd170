"""The tables of a study: scores.csv; main, question_types, seeds, probes, degradation, correlation as CSV and LaTeX.

Beside them the verdict in words; where training was validated learning_curves.csv and the table `matched`; where
snapshots were kept the table `dynamics` and dynamics_points.csv.

CSV holds fractions and is what to compute with; LaTeX prints per cent and is what to print. All of it is rebuilt from
the records, and equal records give equal bytes.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from prebench.analysis import (
    ablation,
    degradation,
    dose,
    dynamics,
    learning_curves,
    question_types,
    seeds,
    statistics,
    verdict,
)
from prebench.analysis.compare import references
from prebench.analysis.join import Run, Study, gain, scores_frame
from prebench.analysis.render import NOT_DEFINED, interval, latex_table, marked, p_value, percent, to_csv
from prebench.runtime import derive_seed
from prebench.store import write_text

MAJORITY = "majority (no image)"
BLIND = "blind (question text alone)"
SPREAD_SEEDS = "SD over seeds"
SPREAD_IMAGES = "half the 95% interval over images"
VERDICT_FILE = "verdict.txt"
PATCH_METRICS = ("cohesion", "coupling", "contrast_ratio", "centred_difference", "auc")
GENERATED_NOTE = "(generated): data made by a generator in the benchmark's format, not the benchmark."

Made = tuple[pd.DataFrame, pd.DataFrame, str]
"""A table: its numbers (fractions), row by row the text to print (per cent), and the caption."""


@dataclass(frozen=True)
class Score:
    """A cell of the main table, in fractions."""

    mean: float
    spread: float | None
    """SD over seeds; with one seed, half the 95% interval over images."""
    n_seeds: int


def write_tables(study: Study) -> list[Path]:
    """Write every table of a study and return the paths.

    Raises:
        StoreError: the folder can't be written, or a record is damaged.
    """
    paths = [study.folder / "scores.csv"]
    write_text(paths[0], to_csv(scores_frame(study)))
    curves = learning_curves.curves(study)
    moved = dynamics.points(study)
    for name, made in make_tables(study, curves, moved).items():
        paths += _write(study, name, made)
    for name, frame in (("learning_curves", curves), ("dynamics_points", moved)):
        if not frame.empty:
            paths.append(study.folder / "tables" / f"{name}.csv")
            write_text(paths[-1], to_csv(frame))
    paths.append(study.folder / "tables" / VERDICT_FILE)
    write_text(paths[-1], "".join(f"{line}\n" for line in verdict.sentences(study, curves)))
    return paths


def make_tables(study: Study, curves: pd.DataFrame, moved: pd.DataFrame) -> dict[str, Made]:
    """Return every table of a study by the name of its files.

    Args:
        study: the study.
        curves: its learning curves; empty where training was not validated.
        moved: `dynamics.points` of its snapshots; empty where there are none.

    Raises:
        StoreError: a record is damaged.
    """
    makers: dict[str, Callable[[Study], Made]] = {
        "main": _main,
        "question_types": question_types.table,
        "seeds": seeds.table,
        "probes": _probes,
        "degradation": _degradation,
        "correlation": _correlation,
    }
    if ablation.is_ablation(study):
        makers["ablation"] = ablation.table
    if dose.is_dosed(study):
        makers |= {"dose_response": dose.table, "dose_trend": dose.trends}
    made = {name: make(study) for name, make in makers.items()}
    if not curves.empty:
        made["matched"] = learning_curves.matched_table(study, curves)
    if not moved.empty:
        made["dynamics"] = dynamics.table(study, moved)
    return made


def _write(study: Study, name: str, made: Made) -> list[Path]:
    numbers, printed, caption = made
    csv, tex = (study.folder / "tables" / f"{name}.{end}" for end in ("csv", "tex"))
    write_text(csv, to_csv(numbers))
    write_text(tex, latex_table(printed, caption, f"tab:{study.name}-{name}"))
    return [csv, tex]


def score(study: Study, variant: str, task: str) -> Score | None:
    """Return a variant's mean score on a task over its seeds; None where there is none.

    The spread is the standard deviation over seeds; with one seed half the 95% interval over images:
    t_{.975, C-1} times the cluster-robust standard error.
    """
    runs = [run for run in study.of_variant(variant) if task in run.tasks and run.tasks[task].score is not None]
    if not runs:
        return None
    values = [float(run.tasks[task].score or 0.0) for run in runs]
    spread = float(np.std(values, ddof=1)) if len(values) > 1 else _half_interval(runs[0], task)
    return Score(float(np.mean(values)), spread, len(values))


def _half_interval(run: Run, task: str) -> float | None:
    answered = run.samples(task).dropna(subset=["score"])
    if answered.empty:
        return None
    images = answered["image_id"].to_numpy(dtype=str)
    return statistics.half_interval(answered["score"].to_numpy(), images)


def _main(study: Study) -> tuple[pd.DataFrame, pd.DataFrame, str]:
    """Variants by tasks: mean and spread, with the scores that need no image below."""
    titles = [marked(task.label, task.data_source) for task in study.tasks]
    numbers, printed = [], []
    for variant in study.variants:
        cells = [score(study, variant, task.task) for task in study.tasks]
        n_seeds = max((cell.n_seeds for cell in cells if cell), default=0)
        row: dict[str, Any] = {"variant": variant, "n_seeds": n_seeds}
        row["spread"] = SPREAD_SEEDS if n_seeds > 1 else SPREAD_IMAGES
        for title, cell in zip(titles, cells, strict=True):
            row |= {title: cell.mean if cell else None, f"{title} ±": cell.spread if cell else None}
        numbers.append(row)
        printed.append([variant, str(n_seeds), *(_with_spread(cell) for cell in cells)])
    for i, name in enumerate((MAJORITY, BLIND)):
        values = [references(study, task.task)[i] for task in study.tasks]
        numbers.append({"variant": name, **dict(zip(titles, values, strict=True))})
        printed.append([name, "", *(percent(value) for value in values)])
    caption = (
        f"Study {study.name}: scores in %. ±: {SPREAD_SEEDS}, or {SPREAD_IMAGES} where there is one seed. "
        f"Majority and blind answers need no image. {_generated_note(study)}"
    )
    columns = ["variant", "n_seeds", "spread", *(part for title in titles for part in (title, f"{title} ±"))]
    return (
        pd.DataFrame(numbers, columns=columns),
        pd.DataFrame(printed, columns=["Variant", "Seeds", *titles]),
        caption.strip(),
    )


def _generated_note(study: Study) -> str:
    return GENERATED_NOTE if any(task.data_source == "generated" for task in study.tasks) else ""


def _with_spread(cell: Score | None) -> str:
    if cell is None:
        return NOT_DEFINED
    return percent(cell.mean) + (f" ± {percent(cell.spread)}" if cell.spread is not None else "")


def probe_means(study: Study) -> pd.DataFrame:
    """Return every probe value as the mean over a variant's seeds.

    Returns:
        Columns variant, layer (-1: the vision encoder), num_layers, level, attribute, metric, value, n_seeds.
    """
    keys = ["variant", "layer", "num_layers", "level", "attribute", "metric"]
    frames = [run.probe().assign(variant=run.variant) for run in study.runs.values() if not run.probe().empty]
    if not frames:
        return pd.DataFrame(columns=[*keys, "value", "n_seeds"])
    grouped = pd.concat(frames, ignore_index=True).groupby(keys, sort=True, dropna=False)["value"]
    return grouped.agg(value="mean", n_seeds="size").reset_index()


def _probes(study: Study) -> tuple[pd.DataFrame, pd.DataFrame, str]:
    """Variants by layers: accuracy per attribute, patch structure, degradation and its reduction."""
    means = probe_means(study)
    suite = study.config.suite.probe
    names = {("global", a.name, "accuracy"): f"accuracy_{a.name}" for a in suite.attributes} if suite else {}
    names |= {("patch", "", metric): metric for metric in PATCH_METRICS}
    by_layer = _per_layer_degradation(study)
    rows: list[dict[str, Any]] = []
    for variant in study.variants:
        mine = means[means["variant"] == variant]
        for layer, values in mine.groupby("layer", sort=True):
            row: dict[str, Any] = {
                "variant": variant,
                "layer": int(layer),
                "depth": max(0, int(layer)) / int(values["num_layers"].max()),
                "regularised": int(layer) in regularised_layers(study, variant),
                "n_seeds": int(values["n_seeds"].max()),
            }
            keys = zip(values["level"], values["attribute"], values["metric"], strict=True)
            found = dict(zip(keys, values["value"], strict=True))
            row |= {name: found.get(key) for key, name in names.items()}
            row |= by_layer.get((variant, int(layer)), {})
            rows.append(row)
    columns = ["variant", "layer", "depth", "regularised", "n_seeds", *names.values(), "degradation", "reduction"]
    numbers = pd.DataFrame(rows, columns=columns)
    attribute = suite.reference_attribute if suite else "none"
    caption = (
        f"Study {study.name}: visual tokens by layer, mean over seeds. Accuracy of linear probes in % (layer -1: the "
        "vision encoder); cohesion, coupling, their ratio, centred difference and AUC of patch similarities. "
        f"D: accuracy of {attribute} at the encoder minus at the layer, in points; reduction: D of the baseline minus "
        "D of the variant. r: the layer that the variant regularises."
    )
    return numbers, _print_probes(numbers), caption


def _print_probes(numbers: pd.DataFrame) -> pd.DataFrame:
    printed = pd.DataFrame({"Variant": numbers["variant"]})
    marks = numbers["regularised"].map({True: " (r)", False: ""})
    printed["Layer"] = numbers["layer"].astype(str) + marks.astype(str)
    titles = {"contrast_ratio": "ratio", "centred_difference": "centred diff.", "auc": "AUC"}
    for name in numbers.columns[5:]:
        if name.startswith("accuracy_"):
            printed[name.removeprefix("accuracy_").replace("_", " ")] = [percent(v) for v in numbers[name]]
        elif name in PATCH_METRICS:
            printed[titles.get(name, name)] = [_real(v) for v in numbers[name]]
        else:
            printed["D" if name == "degradation" else name] = [percent(v, signed=True) for v in numbers[name]]
    return printed


def _real(value: float | None) -> str:
    return NOT_DEFINED if value is None or pd.isna(value) else f"{value:.3f}".replace("-", "−")


def regularised_layers(study: Study, variant: str) -> set[int]:
    """Return the layers that a variant regularises; a weight of 0 only logs its loss."""
    return {layer for run in study.of_variant(variant) for layer in run.regularised_layers}


def _per_layer_degradation(study: Study) -> dict[tuple[str, int], dict[str, float]]:
    known = degradation.of_study(study)
    base = study.baseline
    found: dict[tuple[str, int], dict[str, float]] = {}
    for variant in study.variants:
        mine = {seed: value.per_layer for (name, seed), value in known.items() if name == variant}
        theirs = {seed: value.per_layer for (name, seed), value in known.items() if name == base and base != variant}
        for layer in sorted({layer for values in mine.values() for layer in values}):
            cell = {"degradation": float(np.mean([values[layer] for values in mine.values()]))}
            both = [theirs[seed][layer] - mine[seed][layer] for seed in sorted(mine.keys() & theirs.keys())]
            if both:
                cell["reduction"] = float(np.mean(both))
            found[variant, layer] = cell
    return found


def _degradation(study: Study) -> tuple[pd.DataFrame, pd.DataFrame, str]:
    """One row per attribute and variant: R, D over the middle layers, and the reduction against the baseline."""
    rows: list[dict[str, Any]] = []
    names = degradation.attributes(study)
    for attribute in names:
        known = degradation.of_study(study, attribute)
        for variant in study.variants:
            mine = [value for (name, _), value in known.items() if name == variant]
            found = degradation.over_seeds(study, variant, attribute)
            if found is not None:
                row: dict[str, Any] = {"attribute": attribute, "claim": attribute == names[0]}
                row |= {"variant": variant, "n_seeds": len(mine), "degradation": found.mean}
                row |= {"reference": float(np.mean([value.reference for value in mine]))}
                row |= _bounds(found, "_degradation")
                rows.append(row | _reduction(study, variant, attribute))
    columns = ["attribute", "claim", "variant", "n_seeds", "reference", "degradation", "low_degradation"]
    columns += ["high_degradation", "reduction", "low", "high"]
    columns += ["excluded_layers", "reduction_excluded", "low_excluded", "high_excluded"]
    numbers = pd.DataFrame(rows, columns=columns)
    printed = pd.DataFrame({"Attribute": [str(name).replace("_", " ") for name in numbers["attribute"]]})
    printed["Variant"] = numbers["variant"]
    printed["Seeds"] = numbers["n_seeds"].astype(str)
    printed["R"] = [percent(v) for v in numbers["reference"]]
    shown = {"D": ("degradation", "_degradation"), "Reduction": ("reduction", "")}
    shown["Without regularised layers"] = ("reduction_excluded", "_excluded")
    for title, (name, end) in shown.items():
        parts = (numbers[column] for column in (name, f"low{end}", f"high{end}"))
        printed[title] = [_with_interval(*values) for values in zip(*parts, strict=True)]
    first = next(iter(names), "none")
    caption = (
        f"Study {study.name}: degradation D, in points: probe accuracy R at the vision encoder minus its mean over the "
        "middle layers, ceil(L/4) to floor(3L/4), with a t interval over seeds. Reduction: D of the baseline minus D "
        "of the variant, paired by seed, with a t interval over seeds; also without the layers that either of the two "
        f"regularises (weight above 0). The claim is about {first}; the other attributes are shown beside it."
    )
    return numbers, printed, caption


def _bounds(found: degradation.Estimate, end: str) -> dict[str, float | None]:
    low, high = (found.interval.low, found.interval.high) if found.interval else (None, None)
    return {f"low{end}": low, f"high{end}": high}


def _with_interval(value: float, low: float, high: float) -> str:
    text = percent(value, signed=True)
    return text if pd.isna(low) else f"{text} {interval(low, high)}"


def _reduction(study: Study, variant: str, attribute: str) -> dict[str, Any]:
    if study.baseline in (None, variant):
        return {}
    frame = degradation.reductions(study, str(study.baseline), variant, attribute)
    cells: dict[str, Any] = {}
    for end in ("", "_excluded"):
        found = degradation.estimate(frame[f"reduction{end}"])
        if found is not None:
            cells |= {f"reduction{end}": found.mean, **_bounds(found, end)}
    if "reduction_excluded" in cells:
        cells["excluded_layers"] = " ".join(map(str, frame["excluded_layers"].iloc[0]))
    return cells


def trained_models(study: Study, task: str) -> pd.DataFrame:
    """Return the points of the correlation: one row per trained model other than the baseline.

    Returns:
        Columns variant, seed, reduction (of degradation) and gain (in the task's score), both against the baseline
        of the same seed.
    """
    base, rows = study.baseline, []
    if base is not None:
        for variant in (name for name in study.variants if name != base):
            frame = degradation.reductions(study, base, variant)
            for seed, value in zip(frame["seed"], frame["reduction"], strict=True):
                found = gain(study.runs[base, int(seed)], study.runs[variant, int(seed)], task)
                if found is not None and not np.isnan(value):
                    rows.append((variant, int(seed), float(value), found))
    return pd.DataFrame(rows, columns=["variant", "seed", "reduction", "gain"])


def correlation_of(points: pd.DataFrame, task: str) -> statistics.Correlation:
    """Return the correlation of a task's `trained_models`."""
    seed = derive_seed("correlation", task) % 2**32
    reductions, gains = points["reduction"].to_numpy(), points["gain"].to_numpy()
    return statistics.correlation(reductions, gains, blocks=points["seed"].tolist(), seed=seed)


def as_correlated(points: pd.DataFrame) -> tuple[pd.DataFrame, bool]:
    """Centre over the models of a seed where several share its baseline, as `statistics.correlation` does."""
    counts = points.groupby("seed")["seed"].transform("size")
    if counts.max() == 1:
        return points, False
    kept = points[counts > 1]
    columns = ["reduction", "gain"]
    return kept.assign(**(kept[columns] - kept.groupby("seed")[columns].transform("mean"))), True


_CORRELATION = ["task", "label", "n_models", "r", "low", "high", "rho", "p", "without_low", "without_high", "note"]


def _correlation(study: Study) -> tuple[pd.DataFrame, pd.DataFrame, str]:
    """One row per task: does a model that degrades less answer better? The trained model is the unit."""
    numbers, printed = [], []
    for task in study.tasks:
        found = correlation_of(trained_models(study, task.task), task.task)
        bounds = (found.interval.low, found.interval.high) if found.interval else (None, None)
        without = (found.without_one.low, found.without_one.high) if found.without_one else (None, None)
        row = (found.n, found.pearson, *bounds, found.spearman, found.p, *without, found.note)
        numbers.append((task.task, marked(task.label, task.data_source), *row))
        shown = f"[{_real(bounds[0])}, {_real(bounds[1])}]" if found.interval else NOT_DEFINED
        range_without = f"{_real(without[0])} to {_real(without[1])}" if found.without_one else NOT_DEFINED
        cells = (_real(found.pearson), shown, _real(found.spearman), p_value(found.p), range_without, found.note)
        printed.append((marked(task.label, task.data_source), str(found.n), *cells))
    caption = (
        f"Study {study.name}: correlation of degradation reduction with gain over n trained models other than the "
        f"baseline, each against the baseline of its seed, and centred over the models of a seed where there are "
        f"several, for they share that baseline; p by permutation within seeds; no statement below "
        f"{statistics.MIN_CORRELATION_N} models. A regularizer optimises what lies next to the probe: this is no "
        f"mediation analysis. {_generated_note(study)}"
    )
    return (
        pd.DataFrame(numbers, columns=_CORRELATION),
        pd.DataFrame(printed, columns=["Task", "n", "r", "95% interval", "ρ", "p", "One left out", "Note"]),
        caption.strip(),
    )
