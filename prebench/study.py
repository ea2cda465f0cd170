"""A study on disk: opening, extending, or refusing it. One process works on a study at a time; several may train runs.

The configuration of what was computed never changes under a study's name: seeds, variants and tasks can be added; a
changed preset, variant or task is refused with the difference.
"""

from __future__ import annotations

import fcntl
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from prebench.config import diff, dump_yaml, read_yaml, validate
from prebench.errors import StoreError, StudyMismatchError
from prebench.runtime import process_index
from prebench.schema import StudyConfig, SuiteConfig
from prebench.store import TEMPORARY, write_text

STUDY_FILE = "study.yaml"
LOCK_FILE = ".lock"
CHECKPOINTS = "checkpoints"
"""In a run's folder, until the run is exported."""
SNAPSHOTS = "snapshots"
"""In a run's folder: a folder `step-<instruct steps done>` like a run's for each."""
STEP = "step-"
MAX_DIFF_LINES = 8


@dataclass(frozen=True)
class Run:
    """One variant with one seed, or a snapshot of it."""

    variant: str
    seed: int
    folder: Path
    step: int | None = None
    """Instruct steps done at a snapshot; None for the run itself."""

    @property
    def name(self) -> str:
        """Return the run's folder name; of a snapshot the step, too."""
        return f"{self.variant}-s{self.seed}" + ("" if self.step is None else f" after step {self.step}")

    @property
    def model_dir(self) -> Path:
        """Return the exported Hugging Face folder."""
        return self.folder / "model"


def runs(folder: Path, config: StudyConfig) -> list[Run]:
    """Return the study's runs, seed by seed, so that an interrupted study has whole seeds to compare."""
    return [
        Run(variant.name, seed, folder / "runs" / f"{variant.name}-s{seed}")
        for seed in config.seeds
        for variant in config.variants
    ]


def snapshot_folder(run: Path, step: int) -> Path:
    """Return the folder of a run's snapshot."""
    return run / SNAPSHOTS / f"{STEP}{step}"


def snapshots(run: Run, config: StudyConfig) -> list[Run]:
    """Return the run's snapshots whose models are there, by step; those of a finished study may be deleted."""
    found = [
        Run(run.variant, run.seed, snapshot_folder(run.folder, step), step)
        for step in config.preset.train.snapshot_steps
    ]
    return [snapshot for snapshot in found if (snapshot.model_dir / "prebench.json").is_file()]


def read_study(folder: Path) -> StudyConfig:
    """Read `study.yaml`.

    Raises:
        StoreError: there is no study here.
    """
    path = folder / STUDY_FILE
    if not path.is_file():
        raise StoreError(f"{folder}: no study here (no {STUDY_FILE})")
    return validate(StudyConfig, read_yaml(path), str(path))


def open_study(folder: Path, requested: StudyConfig) -> StudyConfig:
    """Create the study, or extend the one on disk by the requested seeds, variants and tasks.

    Raises:
        StudyMismatchError: what is on disk was made with another preset, variant, task or probe.
        StoreError: the folder can't be written.
    """
    config = plan_study(folder, requested)
    text = dump_yaml(config)
    path = folder / STUDY_FILE
    if not path.is_file() or path.read_text(encoding="utf-8") != text:
        write_text(path, text)
    return config


def plan_study(folder: Path, requested: StudyConfig) -> StudyConfig:
    """Return what `open_study` would make of the request, writing nothing."""
    if not (folder / STUDY_FILE).is_file():
        return requested
    found = read_study(folder)
    return extend(found, requested, folder)


def extend(found: StudyConfig, requested: StudyConfig, folder: Path) -> StudyConfig:
    """Return the union of two configurations that agree on everything they share."""
    lines = list(_conflicts(found, requested))
    if lines:
        shown = "; ".join(lines[:MAX_DIFF_LINES]) + ("; ..." if len(lines) > MAX_DIFF_LINES else "")
        raise StudyMismatchError(
            f"{folder}: this study was made with another configuration: {shown}. "
            "Take another --name, or the configuration of the study"
        )
    names = {variant.name for variant in found.variants}
    tasks = {task.task for task in found.suite.tasks}
    suite = found.suite.model_copy(
        update={
            "tasks": (*found.suite.tasks, *(t for t in requested.suite.tasks if t.task not in tasks)),
            "probe": found.suite.probe or requested.suite.probe,
        }
    )
    return found.model_copy(
        update={
            "suite": suite,
            "variants": (*found.variants, *(v for v in requested.variants if v.name not in names)),
            "seeds": tuple(dict.fromkeys((*found.seeds, *requested.seeds))),
        }
    )


