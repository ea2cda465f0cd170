"""The walk: open the study, train and export each run, evaluate and probe all of them, write the tables.

Every stage looks first at what lies on disk and does only what is missing, so the same call continues an interrupted
study and does nothing on a finished one.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from prebench.errors import StoreError, TrainingError
from prebench.progress import ProgressLine, say
from prebench.records import content_hash
from prebench.schema import StudyConfig
from prebench.study import Run, locked, open_study, plan_study, runs

CACHE = "cache"
MIRROR = "mirror"


@dataclass(frozen=True)
class Plan:
    """What a call of `prebench run` would still do."""

    train: tuple[str, ...]
    """Runs to train and export."""
    done: tuple[str, ...]
    """Runs whose exported model is complete."""
    tasks: tuple[str, ...]


def plan(folder: Path, config: StudyConfig) -> Plan:
    """Return which runs are missing; writes nothing."""
    from prebench.data.mirror import check_suite

    check_suite(config.suite)
    todo = [run for run in runs(folder, config) if not is_trained(run, config)]
    names = {run.name for run in todo}
    done = tuple(run.name for run in runs(folder, config) if run.name not in names)
    return Plan(tuple(run.name for run in todo), done, tuple(config.suite.task_names))


def run_study(folder: Path, requested: StudyConfig) -> list[Path]:
    """Carry a study through every stage and return the paths of its tables and figures.

    Raises:
        PrebenchError: bad input, a study made with another configuration, a failed stage; nothing computed is lost.
    """
    from prebench.data.mirror import check_suite

    check_suite(plan_study(folder, requested).suite)
    with locked(folder):
        config = open_study(folder, requested)
        train_all(folder, config)
        evaluate_all(folder, config, config.suite.task_names)
        return write_report(folder)


def train_all(folder: Path, config: StudyConfig) -> None:
    """Train and export the runs that are missing; the frozen tower's features are computed once for all of them."""
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise TrainingError("several processes per study are not supported; start prebench without a launcher")
    write_manifest(folder)
    todo = [run for run in runs(folder, config) if not is_trained(run, config)]
    if not todo:
        say("train: every run is trained already")
        return
    from prebench.model.builder import build_processor, build_tokenizer
    from prebench.runtime import prepare_cpu
    from prebench.train.loop import TrainingInputs

    prepare_cpu()
    from prebench.data.examples import TrainingData

    data = TrainingData(config.preset.data)
    processor = build_processor(config.preset.model.vision_tower, build_tokenizer())
    features = _features(folder, config, processor, data)
    inputs = TrainingInputs(data=data, processor=processor, features=features)
    for run in todo:
        _train_run(run, config, inputs)


def is_trained(run: Run, config: StudyConfig) -> bool:
    """Tell whether the run's export is complete and intact.

    Raises:
        StoreError: the export was made with another configuration, from other pretrained parts, in another precision,
            or its weights changed since.
    """
    from prebench.export import MANIFEST, read_manifest, weights_hash

    if not (run.model_dir / MANIFEST).is_file():
        return False
    manifest = read_manifest(run.model_dir)
    expected = content_hash(config.run_config(run.variant, run.seed))
    if manifest["config_hash"] != expected:
        raise StoreError(f"{run.model_dir}: trained with another configuration; delete {run.folder} to train it again")
    for name, value in _origin(config).items():
        if manifest[name] != value:
            raise StoreError(
                f"{run.model_dir}: trained with {name} {manifest[name]}, but here it is {value}; a comparison would be "
                f"unfair. Take another --name, or delete {run.folder} to train it again"
            )
    if weights_hash(run.model_dir) != manifest["weights_hash"]:
        raise StoreError(
            f"{run.model_dir}: the weights differ from their manifest (damaged or edited); delete {run.folder} to "
            "train this run again"
        )
    return True


def _origin(config: StudyConfig) -> dict[str, str]:
    """Return what decides a run's weights besides its configuration: pretrained parts and numeric precision."""
    from prebench.model.builder import parts_hash

    return {"parts_hash": parts_hash(config.preset.model), "dtype": _dtype(config)}


def _dtype(config: StudyConfig) -> str:
    from prebench.runtime import choose_device, choose_dtype

    recipe = config.preset.train
    return str(choose_dtype(recipe.dtype, choose_device(recipe.device))).removeprefix("torch.")


