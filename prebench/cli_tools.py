"""Commands that need no study: pretrained parts, mirrors, a model's check. Heavy imports happen inside commands."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from prebench.cli_options import comma_separated, device_options, model_folder
from prebench.errors import ConfigError, DataError, first_line

if TYPE_CHECKING:
    from prebench.data.download import HubTask
    from prebench.schema import PresetConfig, SuiteConfig


@click.command()
@click.option(
    "--to",
    "folder",
    type=click.Path(path_type=Path, file_okay=False),
    help="Output folder; by default the parts that ship with the package are replaced.",
)
@click.option("--tower-steps", type=click.IntRange(min=1), help="Of the vision tower; the shipped recipe's by default.")
@click.option("--language-steps", type=click.IntRange(min=1), help="Of the language model; likewise.")
def pretrain(folder: Path | None, tower_steps: int | None, language_steps: int | None) -> None:
    """Make the embedded preset's vision tower, language model and tokenizer again (half an hour)."""
    import dataclasses

    from prebench.model.pretrain import DEFAULT_FOLDER, PretrainConfig
    from prebench.model.pretrain import pretrain as make
    from prebench.progress import ProgressLine
    from prebench.store import require_writable

    config = PretrainConfig()
    steps = {"vision_tower": tower_steps, "language_model": language_steps}
    for part, number in steps.items():
        if number is not None:
            config = dataclasses.replace(config, **{part: dataclasses.replace(getattr(config, part), steps=number)})
    target = folder or DEFAULT_FOLDER
    require_writable(target)
    total = config.vision_tower.steps + config.language_model.steps
    with ProgressLine("pretrain", total) as line:

        def report(part: str, done: int, _steps: int, loss: float) -> None:
            before = config.vision_tower.steps if part == "language_model" else 0
            line.update(before + done, f"{part}: loss {loss:.3f}")

        manifest = make(target, config, report)
    for part, accuracies in manifest["accuracies"].items():
        for name, value in accuracies.items():
            click.echo(f"{part:<15} {name:<16} {value:.3f}")
    click.echo(f"written: {target}")


@click.command()
@click.option("--suite", help="What is to be measured: a name or a YAML file.")
@click.option("--to", "folder", type=click.Path(path_type=Path, file_okay=False), help="The mirror, new or begun.")
@click.option("--tasks", "chosen", help="Some of the suite's tasks, separated by commas; all by default.")
@click.option(
    "--revisions",
    type=click.Path(path_type=Path, dir_okay=False),
    help="Commits to fetch: another mirror's mirror.json, or YAML of data set: commit.",
)
@click.option("--dry-run", is_flag=True, help="List data sets, files and bytes, and stop.")
@click.option("--verify", type=click.Path(path_type=Path, file_okay=False), help="Check every file of this mirror.")
def mirror(
    suite: str | None,
    folder: Path | None,
    chosen: str | None,
    revisions: Path | None,
    dry_run: bool,
    verify: Path | None,
) -> None:
    """Fetch a suite's real benchmarks once, for machines without a network; or check what was fetched.

    The data sets' current commits are written down, fetched and checked against the Hub's checksums; the same command
    goes on where it was interrupted, and repairs. Every image is decoded once: the documents of those that can't be
    become errors, not wrong answers. HF_ENDPOINT names another server, HF_TOKEN or `hf auth login` gives access.

    \b
    Examples:
      prebench mirror --suite paper --to mirror --dry-run
      prebench mirror --suite paper --to mirror
      prebench mirror --suite paper --to mirror --revisions other/mirror.json
      prebench mirror --verify mirror
      prebench run --suite paper --mirror mirror
    """
    if verify is not None:
        if suite or folder:
            raise ConfigError("--verify DIR stands alone: it checks what is there, whatever the suite")
        _verify(verify)
        return
    if suite is None or folder is None:
        raise ConfigError("name what to fetch and where to: `prebench mirror --suite NAME --to DIR`")
    from prebench.config import load_suite
    from prebench.data.download import fill_mirror, read_revisions
    from prebench.data.mirror import all_files

    loaded = load_suite(suite)
    names = _chosen_tasks(loaded, chosen)
    tasks = _hub_tasks(loaded, names)
    pins = read_revisions(revisions, [task.repo for task in tasks]) if revisions else {}
    if dry_run:
        _list_downloads(tasks, names, pins)
        return
    argument = str(Path(suite).resolve()) if suite.endswith((".yaml", ".yml")) else suite
    manifest = fill_mirror(folder, loaded, names, tasks, pins, argument)
    size = sum(record["size"] for record in all_files(manifest).values())
    click.echo(f"{folder}: complete for {', '.join(names)} ({size / 1e9:.2f} GB)")
    missing = [name for name in loaded.task_names if name not in manifest["tasks"]]
    if missing:
        click.echo(f"still missing for suite {loaded.name}: {', '.join(missing)}")
    else:
        click.echo(f"use it with: prebench run --suite {suite} --mirror {folder}")


