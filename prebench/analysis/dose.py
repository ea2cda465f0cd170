"""Dose-response: does more of a regularizer, or a later layer, keep more and answer better?

Formulae: docs/statistics.md, 5. A family are variants whose blocks differ in one field alone, the weight or
the layer. The trained
model is the unit: a trend is over the models of all seeds, those of one seed compared among themselves.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import pandas as pd

from prebench.analysis import degradation, statistics
from prebench.analysis.compare import ALPHA, MIN_SEEDS
from prebench.analysis.join import Run, Study, gain, same_origin
from prebench.analysis.render import NOT_DEFINED, interval, marked, p_value, percent, text_table
from prebench.runtime import derive_seed

FIELDS = ("weight", "layer")
REDUCTION = "reduction of degradation"
NO_CLAIM = "no claim: n too small"
RISES, FALLS, NO_TREND = "rises", "falls", "no trend shown"


@dataclass(frozen=True)
class Family:
    """Variants that differ in one field of their regularizer alone."""

    field: str
    doses: Mapping[str, float]
    """By variant, without the baseline: the weight, or the layer's index."""

    @property
    def name(self) -> str:
        """Return the family's members in words."""
        return ", ".join(self.doses)


def families(study: Study, field: str) -> list[Family]:
    """Return sets of variants that differ in a field alone, each with two doses or more; weight 0 is the baseline."""
    found: dict[str, dict[str, float]] = {}
    for config in study.config.variants:
        block = config.regularizer
        if block is None or block.weight == 0 or config.name not in study.variants or config.seed_offset:
            continue
        layers = {layer for run in study.of_variant(config.name) for layer in run.regularised_layers}
        if field == "layer" and len(layers) != 1:
            continue  # several layers at once are no point of a scale
        dose = float(block.weight) if field == "weight" else float(layers.pop())
        rest = block.model_dump(mode="json", exclude={field})
        found.setdefault(str(sorted(rest.items())), {})[config.name] = dose
    kept = [doses for doses in found.values() if len(set(doses.values())) > 1]
    return [Family(field, dict(sorted(doses.items(), key=lambda item: item[1]))) for doses in kept]


def is_dosed(study: Study) -> bool:
    """Tell whether a study has a dose-response at all."""
    return study.baseline is not None and any(families(study, field) for field in FIELDS)


def points(study: Study, family: Family) -> pd.DataFrame:
    """Return every trained model of a family against the baseline of its seed.

    Returns:
        Columns outcome (REDUCTION or a task's marked label), variant, seed, dose, value (a fraction).
    """
    rows: list[tuple[str, str, int, float, float]] = []
    base = study.baseline
    for variant, dose in family.doses.items() if base is not None else ():
        frame = degradation.reductions(study, str(base), variant)
        known = zip(frame["seed"], frame["reduction"], strict=True)
        rows += [(REDUCTION, variant, int(seed), dose, float(value)) for seed, value in known if not pd.isna(value)]
        for task in study.tasks:
            for seed in study.common_seeds(str(base), variant, task.task):
                found = gain(study.runs[str(base), seed], study.runs[variant, seed], task.task)
                if found is not None:
                    rows.append((_outcome(task), variant, seed, dose, found))
    return pd.DataFrame(rows, columns=["outcome", "variant", "seed", "dose", "value"])


def _outcome(task: Any) -> str:
    return f"gain: {marked(task.label, task.data_source)}"


_RESPONSE = ["field", "outcome", "variant", "dose", "n_seeds", "mean", "low", "high"]


def table(study: Study) -> tuple[pd.DataFrame, pd.DataFrame, str]:
    """Return mean and t interval over seeds at every dose: numbers, the text to print, the caption."""
    rows = []
    for family in (family for field in FIELDS for family in families(study, field)):
        for (outcome, variant), found in points(study, family).groupby(["outcome", "variant"], sort=False):
            estimate = degradation.estimate(found["value"])
            assert estimate is not None
            bounds = estimate.interval
            ends = (bounds.low, bounds.high) if bounds else (None, None)
            dose = family.doses[str(variant)]
            rows.append((family.field, outcome, variant, dose, estimate.n_seeds, estimate.mean, *ends))
    numbers = pd.DataFrame(rows, columns=_RESPONSE)
    order = {name: i for i, name in enumerate(dict.fromkeys(numbers["outcome"]))}
    numbers = numbers.sort_values(["field", "outcome", "dose"], kind="stable", key=_order(order), ignore_index=True)
    printed = pd.DataFrame({"Field": numbers["field"], "Outcome": numbers["outcome"], "Variant": numbers["variant"]})
    printed["Dose"] = [f"{dose:g}" for dose in numbers["dose"]]
    printed["Seeds"] = numbers["n_seeds"].astype(str)
    printed["Difference"] = [percent(value, signed=True) for value in numbers["mean"]]
    printed["95% interval"] = [interval(*ends) for ends in zip(numbers["low"], numbers["high"], strict=True)]
    caption = (
        f"Study {study.name}: dose-response over the weight and the layer, where variants differ in that alone. "
        f"Against the baseline of the same seed, in points, with 95% t intervals over seeds{_sizes(numbers)}. The "
        "baseline is weight 0, and stands at 0."
    )
    return numbers, printed, caption


def _order(outcomes: Mapping[str, int]) -> Any:
    def key(column: pd.Series) -> pd.Series:
        if column.name == "outcome":
            return column.map(outcomes)
        return column.map({"weight": 0, "layer": 1}) if column.name == "field" else column

    return key


