"""The ablation table: every variant's block, its gains and its reduction of degradation, beside the paper's own rows.

The paper's numbers (arXiv 2603.20808, ablation with CLIP* + Vicuna-7B) come from another model, other data and, as far
as is known, one training each: they stand beside ours to show which row is which, not to be subtracted.
"""

from __future__ import annotations

from typing import Any

import pandas as pd

from prebench.analysis import degradation, verdict
from prebench.analysis.degradation import Estimate
from prebench.analysis.join import Study, gain
from prebench.analysis.render import NOT_DEFINED, marked, percent, text_table
from prebench.schema import PredictiveConfig, VariantConfig

PAPER_TASKS = ("GQA", "MMMU", "TextVQA", "RealWorldQA", "MMVP")
PAPER: dict[str, tuple[float, ...]] = {
    "baseline": (62.0, 35.7, 45.5, 54.8, 20.0),
    "PRe, middle layer, pre-LLM anchor": (62.7, 36.1, 46.6, 55.4, 22.0),
    "PRe, last layer": (62.4, 35.6, 45.7, 54.5, 25.3),
    "anchor: pre-projector": (62.7, 35.1, 46.4, 54.4, 32.7),
    "anchor: DINOv2": (62.8, 35.9, 46.5, 54.6, 28.7),
}
"""Its scores in %, by row."""
PAPER_NOTE = (
    "The paper's rows are its own (arXiv 2603.20808: CLIP* + Vicuna-7B, the real benchmarks): another model and other "
    "data, without intervals."
)


def is_ablation(study: Study) -> bool:
    """Tell whether a study has several variants to set apart: at least two other than baseline and controls."""
    treated = [name for name in study.variants if name != study.baseline and not verdict.is_control(study, name)]
    return study.baseline is not None and len(treated) > 1


def paper_row(variant: VariantConfig) -> str | None:
    """Return which row of the paper's ablation a variant repeats, None for those that it has not."""
    block = variant.regularizer
    if block is None or block.weight == 0:
        return None if variant.seed_offset else "baseline"
    if not isinstance(block, PredictiveConfig) or block.level != "patch" or block.weight != 0.5:
        return None
    rows = {
        ("half", "pre_llm"): "PRe, middle layer, pre-LLM anchor",
        ("last", "pre_llm"): "PRe, last layer",
        ("half", "pre_projector"): "anchor: pre-projector",
        ("half", "external"): "anchor: DINOv2",
    }
    return rows.get((str(block.layer), block.anchor))


def table(study: Study) -> tuple[pd.DataFrame, pd.DataFrame, str]:
    """Return the table in fractions, the one to print in points, and its caption.

    Gains and reductions are paired with the baseline of the same seed, with 95% t intervals over seeds.

    Raises:
        StoreError: a record is damaged.
    """
    numbers = pd.DataFrame([_row(study, config) for config in _configs(study)])
    caption = (
        f"Study {study.name}: ablation. Score in % with the gain over the baseline of the same seed in points, ± half "
        "its 95% t interval over seeds; reduction: of degradation, in points, likewise. Rows are not corrected for "
        f"their number. {PAPER_NOTE}"
    )
    return numbers, _printed(study, numbers), caption


def text(study: Study, width: int) -> str:
    """Return our table and the paper's below it as plain text; "" where the study is no ablation."""
    if not is_ablation(study):
        return ""
    _, printed, _ = table(study)
    own = [name for name in printed.columns if name not in ("Block", "Seeds", *_paper_columns())]
    short = [name.replace(" (generated)", "*") for name in own]
    ours = text_table(
        f"ablation: score in % and gain over {study.baseline} in points, ± half the 95% t interval over seeds; "
        "reduction of degradation likewise (*: generated data)",
        short,
        printed[own].to_numpy().tolist(),
        width,
    )
    known = [(config.name, row) for config in _configs(study) if (row := paper_row(config)) is not None]
    paper = text_table(
        "the paper's ablation (arXiv 2603.20808: CLIP* + Vicuna-7B, the real benchmarks; another model and other data)",
        ["as here", *PAPER_TASKS],
        [[name, *_paper_cells(row)] for name, row in known],
        width,
    )
    return f"{ours}\n{paper}" if known else ours


def _configs(study: Study) -> list[VariantConfig]:
    return [config for config in study.config.variants if config.name in study.variants]