def _conflicts(found: StudyConfig, requested: StudyConfig) -> Iterator[str]:
    yield from diff(_comparable(found.preset), _comparable(requested.preset), "preset")
    variants = {v.name: v for v in found.variants}
    for variant in requested.variants:
        if variant.name in variants:
            yield from diff(_comparable(variants[variant.name]), _comparable(variant), f"variant {variant.name}")
    yield from _suite_conflicts(found.suite, requested.suite)


def _suite_conflicts(found: SuiteConfig, requested: SuiteConfig) -> Iterator[str]:
    tasks = {task.task: task for task in found.tasks}
    for task in requested.tasks:
        if task.task in tasks:
            yield from diff(tasks[task.task].model_dump(), task.model_dump(), f"task {task.task}")
    if found.probe is not None and requested.probe is not None:
        yield from diff(_comparable(found.probe), _comparable(requested.probe), "probe")
    if found.mirror_seed != requested.mirror_seed:
        yield f"suite.mirror_seed: {found.mirror_seed} -> {requested.mirror_seed}"


def _comparable(model: object) -> dict[str, object]:
    dumped: dict[str, object] = model.model_dump(mode="json")  # type: ignore[attr-defined]
    dumped.pop("description", None)
    return dumped


def _remove_leftovers(folder: Path) -> None:
    """Remove the halves that killed processes left."""
    for pattern in (".mirror.partial", ".launch-*"):
        for path in folder.glob(pattern):
            shutil.rmtree(path, ignore_errors=True)
    for path in folder.glob(f"cache/.*{TEMPORARY}"):
        path.unlink(missing_ok=True)
    for run in folder.glob("runs/*"):
        _remove_leftovers_of_run(run)


def _remove_leftovers_of_run(run: Path) -> None:
    """Remove what killed processes left in a run's folder, and its checkpoints once it is finished."""
    if (run / "model" / "prebench.json").is_file():
        shutil.rmtree(run / CHECKPOINTS, ignore_errors=True)  # models can be large
    for pattern in (".export-*", ".probe-*", "snapshots/*/.export-*", "snapshots/*/.probe-*"):
        for path in run.glob(pattern):
            shutil.rmtree(path, ignore_errors=True)
    for parent in ("", "eval/", "snapshots/*/", "snapshots/*/eval/"):
        for path in run.glob(f"{parent}.*{TEMPORARY}"):
            path.unlink(missing_ok=True)


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold the study for one process, or for all processes of one launcher: process 0 takes the lock.

    Raises:
        StoreError: another process works on it, or the folder can't be written.
    """
    with _held(folder, fcntl.LOCK_EX, "another prebench process works on this study; wait for it"):
        if process_index() == 0:
            _remove_leftovers(folder)
        yield


@contextmanager
def shared(folder: Path) -> Iterator[None]:
    """Hold the study as it is, beside other processes that train other runs of it; as `locked` else.

    Raises:
        StoreError: a process works on the whole study, or the folder can't be written.
    """
    with _held(folder, fcntl.LOCK_SH, "another prebench process works on this study; wait for it"):
        yield


@contextmanager
def run_locked(run: Run) -> Iterator[None]:
    """Hold one run of the study; as `locked` else.

    Raises:
        StoreError: another process trains it, or the folder can't be written.
    """
    busy = "another prebench process trains this run; wait for it, or name others with --run"
    with _held(run.folder, fcntl.LOCK_EX, busy):
        if process_index() == 0:
            _remove_leftovers_of_run(run.folder)
        yield


@contextmanager
def in_turn(folder: Path) -> Iterator[None]:
    """Wait until no other process is inside this block with the same folder; as `locked` else.

    Raises:
        StoreError: the folder can't be written.
    """
    with _held(folder, fcntl.LOCK_EX, None):
        yield


@contextmanager
def _held(folder: Path, kind: int, busy: str | None) -> Iterator[None]:
    """Hold a folder's lock file; `busy` is what to say where another process holds it, None waits."""
    if process_index() > 0:
        yield
        return
    try:
        folder.mkdir(parents=True, exist_ok=True)
        handle = os.open(folder / LOCK_FILE, os.O_RDWR | os.O_CREAT, 0o644)
    except OSError as error:
        raise StoreError(
            f"{folder}: can't be written ({error.strerror}); choose another folder with --results"
        ) from error
    try:
        try:
            fcntl.flock(handle, kind if busy is None else kind | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise StoreError(f"{folder}: {busy}") from error
        except OSError as error:
            raise StoreError(
                f"{folder}: this file system can't lock files ({error.strerror}), so that two processes could write "
                "one study; mount it with locks (Lustre: -o flock), or choose another folder with --results"
            ) from error
        yield
    finally:
        os.close(handle)