def _chosen_tasks(suite: SuiteConfig, chosen: str | None) -> list[str]:
    from prebench.errors import did_you_mean

    names = list(comma_separated(chosen or "")) or suite.task_names
    for name in names:
        if name not in suite.task_names:
            raise ConfigError(f"--tasks: unknown task {name!r}{did_you_mean(name, suite.task_names)}")
    return list(dict.fromkeys(names))


def _hub_tasks(suite: SuiteConfig, names: Sequence[str]) -> list[HubTask]:
    """Return where the definitions of real benchmarks find their data."""
    from prebench.data.download import HubTask
    from prebench.data.mirror import hub_tasks
    from prebench.evaluation.request import find_task

    found = []
    for task in hub_tasks(suite):
        if task.task not in names:
            continue
        source = find_task(task.task)
        unknown = source.dataset_kwargs.keys() - {"token", "revision", "trust_remote_code"}
        if unknown:
            raise ConfigError(
                f"suite {suite.name}: task {task.task!r} loads its data with {', '.join(sorted(unknown))}, which no "
                "mirror can serve"
            )
        revision = source.dataset_kwargs.get("revision")
        found.append(HubTask(task.task, source.dataset_path, source.dataset_name, source.split, revision))
    return found


def _list_downloads(tasks: Sequence[HubTask], names: Sequence[str], pins: dict[str, str]) -> None:
    from prebench.data.download import plan_downloads
    from prebench.data.hub import Hub

    downloads = plan_downloads(Hub(), tasks, pins)
    for download in downloads:
        where = f"{download.listing.repo}@{download.listing.commit}"
        number = len(download.names)
        click.echo(f"{download.task.task}: {where}, {number} file{'s' * (number > 1)}, {download.size:,} bytes")
        for name in download.names:
            click.echo(f"  {download.listing.files[name].size:>14,}  {name}")
    for name in names:
        if name not in {task.task for task in tasks}:
            click.echo(f"{name}: ships with prebench")
    click.echo(f"{sum(download.size for download in downloads):,} bytes; nothing was written")


def _verify(folder: Path) -> None:
    from prebench.data.mirror import verify_mirror

    problems, commands = verify_mirror(folder)
    for problem in problems:
        click.echo(problem)
    if problems:
        raise DataError(f"{folder}: {len(problems)} problems; `{'`, `'.join(commands)}` repairs")
    click.echo(f"{folder}: every file is as it was fetched")


def _numbers(_ctx: click.Context, _param: click.Parameter, value: str) -> tuple[int, ...]:
    parts = comma_separated(value)
    if not parts or not all(part.isascii() and part.isdecimal() and int(part) > 0 for part in parts):
        raise click.BadParameter(f"{value!r}: write whole numbers from 1 separated by commas, such as 1,4,16")
    return tuple(dict.fromkeys(int(part) for part in parts))


