"""Read a study folder and join its records: tidy scores, and documents paired between two variants.

Only records are read; a run that has not been evaluated yet is simply absent.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from prebench.config import read_yaml, validate
from prebench.errors import ComparisonError, StoreError, did_you_mean
from prebench.records import PROBE_FILE, PROBE_HASHES, ProbeRow, SampleRecord, TaskRecord, from_dict
from prebench.schema import StudyConfig, TaskConfig, VariantConfig
from prebench.store import read_json, read_jsonl, read_record

SCORE_COLUMNS = (
    "variant", "seed", "task", "label", "data_source", "metric", "primary", "value", "n", "n_errors",
    "majority", "blind", "weights_hash", "data_hash",
)  # fmt: skip
_PROBE_COLUMNS = {f.name: f.default for f in dataclasses.fields(ProbeRow)}
_SAMPLE_COLUMNS = ("image_id", "prompt_hash", "image_hash", "score", "question_type", "blind_score")


@dataclass(frozen=True)
class Run:
    """One variant x seed with at least one result. Samples and probes are read when asked for, once."""

    variant: str
    seed: int
    folder: Path
    tasks: dict[str, TaskRecord]
    regularised_layers: tuple[int, ...]
    """The layers whose states the regularizer changed; none without one, or with weight 0, which only logs."""
    lm_loss: float | None = None
    """Training loss of the text at the last logged step, in nats per token; None where the export does not say."""
    probe_hashes: Mapping[str, str] | None = None
    """What made probe.parquet; None where it was not probed, or does not say."""
    _cache: dict[str, pd.DataFrame] = field(default_factory=dict, repr=False, compare=False)

    def samples(self, task: str) -> pd.DataFrame:
        """Return the documents of a task that count: of those that count only together, the first.

        Returns:
            Index doc_id; columns image_id, prompt_hash, image_hash, score (NaN: failed), question_type ("": not
            known) and blind_score (NaN: not known).

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
            self._cache[""] = _read_probe(self.folder / PROBE_FILE)
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
        # A stored reference study has tables but no runs: it is found by its name alone.
        computed = [folder for folder in known if (folder / "runs").is_dir()] or known
        return max(computed, key=lambda folder: max(path.stat().st_mtime_ns for path in _written(folder)))
    if results / name not in known:
        hint = did_you_mean(name, [folder.name for folder in known])
        raise StoreError(f"unknown study {name!r} in the results folder {results}{hint}")
    return results / name


def _written(folder: Path) -> list[Path]:
    return [path for path in (folder / "study.yaml", folder / "scores.csv") if path.is_file()]


def load_study(folder: Path) -> Study:
    """Load a study's configuration and the results that stand.

    Raises:
        StoreError: no such study (others in the results folder are named), no result yet, a damaged record, or a run
            whose records were made with different weights.
        ConfigError: study.yaml is malformed.
    """
    path = find_study(folder.parent, folder.name) / "study.yaml"
    config = validate(StudyConfig, read_yaml(path), str(path))
    keys = [(variant, seed) for variant in config.variants for seed in config.seeds]
    loaded = [load_run(folder / "runs" / f"{variant.name}-s{seed}", config, variant, seed) for variant, seed in keys]
    runs = {(run.variant, run.seed): run for run in loaded if run is not None}
    if not runs:
        raise StoreError(f"study {config.name!r} has no results yet; `prebench run` computes them ({folder})")
    return Study(folder, config, runs)


def load_run(run: Path, config: StudyConfig, variant: VariantConfig, seed: int) -> Run | None:
    """Return the results of a run, or of a snapshot; None where there are none."""
    paths = (run / "eval" / f"{task.task}.json" for task in config.suite.tasks)
    records = [read_record(path, TaskRecord) for path in paths if path.is_file()]
    probe = run / PROBE_FILE
    probed = config.suite.probe is not None and probe.is_file()
    if not records and not probed:
        return None
    for record in records:
        if (record.variant, record.seed) != (variant.name, seed):
            raise StoreError(
                f"{run / 'eval' / record.task}.json: variant and seed are {record.variant!r} and {record.seed}, "
                f"but the folder says {variant.name!r} and {seed}; evaluate this run again"
            )
    hashes = {record.task: record.hashes for record in records}
    found = _probe_hashes(probe) if probed else None
    _check_weights(run.name, hashes if found is None else hashes | {PROBE_FILE: found})
    manifest = run / "model" / "prebench.json"
    layers = _regularised_layers(manifest, variant)
    tasks = {record.task: record for record in records}
    return Run(variant.name, seed, run, tasks, layers, _lm_loss(manifest), found)


def _check_weights(run: str, hashes: dict[str, dict[str, str]]) -> None:
    """Refuse results of one run that different weights made, as after training again and an evaluation cut short."""
    weights = {name: values.get("weights") for name, values in hashes.items()}
    if len(set(weights.values())) > 1:
        first = next(iter(weights))
        other = next(name for name in weights if weights[name] != weights[first])
        raise StoreError(
            f"run {run}: records of different weights ({first}: {weights[first] or 'no hash'}, "
            f"{other}: {weights[other] or 'no hash'}); `prebench evaluate` computes them again"
        )


