"""The walk: open the study, train and export each run, evaluate and probe all of them, write the tables.

Every stage looks first at what lies on disk and does only what is missing, so the same call continues an interrupted
study and does nothing on a finished one.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from prebench.errors import ConfigError, StoreError, did_you_mean
from prebench.jobs import choose_jobs
from prebench.launch import launched, train_command
from prebench.progress import say
from prebench.records import content_hash
from prebench.runtime import leave_launcher, process_index
from prebench.schema import StudyConfig, SuiteConfig
from prebench.study import Run, in_turn, locked, open_study, plan_study, run_locked, runs, shared, snapshots

MIRROR = "mirror"
ANSWERS = ".answers"
"""Beside the studies: the answers of the same weights serve them all."""
MIRROR_VARIABLE = "PREBENCH_MIRROR"
HASHED_FILES = "mirror-files.json"
"""In the study's cache: which files of a user's mirror were hashed, so that gigabytes are read once per study."""


@dataclass(frozen=True)
class Plan:
    """What a call of `prebench run` would still do."""

    train: tuple[str, ...]
    """Runs to train and export."""
    done: tuple[str, ...]
    """Runs whose exported model is complete."""
    tasks: tuple[str, ...]


def plan(folder: Path, config: StudyConfig, mirror: Path | None = None) -> Plan:
    """Return which runs are missing; writes nothing."""
    choose_mirror(config.suite, config.suite.task_names, mirror)
    todo = [run for run in runs(folder, config) if not is_trained(run, config)]
    names = {run.name for run in todo}
    done = tuple(run.name for run in runs(folder, config) if run.name not in names)
    return Plan(tuple(run.name for run in todo), done, tuple(config.suite.task_names))


def choose_mirror(suite: SuiteConfig, tasks: Sequence[str], named: Path | None) -> Path | None:
    """Return the user's mirror that a suite is read from, None where the study makes its own; libraries stay offline.

    Args:
        suite: the study's.
        tasks: those of it that will be evaluated.
        named: on the command line; else, where the suite has real benchmarks, PREBENCH_MIRROR counts.

    Raises:
        ConfigError: the suite needs a user's mirror and none is named, or no embedded data can serve a task.
        DataError: the mirror lacks a task, or holds other data than the suite asks for.
    """
    from prebench.data.mirror import check_suite, hub_tasks, open_mirror

    variable = os.environ.get(MIRROR_VARIABLE)
    folder = Path(variable) if named is None and variable and hub_tasks(suite) else named
    if folder is None:
        check_suite(suite)
        return None
    os.environ.update({"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"})
    open_mirror(folder, suite, tasks)
    return folder


def run_study(
    folder: Path,
    requested: StudyConfig,
    jobs: int | None = None,
    mirror: Path | None = None,
    launch: str | None = None,
) -> list[Path]:
    """Carry a study through every stage and return the paths of its tables and figures.

    Where a launcher started several processes, all of them train; process 0 does the rest, and the others return [].

    Args:
        folder: the study.
        requested: what it is to hold.
        jobs: processes; None chooses by cores and memory.
        mirror: the user's folder with real benchmarks; see `choose_mirror`.
        launch: starts the training's processes (`prebench.launch`); None trains here.

    Raises:
        PrebenchError: bad input, a study made with another configuration, a failed stage; nothing computed is lost.
    """
    planned = plan_study(folder, requested)
    mirror = choose_mirror(planned.suite, planned.suite.task_names, mirror)
    if process_index() > 0:
        train_all(folder, planned, jobs)
        return []
    if launch is not None:
        train_command(launch, folder, ())  # a launcher that is not there is named before a study is made
        with locked(folder):
            config = open_study(folder, requested)
        train_launched(folder, config, launch)
    with locked(folder):
        config = open_study(folder, requested)
        if launch is None:
            train_all(folder, config, jobs)
        leave_launcher()
        evaluate_all(folder, config, config.suite.task_names, jobs, mirror)
        return write_report(folder, mirror)


def prepare(folder: Path, requested: StudyConfig) -> None:
    """Make a study and the caches that its runs share, and train nothing: jobs that train runs side by side come next.

    Args:
        folder: the study.
        requested: what it is to hold.
    """
    from prebench.train_runs import prepare_inputs

    with locked(folder):
        config = open_study(folder, requested)
        write_manifest(folder)
        prepare_inputs(folder, config)


def train_launched(folder: Path, config: StudyConfig, launch: str, names: Sequence[str] = ()) -> None:
    """Train the missing runs, or those of them that are named, in the processes of a launcher.

    Args:
        folder: the study.
        config: its configuration.
        launch: the launcher's words, such as "accelerate launch --num_processes 8".
        names: runs.
    """
    command = train_command(launch, folder, names)
    if all(is_trained(run, config) for run in chosen_runs(folder, config, names)):
        say("train: every run is trained already")
        return
    with shared(folder):
        launched(command, folder)


def chosen_runs(folder: Path, config: StudyConfig, names: Sequence[str] = ()) -> list[Run]:
    """Return the study's runs, or those that are named.

    Raises:
        ConfigError: there is no such run.
    """
    found = {run.name: run for run in runs(folder, config)}
    for name in names:
        if name not in found:
            raise ConfigError(f"--run: unknown run {name!r}{did_you_mean(name, found)}")
    return [run for run in found.values() if not names or run.name in names]


def train_all(folder: Path, config: StudyConfig, jobs: int | None = None, names: Sequence[str] = ()) -> None:
    """Train and export the runs that are missing: several at a time, or each with all processes of a launcher.

    Args:
        folder: the study.
        config: its configuration.
        jobs: processes; None chooses by cores and memory (`prebench.jobs.choose_jobs`).
        names: runs; none: all.

    Raises:
        StoreError: another process trains one of the runs.
    """
    write_manifest(folder)
    todo = [run for run in chosen_runs(folder, config, names) if not is_trained(run, config)]
    if not todo:
        say("train: every run is trained already")
        return
    from prebench.train_runs import train_runs

    with ExitStack() as held:
        for run in todo:
            held.enter_context(run_locked(run))
        # Another process may have finished one before this one could hold it.
        train_runs(folder, config, [run for run in todo if not is_trained(run, config)], jobs)


def is_trained(run: Run, config: StudyConfig) -> bool:
    """Tell whether the run's export is complete and intact.

    Raises:
        StoreError: the export was made with another configuration, from other pretrained parts, in another precision,
            or its weights changed since.
    """
    from prebench.export import MANIFEST, read_manifest, weights_hash
    from prebench.train_runs import origin

    if not (run.model_dir / MANIFEST).is_file():
        return False
    manifest = read_manifest(run.model_dir)
    expected = content_hash(config.run_config(run.variant, run.seed))
    if manifest["config_hash"] != expected:
        raise StoreError(f"{run.model_dir}: trained with another configuration; delete {run.folder} to train it again")
    for name, value in origin(config).items():
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


def evaluate_all(
    folder: Path, config: StudyConfig, tasks: Sequence[str], jobs: int | None = None, mirror: Path | None = None
) -> None:
    """Evaluate and probe every run on the named tasks, in subprocesses whose working directory is the mirror.

    Args:
        folder: the study.
        config: its configuration.
        tasks: lmms-eval ids of the suite.
        jobs: processes; None chooses by cores and memory.
        mirror: the user's folder with real benchmarks; see `choose_mirror`.
    """
    from prebench.evaluation.runner import evaluate_study
    from prebench.runtime import choose_device, visible_gpus
    from prebench.train_runs import CACHE, dtype_name

    chosen = config.suite.model_copy(update={"tasks": tuple(t for t in config.suite.tasks if t.task in tasks)})
    if config.suite.probe is not None and config.suite.probe.task not in tasks:
        chosen = chosen.model_copy(update={"probe": None})
    mirror = choose_mirror(config.suite, tasks, mirror)
    trained = [run for run in runs(folder, config) if is_trained(run, config)]
    if not trained:
        raise StoreError(f"{folder}: no run is trained yet; `prebench train --study {folder.name}` does that")
    kept = [found for run in trained for found in snapshots(run, config)]
    models = [*trained, *(snapshot for snapshot in kept if is_trained(snapshot, config))]
    write_manifest(folder)
    manifest = _mirror_manifest(folder, config.suite, tasks, mirror)
    recipe = config.preset.train
    device = choose_device(recipe.device).type
    gpus = len(visible_gpus()) if device == "cuda" else None
    evaluate_study(
        models,
        chosen,
        mirror or folder / MIRROR,
        manifest,
        folder / CACHE,
        answers=folder.parent / ANSWERS,
        device=recipe.device,
        dtype=dtype_name(config),
        cpu_threads=recipe.cpu_threads,
        jobs=choose_jobs(jobs or gpus, len(models) * len(tasks), recipe.cpu_threads, device),
    )


def _mirror_manifest(folder: Path, suite: SuiteConfig, tasks: Sequence[str], mirror: Path | None) -> dict[str, Any]:
    """Return what lies in the mirror: the study's own, made where it is missing, or the user's, every file checked."""
    from prebench.data.mirror import build_mirror, open_mirror
    from prebench.store import read_json, write_json
    from prebench.train_runs import CACHE

    if mirror is None:
        return build_mirror(folder / MIRROR, suite)
    path = folder / CACHE / HASHED_FILES
    hashed = read_json(path) if path.is_file() else {}
    manifest = open_mirror(mirror.resolve(), suite, tasks, hashed)
    write_json(path, hashed)
    return manifest


def write_report(folder: Path, mirror: Path | None = None) -> list[Path]:
    """Rebuild scores, tables, figures and report.html from the records.

    Args:
        folder: the study.
        mirror: the user's folder with real benchmarks, for the pictures; where the study has no mirror of its own,
            PREBENCH_MIRROR by default.
    """
    from prebench.analysis.join import load_study
    from prebench.analysis.plots import write_figures
    from prebench.analysis.report import write_page
    from prebench.analysis.tables import write_tables

    study = load_study(folder)
    own = folder / MIRROR
    pictures = mirror or (own if own.is_dir() else Path(os.environ.get(MIRROR_VARIABLE) or own))
    return [*write_tables(study), *write_figures(study), write_page(study, pictures)]


def write_manifest(folder: Path) -> None:
    """Record where the study was made; a study continued elsewhere keeps one entry per place."""
    from prebench.runtime import git_commit, hardware, versions
    from prebench.store import read_json, write_json
    from prebench.train_runs import CACHE

    if process_index() > 0:
        return
    path = folder / "manifest.json"
    entry = {"versions": versions(), "git_commit": git_commit(), "hardware": hardware()}
    with in_turn(folder / CACHE):
        entries = read_json(path) if path.is_file() else []
        if entry not in entries:
            write_json(path, [*entries, entry])