def _sizes(numbers: pd.DataFrame) -> str:
    parts = []
    for field, found in numbers.groupby("field", sort=False):
        counts = found.groupby("outcome")["n_seeds"].sum()
        parts.append(f"{field}: n = {counts.max()} trained models")
    return f" ({'; '.join(parts)})" if parts else ""


_TREND = ["field", "outcome", "n_models", "n_seeds", "n_doses", "r", "p", "p_holm", "verdict"]


def trends(study: Study) -> tuple[pd.DataFrame, pd.DataFrame, str]:
    """Return whether outcomes rise or fall with the dose: numbers, the text to print, the caption.

    Per seed the models of a family, for the weight with the baseline as weight 0, are compared among themselves: r of
    the dose's rank with the outcome, centred in the seed, p by permutation within seeds (`statistics.correlation`).
    """
    rows: list[dict[str, Any]] = []
    for family in (family for field in FIELDS for family in families(study, field)):
        mine = [_trend(study, family, outcome, models) for outcome, models in _levels(study, family).items()]
        adjusted = statistics.holm([row["p"] for row in mine])
        rows += [row | {"p_holm": p, "verdict": _verdict(row, p)} for row, p in zip(mine, adjusted, strict=True)]
    numbers = pd.DataFrame(rows, columns=_TREND)
    printed = pd.DataFrame({"Field": numbers["field"], "Outcome": numbers["outcome"]})
    for title, name in (("n", "n_models"), ("Seeds", "n_seeds"), ("Doses", "n_doses")):
        printed[title] = numbers[name].astype(str)
    printed["r"] = [NOT_DEFINED if pd.isna(r) else f"{r:+.2f}".replace("-", "−") for r in numbers["r"]]
    printed["p"] = [p_value(p) for p in numbers["p"]]
    printed["p (Holm)"] = [p_value(p) for p in numbers["p_holm"]]
    printed["Verdict"] = numbers["verdict"]
    caption = (
        f"Study {study.name}: trend over the dose. n: trained models, the baseline's as weight 0 included; r: of the "
        "dose's rank with the outcome (score, or the negative of the degradation), both centred over the models of a "
        "seed; p by permutation within seeds; Holm's correction over the outcomes of a field. No claim with fewer than "
        f"{MIN_SEEDS} seeds or too few models. A regularizer optimises what lies next to the probe: its reduction of "
        "degradation may rise with the weight by construction, its gain may not."
    )
    return numbers, printed, caption


def text(study: Study, width: int) -> str:
    """Return the trends as plain text; "" where variants differ in no dose alone."""
    if not is_dosed(study):
        return ""
    _, printed, _ = trends(study)
    title = "dose-response: does the outcome rise with the weight, with the layer? (n: trained models)"
    header = [name.lower() for name in printed.columns]
    rows = printed.to_numpy().tolist()
    return text_table(title, [header[1], "over", *header[2:]], [[row[1], row[0], *row[2:]] for row in rows], width)


def _levels(study: Study, family: Family) -> dict[str, list[tuple[int, float, float]]]:
    """Return (seed, dose, value) of every model by outcome: values themselves, not differences from the baseline."""
    doses = dict(family.doses)
    if family.field == "weight" and study.baseline is not None:
        doses[study.baseline] = 0.0
    runs = [(dose, run) for variant, dose in doses.items() for run in study.of_variant(variant)]
    known = degradation.of_study(study)
    found: dict[str, list[tuple[int, float, float]]] = {}
    probed = [(dose, run) for dose, run in runs if (run.variant, run.seed) in known]
    for dose, run in _alike(probed, lambda run: run.probe_hashes):
        lost = known[run.variant, run.seed].over_middle()
        if lost is not None:
            found.setdefault(REDUCTION, []).append((run.seed, dose, -lost))
    for task in study.tasks:
        scored = [(d, run) for d, run in runs if task.task in run.tasks and run.tasks[task.task].score is not None]
        for dose, run in _alike(scored, lambda run, name=task.task: run.tasks[name].hashes):
            found.setdefault(_outcome(task), []).append((run.seed, dose, float(run.tasks[task.task].score or 0.0)))
    return found


def _alike(runs: list[tuple[float, Run]], hashes: Any) -> list[tuple[float, Run]]:
    """Leave out what was evaluated on other data, prompts or settings than the first."""
    return [(dose, run) for dose, run in runs if same_origin(hashes(runs[0][1]), hashes(run))]


def _trend(study: Study, family: Family, outcome: str, models: list[tuple[int, float, float]]) -> dict[str, Any]:
    frame = pd.DataFrame(models, columns=["seed", "dose", "value"])
    ranks = frame["dose"].rank(method="dense")
    seed = derive_seed("dose", family.field, outcome) % 2**32
    found = statistics.correlation(ranks.to_numpy(), frame["value"].to_numpy(), frame["seed"].tolist(), seed=seed)
    return {
        "field": family.field,
        "outcome": outcome,
        "n_models": found.n,
        "n_seeds": frame["seed"].nunique(),
        "n_doses": frame["dose"].nunique(),
        "r": found.pearson,
        "p": found.p,
    }


def _verdict(row: Mapping[str, Any], p_holm: float | None) -> str:
    if row["r"] is None or row["n_seeds"] < MIN_SEEDS:
        return NO_CLAIM
    if p_holm is None or p_holm >= ALPHA:
        return NO_TREND
    return RISES if row["r"] > 0 else FALLS