def _probe_hashes(path: Path) -> dict[str, str] | None:
    import pyarrow.parquet as pq

    try:
        metadata = pq.read_schema(path).metadata or {}
        found = json.loads(metadata[PROBE_HASHES]) if PROBE_HASHES in metadata else None
    except (OSError, ValueError) as error:
        raise StoreError(f"{path}: can't be read as Parquet ({error}); delete it to probe the run again") from error
    if found is not None and not isinstance(found, dict):
        raise StoreError(f"{path}: the hashes in its metadata are no JSON object; delete it to probe the run again")
    return found


def _regularised_layers(manifest: Path, variant: VariantConfig) -> tuple[int, ...]:
    if variant.regularizer is None or variant.regularizer.weight == 0 or not manifest.is_file():
        return ()
    values = read_json(manifest)
    found = values.get("regularizer_layer") if isinstance(values, dict) else None
    layers = found if isinstance(found, list) else [found]
    if not all(isinstance(layer, int) for layer in layers):
        raise StoreError(
            f"{manifest}: the whole number 'regularizer_layer' is missing; delete {manifest.parent} to train it again"
        )
    return tuple(layers)


def _lm_loss(manifest: Path) -> float | None:
    values = read_json(manifest) if manifest.is_file() else {}
    loss = values.get("lm_loss") if isinstance(values, dict) else None
    return float(loss) if isinstance(loss, int | float) else None


def _read_samples(path: Path) -> pd.DataFrame:
    try:
        records = [record for values in read_jsonl(path) if (record := from_dict(SampleRecord, values)).counts]
    except KeyError as error:
        raise StoreError(f"{path}: {error.args[0]}") from error
    frame = pd.DataFrame(
        {name: [getattr(record, name) for record in records] for name in _SAMPLE_COLUMNS},
        index=pd.Index([record.doc_id for record in records], name="doc_id"),
    )
    frame = frame.astype({"score": float, "blind_score": float})
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
    if any(_PROBE_COLUMNS[name] is dataclasses.MISSING for name in missing):
        raise StoreError(f"{path}: the column {missing[0]!r} is missing; delete it to probe the run again")
    return frame.assign(**dict.fromkeys(missing, np.nan))  # a file of an older version


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

    Documents are paired by id. One that failed in any of the runs is dropped from all of them, so that every seed
    speaks about the same documents; of the others prompt and image hashes must agree in all runs.

    Raises:
        ComparisonError: a variant was not run, no seed has both, the runs were evaluated with other data, prompts or
            settings, or their documents, prompts or images differ (the first document and the counts are named).
    """
    seeds = study.common_seeds(baseline, variant, task)
    if not seeds:
        raise ComparisonError(
            f"{task}: no seed has results of both {baseline!r} and {variant!r} in study {study.name!r}"
        )
    first = study.runs[baseline, seeds[0]]
    runs = [study.runs[name, seed] for seed in seeds for name in (baseline, variant)]
    for run in runs:
        _check_hashes(task, first, run)
    frames = {(run.variant, run.seed): run.samples(task) for run in runs}
    answered = pd.concat([frame["score"] for frame in frames.values()], axis=1).notna().all(axis=1)
    for run in runs:
        _check_documents(task, first, run, answered.index[answered])
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


def gain(base: Run, run: Run, task: str) -> float | None:
    """Return run's score minus base's; None unless both were scored on equal data, prompts and settings."""
    pair = [found.tasks.get(task) for found in (base, run)]
    if any(record is None or record.score is None for record in pair):
        return None
    left, right = (record for record in pair if record is not None)
    if not same_origin(left.hashes, right.hashes):
        return None
    return float(right.score or 0.0) - float(left.score or 0.0)


def same_origin(left: Mapping[str, str] | None, right: Mapping[str, str] | None) -> bool:
    """Tell whether two results came from equal data, prompts and settings; their weights may differ."""
    plain = [{k: v for k, v in (hashes or {}).items() if k != "weights"} for hashes in (left, right)]
    return plain[0] == plain[1]


def _check_hashes(task: str, left: Run, right: Run) -> None:
    # Weights differ between runs by nature; whether they are known must not.
    found = [run.tasks[task].hashes for run in (left, right)]
    plain = [{name: value if name != "weights" else "known" for name, value in hashes.items()} for hashes in found]
    differs = sorted(name for name in plain[0].keys() | plain[1].keys() if plain[0].get(name) != plain[1].get(name))
    if differs:
        raise ComparisonError(
            f"{task}: {left.folder.name} and {right.folder.name} can't be paired: the hashes of {', '.join(differs)} "
            "differ; `prebench evaluate` evaluates again what is out of date"
        )


def _check_documents(task: str, first: Run, run: Run, answered: pd.Index) -> None:
    left, right = first.samples(task), run.samples(task)
    problems = []
    only = left.index.symmetric_difference(right.index)
    if len(only):
        holder = first if only[0] in left.index else run
        counts = f"{len(left)} and {len(right)} documents, {len(only)} of them in one run only"
        problems.append(f"{counts} (first: {only[0]}, in {holder.folder.name})")
    # A document may have failed before it had a prompt or an image; it is dropped, whatever its hashes.
    for column, what in (("prompt_hash", "prompt"), ("image_hash", "image")):
        unequal = left.loc[answered, column].to_numpy() != right.loc[answered, column].to_numpy()
        differs = answered[unequal]
        if len(differs):
            problems.append(f"{len(differs)} of {len(answered)} documents have another {what} (first: {differs[0]})")
    if problems:
        raise ComparisonError(
            f"{task}: {first.folder.name} and {run.folder.name} can't be paired: {'; '.join(problems)}; "
            "evaluate both on the same data with the same version"
        )
