"""How vision and language move during training: probes and benchmarks of a run's snapshots, and of the finished model.

The diagnosis by training dynamics of arXiv 2603.20808 ("visual sacrifice"). A run without snapshots has no place here.
Steps of one run are no independent observations: the unit stays the trained model, and intervals are over seeds.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd

from prebench.analysis import degradation
from prebench.analysis.join import Run, Study, load_run, same_origin
from prebench.analysis.render import NOT_DEFINED, interval, marked, percent
from prebench.records import ENCODER, PROBE_FILE, TaskRecord, middle_layers
from prebench.study import snapshot_folder

MIDDLE = "middle"
"""In place of a layer: the mean over the middle layers."""
PROBE, BENCHMARK = "probe", "benchmark"
CHANGE = "change"
"""In place of a step: from the first snapshot to the finished model."""
COLUMNS = ("variant", "seed", "step", "kind", "outcome", "layer", "value", "n", "weights_hash", "file")


def points(study: Study) -> pd.DataFrame:
    """Return every value of every snapshot, and of the finished models of the same runs.

    Returns:
        Columns variant, seed, step (instruct steps done), kind (probe or benchmark), outcome (attribute or task),
        layer (encoder, a number, or middle; "" for benchmarks), value (a fraction), n (images or documents),
        weights_hash and file (the record below the study's folder). Empty where no run kept a snapshot. A snapshot
        whose data, prompts or settings are not those of its finished model is left out.

    Raises:
        StoreError: a record is damaged, or was made with other weights than its neighbours.
    """
    rows: list[dict[str, Any]] = []
    variants = {variant.name: variant for variant in study.config.variants}
    recipe = study.config.preset.train
    for run in (run for name in study.variants for run in study.of_variant(name)):
        folders = {step: snapshot_folder(run.folder, step) for step in recipe.snapshot_steps}
        loaded = {step: load_run(path, study.config, variants[run.variant], run.seed) for step, path in folders.items()}
        kept = {step: found for step, found in loaded.items() if found is not None}
        for step, found in (kept | {recipe.instruct.steps: run} if kept else kept).items():
            rows += [row | {"step": step} for row in (*_probed(study, found, run), *_scored(study, found, run))]
    return pd.DataFrame(rows, columns=list(COLUMNS))


def _probed(study: Study, found: Run, finished: Run) -> list[dict[str, Any]]:
    """Return the accuracy of every attribute at the encoder, at every layer, and over the middle layers."""
    if found.probe().empty or not same_origin(found.probe_hashes, finished.probe_hashes):
        return []
    rows = []
    path = (found.folder / PROBE_FILE).relative_to(study.folder)
    about = {"variant": found.variant, "seed": found.seed, "kind": PROBE, "file": str(path)}
    about["weights_hash"] = (found.probe_hashes or {}).get("weights", "")
    tested = found.probe().query("level == 'global' and metric == 'accuracy'").set_index("attribute")["n"]
    for attribute in degradation.attributes(study):
        known = degradation.degradation(found, attribute)
        if known is None:
            continue
        middle = [known.accuracy[layer] for layer in middle_layers(known.num_layers)]
        values = {MIDDLE: float(np.mean(middle)), "encoder": known.reference}
        values |= {str(layer): value for layer, value in known.accuracy.items() if layer != ENCODER}
        n = int(tested.loc[[attribute]].iloc[0])
        rows += [about | {"outcome": attribute, "layer": layer, "value": v, "n": n} for layer, v in values.items()]
    return rows


def _scored(study: Study, found: Run, finished: Run) -> list[dict[str, Any]]:
    rows = []
    for task in study.tasks:
        record, last = found.tasks.get(task.task), finished.tasks.get(task.task)
        if record is None or record.score is None or last is None or not same_origin(record.hashes, last.hashes):
            continue
        path = (found.folder / "eval" / f"{task.task}.json").relative_to(study.folder)
        rows.append(_scored_row(found, record, str(path)))
    return rows


def _scored_row(found: Run, record: TaskRecord, path: str) -> dict[str, Any]:
    row = {"variant": found.variant, "seed": found.seed, "kind": BENCHMARK, "outcome": record.task, "layer": ""}
    return row | {
        "value": record.score,
        "n": record.n - record.n_errors,
        "weights_hash": record.hashes.get("weights", ""),
        "file": path,
    }


def summarised(frame: pd.DataFrame) -> pd.DataFrame:
    """Return the points that stand for an outcome: accuracies over the middle layers, and scores."""
    return frame[frame["layer"].isin([MIDDLE, ""])]


def titles(study: Study) -> dict[tuple[str, str], str]:
    """Return the name of every outcome by (kind, outcome): attributes first, the reference attribute before others."""
    names = {(PROBE, name): f"{name.replace('_', ' ')}, middle layers" for name in degradation.attributes(study)}
    return names | {(BENCHMARK, task.task): marked(task.label, task.data_source) for task in study.tasks}


def table(study: Study, frame: pd.DataFrame) -> tuple[pd.DataFrame, pd.DataFrame, str]:
    """Return one row per variant and step, and the change from the first to the last step.

    Args:
        study: the study.
        frame: its `points`.
    """
    chosen = summarised(frame)
    present = set(zip(chosen["kind"], chosen["outcome"], strict=True))
    names = {key: title for key, title in titles(study).items() if key in present}
    numbers, printed = [], []
    for variant, mine in chosen.groupby("variant", sort=False):
        by_step = {key: _by_step(mine, *key) for key in names}
        for step in [*sorted(set(mine["step"])), CHANGE]:
            row: dict[str, Any] = {"variant": variant, "step": step}
            cells = [str(variant), str(step)]
            for key, title in names.items():
                values, text = _cell(by_step[key], step, title)
                row |= values
                cells.append(text)
            row["n_seeds"] = max(int(by_step[key].notna().sum(axis=1).max()) for key in names)
            numbers.append(row)
            printed.append(cells)
    ends = ("", " ±", " low", " high")
    columns = ["variant", "step", "n_seeds", *(f"{title}{end}" for title in names.values() for end in ends)]
    caption = (
        f"Study {study.name}: during the instruct stage, at snapshots and in the finished model. Accuracy of linear "
        "probes on the mean visual token in %, mean over the middle layers, ceil(L/4) to floor(3L/4); scores in %. ±: "
        f"SD over seeds. {CHANGE}: from the first to the last step, in points, with a t interval over seeds."
    )
    header = ["Variant", "Step", *names.values()]
    return pd.DataFrame(numbers, columns=columns), pd.DataFrame(printed, columns=header), caption


def _by_step(values: pd.DataFrame, kind: str, outcome: str) -> pd.DataFrame:
    """Return steps by seeds."""
    mine = values[(values["kind"] == kind) & (values["outcome"] == outcome)]
    return mine.pivot(index="step", columns="seed", values="value").sort_index()


def _cell(by_step: pd.DataFrame, step: Any, title: str) -> tuple[dict[str, Any], str]:
    if step == CHANGE:
        found = degradation.estimate(by_step.iloc[-1] - by_step.iloc[0]) if len(by_step) > 1 else None
        if found is None:
            return {}, NOT_DEFINED
        low, high = (found.interval.low, found.interval.high) if found.interval else (None, None)
        text = percent(found.mean, signed=True) + (f" {interval(low, high)}" if found.interval else "")
        return {title: found.mean, f"{title} low": low, f"{title} high": high}, text
    values = by_step.loc[step].dropna() if step in by_step.index else pd.Series(dtype=float)
    if values.empty:
        return {}, NOT_DEFINED
    mean = float(values.mean())
    if len(values) == 1:
        return {title: mean}, percent(mean)
    spread = float(values.std(ddof=1))
    return {title: mean, f"{title} ±": spread}, f"{percent(mean)} ± {percent(spread)}"