@click.command()
@click.argument("model_or_run", type=click.Path(path_type=Path), required=False)
@click.option("--data", "data", help="Check training data instead: a preset, or a .json, .jsonl or .parquet file.")
@click.option(
    "--image-root", type=click.Path(path_type=Path), help="Of a file: its images' folder; its own by default."
)
@click.option("--max-length", type=click.IntRange(min=2), help="Of a file: tokens of an example; no limit by default.")
@device_options
@click.option("--documents", type=click.IntRange(min=1), default=300, show_default=True, help="Asked in every setting.")
@click.option(
    "--batch-sizes", default="1,4,16,64", show_default=True, callback=_numbers, help="Questions at once, about."
)
@click.option("--processes", default="1,2", show_default=True, callback=_numbers, help="Processes that share the work.")
@click.option(
    "--generate",
    "generated",
    type=click.IntRange(min=0),
    default=50,
    show_default=True,
    help="How many of them plain model.generate answers, too, one at a time.",
)
@click.option("--json", "output", type=click.Path(path_type=Path, dir_okay=False), help="Write everything to a file.")
@click.pass_context
def doctor(
    ctx: click.Context,
    model_or_run: Path | None,
    data: str | None,
    image_root: Path | None,
    max_length: int | None,
    documents: int,
    generated: int,
    output: Path | None,
    **settings: Any,
) -> None:
    """Check that a model's answers depend on its weights and the question alone; or check training data.

    Asks generated documents (several questions per picture, two pictures, none) at every batch size, in shuffled
    order, in one process and in several, and compares with plain model.generate. MODEL_OR_RUN is an exported model's
    folder, or a run's folder that holds one in model/. Ends with 0 where no answer changed, 1 where some did, 2 where
    the check could not be made.

    With --data every training example is looked at: counts, lengths, truncations, text-only share, turns, and what is
    malformed or has a bad picture. Lengths are in tokens of the preset's own processor, of MODEL_OR_RUN where it is
    named, else of the embedded preset's; the first line says whose. Nothing is fetched. Ends with 2 where more is bad
    than the preset's data.max_bad_share.

    \b
    Examples:
      prebench doctor --data my-preset.yaml
      prebench doctor --data llava_v1_5_mix665k.json --image-root data --json data.json
      prebench doctor results/full-embedded/runs/pre-s0
      prebench doctor ~/models/llava-1.5-7b-hf --device cuda --documents 100
      prebench doctor MODEL --dtype bfloat16 --batch-sizes 1,8,32 --processes 1
      prebench doctor MODEL --documents 2000 --json doctor.json
    """
    if data is not None:
        _check_data(data, model_or_run, image_root, max_length, output)
        return
    if model_or_run is None or image_root or max_length:
        raise ConfigError("name a model's folder, or training data with --data (--image-root, --max-length are for it)")
    import tempfile

    from prebench.data.check_documents import check_documents
    from prebench.evaluation import doctor_report
    from prebench.evaluation.doctor import Document, Plan, examine
    from prebench.store import write_json

    model_dir = model_folder(model_or_run)
    with tempfile.TemporaryDirectory(prefix="prebench-doctor-") as folder:
        found = check_documents(Path(folder), documents)
        asked = tuple(Document(question=text, images=images) for text, images in found)
        report = examine(Plan(model_dir=model_dir.resolve(), documents=asked, generated=generated, **settings))
    about = doctor_report.machine()
    click.echo(doctor_report.render(report, model_dir, about))
    if output is not None:
        write_json(output, doctor_report.as_json(report, model_dir, about))
    ctx.exit(1 if report.flips else 0)


def _check_data(
    name: str, model_or_run: Path | None, image_root: Path | None, max_length: int | None, output: Path | None
) -> None:
    from prebench.config import load_preset
    from prebench.data.data_report import as_json, file_config, inspect, table
    from prebench.progress import ProgressLine
    from prebench.store import write_json

    is_file = name.endswith((".json", ".jsonl", ".parquet"))
    if not is_file and (image_root or max_length):
        raise ConfigError("--image-root and --max-length are for files; a preset names its own")
    preset = None if is_file else load_preset(name)
    config = file_config(Path(name), image_root, max_length) if preset is None else preset.data
    processor, tokenizer = _processor(model_or_run, preset)
    lines: dict[str, ProgressLine] = {}

    def report(path: str, done: int, total: int) -> None:
        if path not in lines:
            lines[path] = ProgressLine(Path(path).name, total, "example").__enter__()
        lines[path].update(done)
        if done == total:
            lines[path].__exit__(None, None, None)

    found = inspect(config, processor, report)
    click.echo(f"tokens are those of {tokenizer}\n{table(found, config)}")
    if output is not None:
        write_json(output, [{**source, "tokenizer": tokenizer} for source in as_json(found)])
    failed = [source.name for source in found if source.is_error(config.max_bad_share)]
    if failed:
        raise DataError(f"{', '.join(failed)}: more examples are bad than data.max_bad_share allows")


def _processor(model_or_run: Path | None, preset: PresetConfig | None) -> tuple[Any, str]:
    """Return the processor that counts tokens, and whose it is: a model's, the preset's own or the embedded one."""
    from prebench.errors import ModelError
    from prebench.model.builder import build_processor, build_tokenizer
    from prebench.model.local_files import local_processor
    from prebench.schema import VisionTowerConfig

    if model_or_run is None and preset is None:
        return build_processor(VisionTowerConfig(), build_tokenizer()), "the embedded preset; name a MODEL for its own"
    if model_or_run is None:
        assert preset is not None
        own = local_processor(preset.model)
        if own is not None:
            return own, f"preset {preset.name}"
        missing = f"those of {preset.model.language_model.pretrained} are not on this machine, and lengths will differ"
        return build_processor(preset.model.vision_tower, build_tokenizer()), f"the embedded preset: {missing}"
    from transformers import AutoProcessor

    folder = model_folder(model_or_run)
    if not folder.is_dir():
        raise ModelError(f"{folder}: no such folder")
    try:
        found = AutoProcessor.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
    except (OSError, ValueError, KeyError) as error:
        raise ModelError(f"{folder}: its processor can't be read ({first_line(error)})") from error
    return found, str(folder)
