"""Training curves in TensorBoard, Weights & Biases or Trackio, through accelerate's trackers; none is required.

`train.jsonl` stays the record. Trackers are asked for by name in an environment variable, which workers inherit, so
that they never are part of a configuration or its hash.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from accelerate.tracking import LOGGER_TYPE_TO_CLASS, GeneralTracker

from prebench.errors import ConfigError, TrainingError, did_you_mean, user_error
from prebench.runtime import process_index
from prebench.schema import TrainConfig
from prebench.train.log import LogLine

TRACKERS = ("tensorboard", "trackio", "wandb")
VARIABLE = "PREBENCH_TRACKER"
"""Names separated by commas."""
LEFT_OUT = ("step", "stage", "kind", "batch_hash")


def chosen_trackers() -> tuple[str, ...]:
    """Return the names that `PREBENCH_TRACKER` asks for.

    Raises:
        ConfigError: a name is unknown, or its package is not installed.
    """
    names = tuple(name.strip() for name in os.environ.get(VARIABLE, "").split(",") if name.strip())
    for name in names:
        if name not in TRACKERS:
            raise ConfigError(f"--tracker: unknown tracker {name!r}{did_you_mean(name, TRACKERS)}")
        if importlib.util.find_spec(name) is None:
            raise ConfigError(f"--tracker {name}: the package {name} is not installed: pip install {name}")
    return tuple(dict.fromkeys(names))


@contextmanager
def tracked(
    log: Callable[[LogLine], None], folder: Path | None, config: TrainConfig
) -> Iterator[Callable[[LogLine], None]]:
    """Give a log that also goes to the trackers that were asked for, in process 0.

    Args:
        log: the run's own log, which is written first.
        folder: the run's; its name is the run's, that of the study the project's. None tracks nothing.
        config: the recipe: steps of the stages.

    Raises:
        ConfigError: a tracker's package is not installed.
        TrainingError: a tracker can't start.
    """
    names = chosen_trackers()
    if not names or folder is None or process_index() > 0:
        yield log
        return
    with ExitStack() as stack:
        trackers = [_started(name, folder) for name in names]
        for tracker in trackers:
            stack.callback(tracker.finish)

        def both(line: LogLine) -> None:
            log(line)
            values, step = _values(line), _step(line, config)
            for tracker in trackers:
                tracker.log(values, step=step)

        yield both


def _started(name: str, folder: Path) -> Any:
    """Return accelerate's tracker, writing below the run's folder; Weights & Biases offline unless told otherwise."""
    project = folder.parent.parent.name
    kind: type[GeneralTracker] = LOGGER_TYPE_TO_CLASS[name]
    try:
        if name == "tensorboard":
            tracker: Any = kind(name, str(folder))
        elif name == "wandb":
            os.environ.setdefault("WANDB_MODE", "offline")
            # One process may train several runs: each is finished before the next starts.
            tracker = kind(project, name=folder.name, dir=str(folder), reinit="finish_previous")
        else:
            os.environ.setdefault("TRACKIO_DIR", str(folder.parent.parent / "trackio"))
            tracker = kind(project, name=folder.name)
        tracker.start()
    except Exception as error:
        known = user_error(error)
        if known is None and not isinstance(error, ImportError | RuntimeError | ValueError):
            raise
        raise TrainingError(f"--tracker {name}: can't start ({' '.join(str(error).split())[:200]})") from error
    return tracker


def _values(line: LogLine) -> dict[str, float]:
    """Return the numbers of a log line, `train/lm_loss` or `validation/accuracy/<type>`."""
    prefix = "validation" if line.get("kind") == "validation" else "train"
    found: dict[str, float] = {}
    for name, value in line.items():
        parts: Sequence[tuple[str, Any]] = [(f"{prefix}/{name}", value)]
        if isinstance(value, dict):
            parts = [(f"{prefix}/{name}/{inner}", number) for inner, number in value.items()]
        if name not in LEFT_OUT:
            found |= {k: float(v) for k, v in parts if isinstance(v, int | float) and not isinstance(v, bool)}
    return found


def _step(line: LogLine, config: TrainConfig) -> int:
    """Return the optimiser steps done, over both stages."""
    return int(line["step"]) + 1 + (config.align.steps if line["stage"] == "instruct" else 0)
