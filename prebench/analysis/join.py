"""Read a study folder and join its records: tidy scores, and documents paired between two variants.

Only records are read; a run that has not been evaluated yet is simply absent.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from prebench.config import read_yaml, validate
from prebench.errors import ComparisonError, StoreError, did_you_mean
from prebench.records import ProbeRow, SampleRecord, TaskRecord, from_dict
from prebench.schema import StudyConfig, TaskConfig
from prebench.store import read_json, read_jsonl, read_record

SCORE_COLUMNS = (
    "variant", "seed", "task", "label", "data_source", "metric", "primary", "value", "n", "n_errors",
    "majority", "blind", "weights_hash", "data_hash",
)  # fmt: skip
_PROBE_COLUMNS = tuple(f.name for f in dataclasses.fields(ProbeRow))
_SAMPLE_COLUMNS = ("image_id", "prompt_hash", "image_hash", "score")


@dataclass(frozen=True)
class Run:
    """One variant x seed with at least one result. Samples and probes are read when asked for, once."""

    variant: str
    seed: int
    folder: Path
    tasks: dict[str, TaskRecord]
    regularizer_layer: int | None
    """The layer that the regularizer predicted from, as the export says; None where there is none."""
    _cache: dict[str, pd.DataFrame] = field(default_factory=dict, repr=False, compare=False)

    def samples(self, task: str) -> pd.DataFrame:
        """Return the documents of a task: index doc_id; image_id, prompt_hash, image_hash, score (NaN: failed).

        Raises:
            StoreError: the file is missing, damaged, or names a document twice.
        """
        if task not in self._cache:
            self._cache[task] = _read_samples(self.folder / "eval" / f"{task}.samples.jsonl")
        return self._cache[task]

    def probe(self) -> pd.DataFrame:
        """Return probe.parquet, one row per ProbeRow; empty where the run was not probed.

        Raises:
            StoreError: the file can't be read or lacks a column.
        """
        if "" not in self._cache:
            self._cache[""] = _read_probe(self.folder / "probe.parquet")
        return self._cache[""]


@dataclass(frozen=True)
class Study:
    """A study folder as far as it has been computed."""

    folder: Path
    config: StudyConfig
    runs: dict[tuple[str, int], Run]

    @property
    def name(self) -> str:
        """Return the study's name."""
        return self.config.name

    @property
    def variants(self) -> list[str]:
        """Return the variants with at least one result, in the order of the configuration."""
        return [v.name for v in self.config.variants if any(variant == v.name for variant, _ in self.runs)]

    @property
    def tasks(self) -> list[TaskConfig]:
        """Return the suite's benchmark tasks (the probe is none) that at least one run has results for."""
        return [t for t in self.config.suite.tasks if any(t.task in run.tasks for run in self.runs.values())]

    @property
    def baseline(self) -> str | None:
        """Return the variant that gains are measured against.

        The one called `baseline`, else the first whose regularizer is absent or has weight 0; None where there is
        none among those that were run.
        """
        run = self.variants
        if "baseline" in run:
            return "baseline"
        plain = (v.name for v in self.config.variants if v.regularizer is None or v.regularizer.weight == 0)
        return next((name for name in plain if name in run), None)

    def of_variant(self, variant: str) -> list[Run]:
        """Return a variant's runs, by seed.

        Raises:
            ComparisonError: the variant was not run; those that were are named.
        """
        found = [run for (name, _), run in sorted(self.runs.items()) if name == variant]
        if not found:
            hint = did_you_mean(variant, self.variants).replace("known:", "run so far:")
            raise ComparisonError(f"study {self.name!r}: variant {variant!r} was not run{hint}")
        return found

    def common_seeds(self, a: str, b: str, task: str | None = None) -> list[int]:
        """Return the seeds for which both variants have results (of one task, where it is given)."""
        seeds = [{run.seed for run in self.of_variant(name) if task is None or task in run.tasks} for name in (a, b)]
        return sorted(seeds[0] & seeds[1])