def _row(study: Study, config: VariantConfig) -> dict[str, Any]:
    block = config.regularizer
    values: dict[str, Any] = {"variant": config.name}
    for field in ("type", "weight", "layer", "anchor", "level"):
        found = getattr(block, field, None)
        values[field] = " ".join(map(str, found)) if isinstance(found, tuple) else found
    if block is not None and (own := block.model_dump(mode="json", exclude=set(PredictiveConfig.model_fields))):
        values["own_fields"] = ", ".join(f"{name} {value}" for name, value in own.items())
    values["n_seeds"] = len(study.of_variant(config.name))
    for task in study.tasks:
        title = marked(task.label, task.data_source)
        scores = degradation.estimate(
            run.tasks[task.task].score for run in study.of_variant(config.name) if task.task in run.tasks
        )
        values[title] = scores.mean if scores else None
        values |= _estimate_cells(f"{title} gain", _gain(study, config.name, task.task))
    values |= _estimate_cells("reduction", _reduction(study, config.name))
    row = paper_row(config)
    values["paper_row"] = row
    numbers = PAPER[row] if row else (None,) * len(PAPER_TASKS)
    return values | dict(zip(_paper_columns(), (None if n is None else n / 100 for n in numbers), strict=True))


def _gain(study: Study, variant: str, task: str) -> Estimate | None:
    base = study.baseline
    if base in (None, variant):
        return None
    seeds = study.common_seeds(str(base), variant, task)
    return degradation.estimate(gain(study.runs[str(base), seed], study.runs[variant, seed], task) for seed in seeds)


def _reduction(study: Study, variant: str) -> Estimate | None:
    return None if study.baseline in (None, variant) else degradation.reduction(study, str(study.baseline), variant)


def _estimate_cells(name: str, found: Estimate | None) -> dict[str, float | None]:
    bounds = found.interval if found else None
    ends = {"low": bounds.low if bounds else None, "high": bounds.high if bounds else None}
    return {name: found.mean if found else None} | {f"{name} {end}": value for end, value in ends.items()}


def _paper_columns() -> list[str]:
    return [f"paper: {task}" for task in PAPER_TASKS]


def _paper_cells(row: str) -> list[str]:
    """Return the paper's scores with the difference from its baseline."""
    if row == "baseline":
        return [f"{value:.1f}" for value in PAPER[row]]
    pairs = zip(PAPER[row], PAPER["baseline"], strict=True)
    return [f"{value:.1f} ({percent((value - base) / 100, signed=True)})" for value, base in pairs]


def _printed(study: Study, numbers: pd.DataFrame) -> pd.DataFrame:
    printed = pd.DataFrame({"Variant": numbers["variant"]})
    printed["Block"] = [_block(row) for row in numbers.to_dict("records")]
    printed["Seeds"] = numbers["n_seeds"].astype(str)
    for task in study.tasks:
        title = marked(task.label, task.data_source)
        printed[title] = [
            percent(score) + (f" ({gained})" if (gained := _plus_minus(*change)) else "")
            for score, *change in _columns(numbers, title, *_ends(f"{title} gain"))
        ]
    printed["Reduction"] = [_plus_minus(*values) for values in _columns(numbers, *_ends("reduction"))]
    for i, name in enumerate(_paper_columns()):
        printed[name] = [_paper_cells(row)[i] if isinstance(row, str) else "" for row in numbers["paper_row"]]
    return printed


def _ends(name: str) -> tuple[str, str, str]:
    return name, f"{name} low", f"{name} high"


def _columns(numbers: pd.DataFrame, *names: str) -> list[tuple[float, ...]]:
    return list(zip(*(numbers[name].astype(float) for name in names), strict=True))


def _plus_minus(value: float, low: float, high: float) -> str:
    if pd.isna(value):
        return ""
    half = "" if pd.isna(low) else f" ± {percent((high - low) / 2)}"
    return percent(value, signed=True) + half


def _block(row: dict[str, Any]) -> str:
    """Return what a variant trains with, in words."""
    if row["type"] is None or pd.isna(row["type"]) or row["weight"] == 0:
        return "text loss alone"
    layer = str(row["layer"]).replace("three_quarters", "3/4").replace("quarter", "1/4").replace("half", "1/2")
    parts = [row["type"].replace("_", " "), f"λ {row['weight']:g}", f"layer {layer}"]
    parts += [str(row[name]).replace("_", "-") for name in ("anchor", "level") if isinstance(row[name], str)]
    parts += [row["own_fields"]] if isinstance(row.get("own_fields"), str) else []
    return ", ".join(parts) if NOT_DEFINED not in parts else ""
