"""Options that several commands share."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

DEFAULT_RESULTS = "results"


def results_option(function: Callable[..., Any]) -> Callable[..., Any]:
    """Add --results."""
    return click.option(
        "--results",
        type=click.Path(path_type=Path),
        default=DEFAULT_RESULTS,
        show_default=True,
        help="Folder that holds the studies.",
    )(function)


def study_option(function: Callable[..., Any]) -> Callable[..., Any]:
    """Add --study."""
    return click.option("--study", help="Study name; the only or the latest study in the results folder by default.")(
        function
    )


def jobs_option(function: Callable[..., Any]) -> Callable[..., Any]:
    """Add --jobs."""
    help_text = "Processes side by side; by default as many as cores and memory allow. Results do not depend on it."
    return click.option("--jobs", type=click.IntRange(min=1), help=help_text)(function)


def launch_option(function: Callable[..., Any]) -> Callable[..., Any]:
    """Add --launch."""
    help_text = "Train each run in the processes that this command starts, such as 'accelerate launch' or torchrun."
    return click.option("--launch", metavar="COMMAND", help=help_text)(function)


def mirror_option(function: Callable[..., Any]) -> Callable[..., Any]:
    """Add --mirror."""
    return click.option(
        "--mirror",
        type=click.Path(path_type=Path),
        help="Folder that `prebench mirror` filled with real benchmarks; PREBENCH_MIRROR by default. Works offline.",
    )(function)


def tracker_option(function: Callable[..., Any]) -> Callable[..., Any]:
    """Add --tracker: workers read the choice from the environment, so that it is part of no configuration."""

    def remember(_ctx: click.Context, _param: click.Parameter, value: tuple[str, ...]) -> None:
        if value:
            os.environ["PREBENCH_TRACKER"] = ",".join(value)

    return click.option(
        "--tracker",
        multiple=True,
        type=click.Choice(["tensorboard", "wandb", "trackio"]),
        expose_value=False,
        callback=remember,
        help="Also show training curves there (wandb: offline unless WANDB_MODE is set); PREBENCH_TRACKER by default.",
    )(function)


def comma_separated(value: str) -> tuple[str, ...]:
    """Return what stands between commas, without spaces around; nothing for what is empty."""
    return tuple(part.strip() for part in value.split(",") if part.strip())


def names(_ctx: click.Context, _param: click.Parameter, value: str | None) -> tuple[str, ...] | None:
    """Read an option that lists names (click's callback)."""
    return None if value is None else comma_separated(value)


def device_options(function: Callable[..., Any]) -> Callable[..., Any]:
    """Add --device and --dtype."""
    dtype = click.option(
        "--dtype",
        type=click.Choice(["auto", "float32", "bfloat16"]),
        default="auto",
        show_default=True,
        help="auto: bfloat16 on CUDA, float32 on a CPU.",
    )
    device = click.option("--device", type=click.Choice(["auto", "cpu", "cuda"]), default="auto", show_default=True)
    return device(dtype(function))


def model_folder(model_or_run: Path) -> Path:
    """Return the model's folder: a run's model/ where a run was named."""
    inner = model_or_run / "model"
    return inner if not (model_or_run / "config.json").is_file() and inner.is_dir() else model_or_run


def chosen_study(results: Path, study: str | None) -> Path:
    """Return the folder of the named study, or of the only or latest one."""
    from prebench.analysis.join import find_study

    return find_study(results, study)


def width() -> int:
    """Return the characters per line of what is printed."""
    return max(80, shutil.get_terminal_size((100, 24)).columns)