def evaluate_all(folder: Path, config: StudyConfig, tasks: Sequence[str]) -> None:
    """Evaluate and probe every run on the named tasks, in one subprocess whose working directory is the mirror."""
    from prebench.data.mirror import build_mirror
    from prebench.evaluation.runner import evaluate_study

    chosen = config.suite.model_copy(update={"tasks": tuple(t for t in config.suite.tasks if t.task in tasks)})
    if config.suite.probe is not None and config.suite.probe.task not in tasks:
        chosen = chosen.model_copy(update={"probe": None})
    mirror = folder / MIRROR
    trained = [run for run in runs(folder, config) if is_trained(run, config)]
    if not trained:
        raise StoreError(f"{folder}: no run is trained yet; `prebench train --study {folder.name}` does that")
    write_manifest(folder)
    manifest = build_mirror(mirror, config.suite)
    evaluate_study(
        trained,
        chosen,
        mirror,
        manifest,
        folder / CACHE,
        device=config.preset.train.device,
        dtype=_dtype(config),
    )


def write_report(folder: Path) -> list[Path]:
    """Rebuild scores, tables and figures from the records."""
    from prebench.analysis.join import load_study
    from prebench.analysis.plots import layer_curves
    from prebench.analysis.tables import write_tables

    study = load_study(folder)
    figure = folder / "figures" / "layer_curves.svg"
    layer_curves(study, figure)
    return [*write_tables(study), figure]


def write_manifest(folder: Path) -> None:
    """Record where the study was made; a study continued elsewhere keeps one entry per place."""
    from prebench.runtime import git_commit, hardware, versions
    from prebench.store import read_json, write_json

    path = folder / "manifest.json"
    entry = {"versions": versions(), "git_commit": git_commit(), "hardware": hardware()}
    entries = read_json(path) if path.is_file() else []
    if entry not in entries:
        write_json(path, [*entries, entry])


def _features(folder: Path, config: StudyConfig, processor: Any, data: Any) -> Any:
    from prebench.model.builder import build_model
    from prebench.train.features import cached_features

    stages = (config.preset.train.align, config.preset.train.instruct)
    frozen = any(stage.steps > 0 and "vision_tower" not in stage.trainable for stage in stages)
    if not (config.preset.train.cache_vision_features and frozen):
        return None
    model = build_model(config.preset.model, processor.tokenizer, seed=config.seeds[0])
    with ProgressLine("vision features", len(data.image_ids), "image") as line:
        return cached_features(folder / CACHE, model, processor, data, lambda done, _total: line.update(done))


def _train_run(run: Run, config: StudyConfig, inputs: Any) -> None:
    from prebench.export import export
    from prebench.model.builder import build_model
    from prebench.model.visual_states import num_layers
    from prebench.train.loop import build_regularizer, train

    variant = next(v for v in config.variants if v.name == run.variant)
    recipe = config.preset.train
    seed = config.training_seed(run.variant, run.seed)
    model = build_model(config.preset.model, inputs.processor.tokenizer, seed)
    regularizer = build_regularizer(variant.regularizer, model, seed)
    started = time.perf_counter()
    last: dict[str, Any] = {}
    total = recipe.align.steps + recipe.instruct.steps
    log_path = run.folder / "train.jsonl"
    with _open_log(log_path) as log_file, ProgressLine(f"train {run.name}", total) as line:

        def log(entry: dict[str, Any]) -> None:
            last.update(entry)
            _write_line(log_file, log_path, entry)
            done = entry["step"] + 1 + (recipe.align.steps if entry["stage"] == "instruct" else 0)
            pre = "" if entry["pre_loss"] is None else f", pre_loss {entry['pre_loss']:.3f}"
            line.update(done, f"{entry['stage']}: lm_loss {entry['lm_loss']:.3f}{pre}")

        train(model, regularizer, recipe, inputs, seed, log)
    manifest = {
        "variant": run.variant,
        "seed": run.seed,
        "training_seed": seed,
        "config_hash": content_hash(config.run_config(run.variant, run.seed)),
        **_origin(config),
        "data_hash": inputs.data.fingerprint(),
        "num_layers": num_layers(model),
        "regularizer_layer": None if regularizer is None else regularizer.layer,
        "lm_loss": last.get("lm_loss"),
        "pre_loss": last.get("pre_loss"),
        "train_seconds": round(time.perf_counter() - started, 1),
    }
    export(model, inputs.processor, run.model_dir, manifest)


def _write_line(file: Any, path: Path, entry: dict[str, Any]) -> None:
    try:
        rest = (json.dumps(entry, sort_keys=True) + "\n").encode()
        while rest:
            rest = rest[file.write(rest) :]
    except OSError as error:
        raise StoreError(f"{path}: can't be written ({error.strerror}); the runs finished so far are kept") from error


def _open_log(path: Path) -> Any:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        return path.open("wb", buffering=0)  # a buffer would fail once more when it is closed, and hide the reason
    except OSError as error:
        raise StoreError(f"{path}: can't be written ({error.strerror})") from error