@dataclass(frozen=True)
class PairedSamples:
    """Documents that two variants both answered, under one and the same prompt and image."""

    frame: pd.DataFrame
    """Columns seed, doc_id, image_id, score_a, score_b; every seed holds the same documents."""
    seeds: tuple[int, ...]
    n_dropped: int
    """Documents that failed in at least one of the runs, and were left out of all of them."""


def find_study(results: Path, name: str | None = None) -> Path:
    """Return the folder of a study; without a name, that of the only or the most recently written one.

    Raises:
        StoreError: there is no study, or none of that name (those that there are are named).
    """
    known = sorted(path.parent for path in results.glob("*/study.yaml"))
    if not known:
        raise StoreError(f"no study in the results folder {results}; `prebench run` makes one")
    if name is None:
        return max(known, key=lambda folder: max(path.stat().st_mtime_ns for path in _written(folder)))
    if results / name not in known:
        hint = did_you_mean(name, [folder.name for folder in known])
        raise StoreError(f"unknown study {name!r} in the results folder {results}{hint}")
    return results / name


def _written(folder: Path) -> list[Path]:
    return [path for path in (folder / "study.yaml", folder / "scores.csv") if path.is_file()]


def load_study(folder: Path) -> Study:
    """Load a study's configuration and the results that stand.

    Raises:
        StoreError: no such study (others in the results folder are named), no result yet, a damaged record.
        ConfigError: study.yaml is malformed.
    """
    path = find_study(folder.parent, folder.name) / "study.yaml"
    config = validate(StudyConfig, read_yaml(path), str(path))
    tasks = config.suite.task_names
    loaded = [_load_run(folder, variant.name, seed, tasks) for variant in config.variants for seed in config.seeds]
    runs = {(run.variant, run.seed): run for run in loaded if run is not None}
    if not runs:
        raise StoreError(f"study {config.name!r} has no results yet; `prebench run` computes them ({folder})")
    return Study(folder, config, runs)


def _load_run(folder: Path, variant: str, seed: int, tasks: list[str]) -> Run | None:
    run = folder / "runs" / f"{variant}-s{seed}"
    paths = (run / "eval" / f"{task}.json" for task in tasks)
    records = [read_record(path, TaskRecord) for path in paths if path.is_file()]
    if not records:
        return None
    for record in records:
        if (record.variant, record.seed) != (variant, seed):
            raise StoreError(
                f"{run / 'eval' / record.task}.json: variant and seed are {record.variant!r} and {record.seed}, "
                f"but the folder says {variant!r} and {seed}; evaluate this run again"
            )
    manifest = run / "model" / "prebench.json"
    layer = read_json(manifest).get("regularizer_layer") if manifest.is_file() else None
    return Run(variant, seed, run, {record.task: record for record in records}, layer)


def _read_samples(path: Path) -> pd.DataFrame:
    try:
        records = [from_dict(SampleRecord, values) for values in read_jsonl(path)]
    except KeyError as error:
        raise StoreError(f"{path}: {error.args[0]}") from error
    frame = pd.DataFrame(
        {name: [getattr(record, name) for record in records] for name in _SAMPLE_COLUMNS},
        index=pd.Index([record.doc_id for record in records], name="doc_id"),
    )
    frame["score"] = frame["score"].astype(float)
    # A document without an image is a cluster of its own; otherwise all of them would be one cluster.
    alone = frame["image_id"] == ""
    frame.loc[alone, "image_id"] = [f"document {doc_id}" for doc_id in frame.index[alone]]
    if frame.index.has_duplicates:
        doc_id = frame.index[frame.index.duplicated()][0]
        raise StoreError(f"{path}: document {doc_id} occurs twice; delete the file to evaluate the task again")
    return frame.sort_index()


def _read_probe(path: Path) -> pd.DataFrame:
    if not path.is_file():
        return pd.DataFrame(columns=list(_PROBE_COLUMNS))
    try:
        frame = pd.read_parquet(path)
    except (OSError, ValueError) as error:
        raise StoreError(f"{path}: can't be read as Parquet ({error}); delete it to probe the run again") from error
    missing = [name for name in _PROBE_COLUMNS if name not in frame.columns]
    if missing:
        raise StoreError(f"{path}: the column {missing[0]!r} is missing; delete it to probe the run again")
    return frame


