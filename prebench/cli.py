"""The `prebench` command. Heavy imports happen inside commands, so that --help answers at once."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from prebench import __version__
from prebench.cli_analysis import compare
from prebench.cli_options import (
    chosen_study,
    jobs_option,
    launch_option,
    mirror_option,
    names,
    results_option,
    study_option,
    tracker_option,
    width,
)
from prebench.cli_plan import plan
from prebench.cli_probe import probe
from prebench.cli_tools import doctor, pretrain
from prebench.cli_tools import mirror as mirror_command
from prebench.errors import ConfigError, user_error
from prebench.launch import note_failure, note_worker

if TYPE_CHECKING:
    from prebench.schema import StudyConfig

CONTROLS = ("pre-shuffled", "pre-frozen-copy", "norm-penalty", "baseline-again")


class _Group(click.Group):
    """Prints expected errors as one line with exit code 2 (interrupted: 75); a bug keeps its traceback."""

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except Exception as error:
            known = user_error(error)
            if known is None:
                raise
            note_failure(known)
            click.echo(f"prebench: {' '.join(str(known).split())}", err=True)
            ctx.exit(known.exit_code)

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        if args and self.get_command(ctx, args[0]) is None:
            from prebench.errors import did_you_mean

            raise click.UsageError(f"unknown command {args[0]!r}{did_you_mean(args[0], self.list_commands(ctx))}")
        return super().resolve_command(ctx, args)


def _seeds(ctx: click.Context, param: click.Parameter, value: str | None) -> tuple[int, ...] | None:
    parts = names(ctx, param, value)
    if parts is None:
        return None
    if not parts or not all(part.isascii() and part.isdecimal() for part in parts):
        raise click.BadParameter(f"{value!r}: write whole numbers separated by commas, such as 0,1,2")
    return tuple(dict.fromkeys(int(part) for part in parts))


@click.group(cls=_Group, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(__version__, prog_name="prebench")
def main() -> None:
    """Does a training objective make a multimodal LLM see better?

    Trains a baseline and variants through one core, evaluates them with lmms-eval, probes every layer's visual tokens,
    and compares with intervals.

    \b
    Examples:
      prebench run --suite smoke                 the whole chain in two minutes
      prebench run --suite full                  the embedded experiment
      prebench compare baseline pre              differences with 95% intervals
      prebench list                              presets, suites, variants, tasks, studies
    """


@main.command()
@click.option("--suite", default="full", show_default=True, help="What is measured: a name or a YAML file.")
@click.option("--preset", help="Model, data and recipe: a name or a YAML file. The suite's own by default.")
@click.option("--variants", callback=names, help="Training objectives, separated by commas.")
@click.option("--controls", is_flag=True, help=f"Add the controls to the variants: {', '.join(CONTROLS)}.")
@click.option("--seeds", callback=_seeds, help="Seeds, separated by commas.")
@click.option("--name", help="Study name; <suite>-<preset> by default.")
@results_option
@click.option("--set", "overrides", multiple=True, metavar="A.B=C", help="Change one field of the preset.")
@mirror_option
@jobs_option
@tracker_option
@launch_option
@click.option("--prepare", is_flag=True, help="Make study and shared caches, and stop; `prebench train --run` follows.")
@click.option("--dry-run", is_flag=True, help="Say what would be done, and stop.")
def run(
    results: Path,
    dry_run: bool,
    prepare: bool,
    jobs: int | None,
    mirror: Path | None,
    launch: str | None,
    **request: Any,
) -> None:
    """Train, evaluate, probe and tabulate a study; go on where it stopped.

    The same command on a finished study does nothing; more seeds, variants or tasks extend it; another preset or recipe
    under the same name is refused.

    \b
    Examples:
      prebench run --suite smoke
      prebench run --suite full --seeds 0,1,2
      prebench run --suite full --controls       is it the image, a moving target, or randomness?
      prebench run --suite full --name short --set train.instruct.steps=300
      prebench run --suite full --name dynamics --set 'train.snapshots=[0.1, 0.25, 0.5]'
                                                 probes and benchmarks during training, too
      prebench run --suite full --launch 'accelerate launch --num_processes 8'
                                                 each run is trained by eight processes
    """
    from prebench import pipeline
    from prebench.study import plan_study

    config = _study_config(**request)
    folder = results / config.name
    if dry_run:
        _echo_plan(folder, plan_study(folder, config), mirror, launch)
        return
    if prepare:
        pipeline.prepare(folder, config)
        return
    paths = pipeline.run_study(folder, config, jobs, mirror, launch)
    if paths:
        _echo_summary(folder, paths)


def _study_config(
    suite: str,
    preset: str | None,
    variants: Sequence[str] | None,
    controls: bool,
    seeds: Sequence[int] | None,
    name: str | None,
    overrides: Sequence[str],
) -> StudyConfig:
    from prebench.config import load_preset, load_suite, load_variant, validate
    from prebench.schema import StudyConfig

    chosen_suite = load_suite(suite)
    chosen_preset = load_preset(preset or chosen_suite.defaults.preset, overrides)
    study_name = name or f"{chosen_suite.name}-{chosen_preset.name}"
    if not study_name or "/" in study_name or study_name.startswith("."):
        raise ConfigError(f"--name {study_name!r}: a plain folder name is expected")
    chosen = [load_variant(v) for v in dict.fromkeys(variants or chosen_suite.defaults.variants)]
    if controls:
        names = {variant.name for variant in chosen}
        chosen += [load_variant(name) for name in CONTROLS if name not in names]
    values = {
        "name": study_name,
        "preset": chosen_preset,
        "suite": chosen_suite,
        "variants": tuple(chosen),
        "seeds": tuple(seeds or chosen_suite.defaults.seeds),
    }
    return validate(StudyConfig, values, f"study {study_name}")


def _echo_plan(folder: Path, config: StudyConfig, mirror: Path | None, launch: str | None) -> None:
    from prebench import pipeline
    from prebench.launch import train_command

    todo = pipeline.plan(folder, config, mirror)
    recipe = config.preset.train
    click.echo(f"study      {folder}")
    click.echo(f"preset     {config.preset.name}: {config.preset.description}")
    click.echo(f"recipe     align {recipe.align.steps} + instruct {recipe.instruct.steps} steps")
    if recipe.snapshot_steps:
        steps = ", ".join(map(str, recipe.snapshot_steps))
        click.echo(f"snapshots  of every run after instruct steps {steps}: each takes the disk space of one more model")
    click.echo(f"trained    {', '.join(todo.done) or 'none'}")
    click.echo(f"to train   {', '.join(todo.train) or 'none'}")
    if launch is not None:
        click.echo(f"launch     {shlex.join(train_command(launch, folder, ()))}")
    click.echo(f"tasks      {', '.join(todo.tasks)}")
    click.echo("nothing was written")


def _echo_summary(folder: Path, paths: Sequence[Path]) -> None:
    from prebench.analysis.join import load_study
    from prebench.analysis.summary import summary_text

    click.echo(summary_text(load_study(folder), width=width()))
    click.echo("written:")
    for path in paths:
        click.echo(f"  {path}")


@main.command()
@study_option
@results_option
@click.option("--run", "names", multiple=True, metavar="RUN", help="Train this run alone, such as pre-s0; repeatable.")
@jobs_option
@tracker_option
@launch_option
def train(study: str | None, results: Path, names: tuple[str, ...], jobs: int | None, launch: str | None) -> None:
    """Train and export the study's missing runs, and nothing else.

    Several of these commands may work on one study at a time, each on runs of its own.
    """
    from prebench import pipeline
    from prebench.study import read_study, shared

    note_worker()
    folder = chosen_study(results, study)
    if launch is not None:
        pipeline.train_launched(folder, read_study(folder), launch, names)
        return
    with shared(folder):  # of several processes, process 0 holds study and runs
        pipeline.train_all(folder, read_study(folder), jobs, names)


@main.command()
@study_option
@results_option
@click.option("--tasks", callback=names, help="lmms-eval task ids of the suite; all by default.")
@mirror_option
@jobs_option
def evaluate(
    study: str | None, results: Path, tasks: tuple[str, ...] | None, mirror: Path | None, jobs: int | None
) -> None:
    """Evaluate the study's trained runs on its benchmark tasks."""
    from prebench.study import read_study

    folder = chosen_study(results, study)
    names = [task.task for task in read_study(folder).suite.tasks]
    _evaluate(folder, names, tasks or names, mirror, jobs)


