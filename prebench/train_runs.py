"""From a study's configuration to trained and exported runs, one after the other or several at a time.

A run never depends on how many others train beside it: each has its own process state, and the number of threads
belongs to the preset.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from prebench.errors import InterruptedRunError
from prebench.jobs import Job, Report, choose_jobs, run_jobs
from prebench.progress import ProgressLine, say
from prebench.records import content_hash
from prebench.schema import StudyConfig, installed_regularizer, package_of
from prebench.study import CHECKPOINTS, Run, in_turn, runs, snapshot_folder

if TYPE_CHECKING:
    from prebench.train.loop import TrainingInputs

CACHE = "cache"


def train_runs(folder: Path, config: StudyConfig, todo: Sequence[Run], jobs: int | None) -> None:
    """Train and export runs; the frozen tower's features are computed once for all of them.

    Where a launcher started several processes, all of them train each run together.

    Args:
        folder: the study.
        config: its configuration.
        todo: the runs that are missing.
        jobs: runs side by side; None chooses by cores and memory.
    """
    from prebench.runtime import choose_device, num_processes
    from prebench.train.trackers import chosen_trackers

    chosen_trackers()  # a missing package is named before anything is computed
    recipe = config.preset.train
    if num_processes() > 1:
        _train_together(folder, config, todo)
        return
    number = choose_jobs(jobs, len(todo), recipe.cpu_threads, choose_device(recipe.device).type)
    inputs = prepare_inputs(folder, config)
    total = recipe.total_steps
    if number > 1:
        work = {run.name: Job(f"train {run.name}", total, (folder, config, run)) for run in todo}
        run_jobs(_train_in_worker, work, number)
        return
    for run in todo:
        with ProgressLine(f"train {run.name}", total) as line:
            train_run(run, config, inputs, line.update)


def _train_together(folder: Path, config: StudyConfig, todo: Sequence[Run]) -> None:
    """Train each run with all processes of the launcher; process 0 alone writes and shows progress."""
    from prebench.train.processes import join_processes, leave_processes, on_main

    recipe = config.preset.train
    processes = join_processes(recipe.device)
    with processes.main_process_first():  # what it computes lies in the study's cache for the others
        inputs = prepare_inputs(folder, config)
    names = on_main(lambda: [run.name for run in todo])
    for run in (run for run in runs(folder, config) if run.name in names):
        if processes.is_main_process:
            with ProgressLine(f"train {run.name} ({processes.num_processes} processes)", recipe.total_steps) as line:
                train_run(run, config, inputs, line.update)
        else:
            train_run(run, config, inputs, lambda _done, _note: None)
    leave_processes()


def origin(config: StudyConfig) -> dict[str, str]:
    """Return what decides a run's weights besides its configuration: pretrained parts and numeric precision."""
    from prebench.model.sources import parts_hash

    return {"parts_hash": parts_hash(config.preset.model), "dtype": dtype_name(config)}


def dtype_name(config: StudyConfig) -> str:
    """Return the precision that the preset's "auto" means on this machine."""
    from prebench.runtime import choose_device, choose_dtype

    recipe = config.preset.train
    return str(choose_dtype(recipe.dtype, choose_device(recipe.device))).removeprefix("torch.")


def prepare_inputs(folder: Path, config: StudyConfig) -> TrainingInputs:
    """Return `load_inputs`; of several processes that start at once, one computes what the study's cache lacks."""
    with in_turn(folder / CACHE):
        return load_inputs(folder, config)


def load_inputs(folder: Path, config: StudyConfig) -> TrainingInputs:
    """Return what all runs of a study share, and set this process up for training."""
    from prebench.data.conversations import QUARANTINE, ConversationData, open_data
    from prebench.data.visual_tokens import pad_to_square
    from prebench.model.builder import model_processor
    from prebench.runtime import prepare_cpu
    from prebench.train.loop import TrainingInputs

    prepare_cpu(config.preset.train.cpu_threads)
    processor = model_processor(config.preset.model)
    if config.preset.data.pad_to_square:
        pad_to_square(processor)
    with _progress("examples looked at", "example") as report:
        data = open_data(config.preset.data, processor, folder / CACHE, lambda _path, done, total: report(done, total))
    if isinstance(data, ConversationData) and (left_out := data.write_quarantine(folder / QUARANTINE)):
        say(f"data: {left_out} examples are left out; {folder / QUARANTINE} lists them with their reasons")
    features, validation = _features(folder, config, processor, data)
    return TrainingInputs(data, processor, features, _external_features(folder, config, data), validation)


def _features(folder: Path, config: StudyConfig, processor: Any, data: Any) -> tuple[Any, Any]:
    """Return the frozen tower's features of the training and of the validation pictures; None: each run computes."""
    from prebench.model.builder import build_model
    from prebench.train.features import cached_features, validation_features

    stages = (config.preset.train.align, config.preset.train.instruct)
    frozen = any(stage.steps > 0 and "vision_tower" not in stage.trainable for stage in stages)
    # A tower from scratch differs from seed to seed, so its outputs can't be shared.
    shared = config.preset.model.vision_tower.pretrained is not None
    if not (config.preset.train.cache_vision_features and frozen and shared):
        return None, None
    recipe = config.preset.train
    model = build_model(config.preset.model, processor.tokenizer, seed=config.seeds[0])
    with _progress("vision features") as report:
        features = cached_features(folder / CACHE, model, processor, data, report)
    if not recipe.validate_every:
        return features, None
    with _progress("vision features for validation") as report:
        return features, validation_features(folder / CACHE, model, processor, data, recipe.validation_images, report)