def scores_frame(study: Study) -> pd.DataFrame:
    """Return one row per (variant, seed, task, metric): the columns of `scores.csv`.

    `value` is in the task's own unit; `primary` marks the metric that the tables show; majority and blind are
    scores that need no image (NaN where unknown).
    """
    runs = (run for variant in study.variants for run in study.of_variant(variant))
    rows = [row for run in runs for record in run.tasks.values() for row in _score_rows(record)]
    return pd.DataFrame(rows, columns=list(SCORE_COLUMNS))


def _score_rows(record: TaskRecord) -> list[dict[str, Any]]:
    values: dict[str, float | None] = {record.primary_metric: record.score}
    values.update({name: value for name, value in sorted(record.metrics.items()) if name not in values})
    return [
        {
            "variant": record.variant,
            "seed": record.seed,
            "task": record.task,
            "label": record.label,
            "data_source": record.data_source,
            "metric": metric,
            "primary": metric == record.primary_metric,
            "value": np.nan if value is None else float(value),
            "n": record.n,
            "n_errors": record.n_errors,
            "majority": record.references.get("majority", np.nan),
            "blind": record.references.get("blind", np.nan),
            "weights_hash": record.hashes.get("weights", ""),
            "data_hash": record.hashes.get("data", ""),
        }
        for metric, value in values.items()
    ]


def paired_samples(study: Study, task: str, baseline: str, variant: str) -> PairedSamples:
    """Pair the documents of a task between two variants, over their common seeds.

    Documents are paired by id; prompt and image hashes must agree in all runs. A document that failed in any of
    the runs is dropped from all of them, so that every seed speaks about the same documents.

    Raises:
        ComparisonError: a variant was not run, no seed has both, or the documents, prompts or images differ (the
            first document and the counts are named).
    """
    seeds = study.common_seeds(baseline, variant, task)
    if not seeds:
        raise ComparisonError(
            f"{task}: no seed has results of both {baseline!r} and {variant!r} in study {study.name!r}"
        )
    first = study.runs[baseline, seeds[0]]
    frames = {(v, s): study.runs[v, s].samples(task) for s in seeds for v in (baseline, variant)}
    for (name, seed), frame in frames.items():
        _check_same(task, first.samples(task), f"{baseline}-s{seeds[0]}", frame, f"{name}-s{seed}")
    answered = pd.concat([frame["score"] for frame in frames.values()], axis=1).notna().all(axis=1)
    if not answered.any():
        raise ComparisonError(f"{task}: no document was scored in all runs of {baseline!r} and {variant!r}")
    parts = [
        pd.DataFrame(
            {
                "seed": seed,
                "doc_id": answered.index[answered],
                "image_id": first.samples(task).loc[answered, "image_id"].to_numpy(),
                "score_a": frames[baseline, seed].loc[answered, "score"].to_numpy(),
                "score_b": frames[variant, seed].loc[answered, "score"].to_numpy(),
            }
        )
        for seed in seeds
    ]
    return PairedSamples(pd.concat(parts, ignore_index=True), tuple(seeds), int((~answered).sum()))


def _check_same(task: str, left: pd.DataFrame, left_name: str, right: pd.DataFrame, right_name: str) -> None:
    problems = []
    only = left.index.symmetric_difference(right.index)
    if len(only):
        holder = left_name if only[0] in left.index else right_name
        counts = f"{len(left)} and {len(right)} documents, {len(only)} of them in one run only"
        problems.append(f"{counts} (first: {only[0]}, in {holder})")
    both = left.index.intersection(right.index)
    for column, what in (("prompt_hash", "prompt"), ("image_hash", "image")):
        differs = both[_differs(left, right, both, column)]
        if len(differs):
            problems.append(f"{len(differs)} of {len(both)} documents have another {what} (first: {differs[0]})")
    if problems:
        raise ComparisonError(
            f"{task}: {left_name} and {right_name} can't be paired: {'; '.join(problems)}; "
            "evaluate both on the same data with the same version"
        )


def _differs(left: pd.DataFrame, right: pd.DataFrame, both: pd.Index, column: str) -> np.ndarray:
    return left.loc[both, column].to_numpy() != right.loc[both, column].to_numpy()