def _evaluate(folder: Path, known: Sequence[str], tasks: Sequence[str], mirror: Path | None, jobs: int | None) -> None:
    from prebench import pipeline
    from prebench.errors import did_you_mean
    from prebench.study import locked, read_study

    for task in tasks:
        if task not in known:
            raise ConfigError(f"--tasks: unknown task {task!r}{did_you_mean(task, known)}")
    with locked(folder):
        pipeline.evaluate_all(folder, read_study(folder), tasks, jobs, mirror)


@main.command()
@study_option
@results_option
@mirror_option
def report(study: str | None, results: Path, mirror: Path | None) -> None:
    """Rebuild scores, tables, figures and report.html from the records, and print the summary."""
    from prebench import pipeline

    folder = chosen_study(results, study)
    _echo_summary(folder, pipeline.write_report(folder, mirror))


@main.command(name="list")
@click.argument("kind", required=False, type=click.Choice(["presets", "suites", "variants", "tasks", "studies"]))
@results_option
def list_command(kind: str | None, results: Path) -> None:
    """Show what there is: presets, suites, variants, tasks, studies."""
    for section in [kind] if kind else ["presets", "suites", "variants", "tasks", "studies"]:
        click.echo(f"{section}:")
        for name, description in _listing(section, results):
            click.echo(f"  {name:<24} {description}".rstrip())


def _listing(section: str, results: Path) -> list[tuple[str, str]]:
    from prebench.config import KINDS, list_configs, load_preset, load_suite, load_variant

    if section == "studies":
        folders = sorted(path.parent for path in results.glob("*/study.yaml"))
        return [(folder.name, str(folder)) for folder in folders]
    if section == "tasks":
        suites = [load_suite(name) for name in list_configs("suites")]
        tasks = {t.task: f"{t.label} ({t.data_source} data)" for suite in suites for t in suite.tasks}
        return sorted(tasks.items())
    assert section in KINDS
    load: Any = {"presets": load_preset, "suites": load_suite, "variants": load_variant}[section]
    return [(name, load(name).description) for name in list_configs(section)]


for command in (compare, doctor, mirror_command, plan, pretrain, probe):
    main.add_command(command)


if __name__ == "__main__":
    main()