def _external_features(folder: Path, config: StudyConfig, data: Any) -> dict[str, Any]:
    """Return the features of the study's external anchors, by the folder of their model."""
    from prebench.schema import PredictiveConfig

    blocks = [v.regularizer for v in config.variants if isinstance(v.regularizer, PredictiveConfig)]
    names = dict.fromkeys(block.anchor_model for block in blocks if block.anchor_model is not None)
    if not names:
        return {}
    from prebench.train.external import VisionModel
    from prebench.train.features import external_features

    tower = config.preset.model.vision_tower
    side = tower.image_size // tower.patch_size
    found = {}
    for name in names:
        model = VisionModel(Path(name))
        with _progress(f"anchor features of {Path(name).name}") as report:
            found[name] = external_features(folder / CACHE, model, side, data, report)
    return found


@contextmanager
def _progress(title: str, unit: str = "image") -> Iterator[Callable[[int, int], None]]:
    """Show a progress line from the first report on; none where everything was stored before."""
    with ExitStack() as stack:
        lines: list[ProgressLine] = []

        def report(done: int, total: int) -> None:
            if not lines:
                lines.append(stack.enter_context(ProgressLine(title, total, unit)))
            lines[0].update(done)

        yield report


@cache
def _worker_inputs(folder: Path, config: StudyConfig) -> TrainingInputs:
    """Return a worker's inputs, loaded once for all runs that it trains."""
    return load_inputs(folder, config)


def _train_in_worker(report: Report, folder: Path, config: StudyConfig, run: Run) -> None:
    train_run(run, config, _worker_inputs(folder, config), report)


def train_run(run: Run, config: StudyConfig, inputs: TrainingInputs, report: Report) -> None:
    """Train one run and export it; from its last checkpoint on where an earlier process left one.

    Args:
        run: which.
        config: the study's configuration.
        inputs: what all runs share.
        report: called with the steps done, over both stages, and a note.

    Raises:
        TrainingError: a loss is not finite.
        InterruptedRunError: SIGTERM came; a checkpoint is written, or the run is finished.
        StoreError: the log, a checkpoint or the export can't be written.
    """
    from prebench.export import export
    from prebench.model.builder import build_model
    from prebench.model.visual_states import num_layers
    from prebench.runtime import process_index, sigterm_noted
    from prebench.train.checkpoint import Checkpoints
    from prebench.train.log import RunLog
    from prebench.train.loop import build_regularizer, train
    from prebench.train.processes import on_main
    from prebench.train.sharding import whole_state

    variant = next(v for v in config.variants if v.name == run.variant)
    recipe = config.preset.train
    seed = config.training_seed(run.variant, run.seed)
    model = build_model(config.preset.model, inputs.processor.tokenizer, seed)
    regularizer = build_regularizer(variant.regularizer, model, seed, inputs.external)
    key = _run_key(run, config, inputs)
    log = RunLog(run.folder / "train.jsonl")
    checkpoints = Checkpoints(run.folder / CHECKPOINTS, key, log)

    def note(entry: dict[str, Any]) -> None:
        log.write(entry)
        if entry.get("kind") == "validation":
            return
        done = entry["step"] + 1 + (recipe.align.steps if entry["stage"] == "instruct" else 0)
        pre = "" if entry["pre_loss"] is None else f", pre_loss {entry['pre_loss']:.3f}"
        report(done, f"{entry['stage']}: lm_loss {entry['lm_loss']:.3f}{pre}")

    def write(folder: Path, weights: dict[str, Any] | None = None, **more: Any) -> None:
        manifest = {
            "variant": run.variant,
            "seed": run.seed,
            "training_seed": seed,
            "config_hash": key["config_hash"],
            **origin(config),
            "data_hash": key["data_hash"],
            "num_layers": num_layers(model),
            "regularizer_layer": None if regularizer is None else _one_or_several(regularizer.regularised_layers),
            **_own_package(config, run),
            "lm_loss": log.last.get("lm_loss"),
            "pre_loss": log.last.get("pre_loss"),
            "train_seconds": round(checkpoints.seconds, 1),
        }
        export(model, inputs.processor, folder, manifest | more, weights)

    def keep_snapshot(stage: str, done: int) -> None:
        if stage == "instruct" and done in recipe.snapshot_steps:
            weights = whole_state(model, process_index() == 0)
            on_main(lambda: write(snapshot_folder(run.folder, done) / "model", weights, step=done))

    with sigterm_noted() as stop, closing(log):
        train(model, regularizer, recipe, inputs, seed, note, checkpoints, stop, keep_snapshot)

        def finish() -> bool:
            write(run.model_dir)
            checkpoints.remove()
            return stop()

        if on_main(finish):
            raise InterruptedRunError(f"interrupted; {run.name} is finished and the same command goes on behind it")


def _run_key(run: Run, config: StudyConfig, inputs: TrainingInputs) -> dict[str, Any]:
    """Return what has to be equal for a run to go on from a checkpoint exactly as it would have gone on."""
    from prebench.runtime import choose_device, num_processes, versions
    from prebench.train.sharding import asked_for

    return {
        "config_hash": content_hash(config.run_config(run.variant, run.seed)),
        "data_hash": inputs.data.fingerprint(),
        **origin(config),
        **_own_package(config, run),
        "device": choose_device(config.preset.train.device).type,
        "processes": f"{num_processes()} (FSDP)" if asked_for() else num_processes(),
        "torch": versions()["torch"],
    }


def _own_package(config: StudyConfig, run: Run) -> dict[str, str]:
    """Return name and version of the package that brings the run's regularizer; nothing for prebench's own."""
    block = next(v.regularizer for v in config.variants if v.name == run.variant)
    entry = None if block is None else installed_regularizer(block.type)
    return {} if entry is None else {"regularizer_package": package_of(entry)}


def _one_or_several(layers: tuple[int, ...]) -> int | list[int]:
    return layers[0] if len(layers) == 1 else list(layers)
