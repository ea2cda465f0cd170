"""`prebench probe`: a study's runs, or any local model on any local data set. Heavy imports happen inside commands."""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from click.core import ParameterSource

from prebench.cli_options import (
    chosen_study,
    comma_separated,
    device_options,
    jobs_option,
    mirror_option,
    model_folder,
    names,
    results_option,
    study_option,
)
from prebench.errors import ConfigError, StoreError

if TYPE_CHECKING:
    from prebench.probe.data import ProbeData
    from prebench.probe.models import Outline

SCENES = "scenes"
STUDY_OPTIONS = ("study", "results", "mirror", "jobs")


def _ids(_ctx: click.Context, _param: click.Parameter, value: str) -> tuple[int, ...]:
    parts = comma_separated(value)
    if not all(part.isascii() and part.isdecimal() for part in parts):
        raise click.BadParameter(f"{value!r}: write whole numbers separated by commas, such as 255")
    return tuple(int(part) for part in parts)


@click.command()
@click.argument("model_or_run", type=click.Path(path_type=Path), required=False)
@click.option("--data", default=SCENES, show_default=True, help="The suite's scenes, or a local data set's folder.")
@click.option("--suite", default="full", show_default=True, help="Whose scenes and attributes: a name or a YAML file.")
@click.option("--image-column", default="image", show_default=True, help="Of the data set.")
@click.option("--label-columns", callback=names, help="What to decode, separated by commas; label by default.")
@click.option("--mask-column", help="Object ids per pixel, 0 = background; mask by default.")
@click.option(
    "--category-column",
    help="Per image the categories of mask ids 1, 2, ...: a list of texts; object_categories by default.",
)
@click.option(
    "--semantic-masks",
    is_flag=True,
    help="Mask ids are classes, the same in all images: patch structure by class.",
)
@click.option("--subset-column", help="train, val or test; subset by default, else the data set's splits decide.")
@click.option("--ignore-ids", default="", callback=_ids, help="Mask ids that are no object, such as 255.")
@click.option(
    "--output", type=click.Path(path_type=Path, file_okay=False), help="Folder; MODEL_OR_RUN-probe by default."
)
@click.option("--batch-size", type=click.IntRange(min=1), default=16, show_default=True, help="Images per pass.")
@device_options
@click.option(
    "--random-weights/--no-random-weights",
    default=True,
    show_default=True,
    help="Control: the same with a language model of random weights; doubles the time.",
)
@click.option("--seed", type=click.IntRange(min=0), default=0, show_default=True, help="Of the random weights.")
@click.option("--dry-run", is_flag=True, help="Look at model and data, say what would be done, and stop.")
@study_option
@results_option
@mirror_option
@jobs_option
@click.pass_context
def probe(
    ctx: click.Context,
    model_or_run: Path | None,
    study: str | None,
    results: Path,
    mirror: Path | None,
    jobs: int | None,
    **options: Any,
) -> None:
    """Probe visual tokens at every decoder layer: of one model, or of a study's runs.

    MODEL_OR_RUN is the local folder of a Hugging Face multimodal model (LLaVA, LLaVA-NeXT, LLaVA-OneVision, Qwen2-VL to
    Qwen3-VL, InternVL, Idefics3, SmolVLM, PaliGemma, Gemma 3), or of a run that holds one in model/. Without it, the
    study's trained runs are probed and their records written.

    DATA is the word scenes, an image folder (a subfolder per class, or a metadata.csv), Parquet, or what save_to_disk
    wrote. Labels give linear probes, masks give patch structure. The output holds probe.parquet, summary.csv (by
    layer), layer_curves.svg and .pdf, and probe_maps.json. The same command on a finished output does nothing.

    \b
    Examples:
      prebench probe                                        the latest study's runs
      prebench probe results/full-embedded/runs/pre-s0      one run, with every control
      prebench probe ~/models/llava-1.5-7b-hf --device cuda --output llava-probe
      prebench probe MODEL --data ~/flowers                 subfolders are classes
      prebench probe MODEL --data coco/val.parquet --mask-column annotation --semantic-masks --ignore-ids 255
      prebench probe MODEL --data animals.parquet --label-columns species,pose --dry-run
    """
    given = {name for name in ctx.params if ctx.get_parameter_source(name) is ParameterSource.COMMANDLINE}
    wrong = sorted(given & set(STUDY_OPTIONS) if model_or_run else given - set(STUDY_OPTIONS))
    if wrong:
        reason = "is about a study, and MODEL_OR_RUN names a model" if model_or_run else "needs MODEL_OR_RUN"
        raise ConfigError(f"--{wrong[0].replace('_', '-')} {reason}; see `prebench probe --help`")
    if model_or_run is None:
        _probe_study(chosen_study(results, study), mirror, jobs)
    else:
        _probe_model(_Request(model_or_run, **options))


def _probe_study(folder: Path, mirror: Path | None, jobs: int | None) -> None:
    from prebench import pipeline
    from prebench.study import locked, read_study

    config = read_study(folder)
    if config.suite.probe is None:
        raise ConfigError(f"{folder}: the suite of this study has no probe")
    with locked(folder):
        pipeline.evaluate_all(folder, config, [config.suite.probe.task], jobs, mirror)


@dataclass(frozen=True)
class _Request:
    """The command's arguments."""

    model_or_run: Path
    data: str
    suite: str
    image_column: str
    label_columns: tuple[str, ...] | None
    mask_column: str | None
    category_column: str | None
    semantic_masks: bool
    subset_column: str | None
    ignore_ids: tuple[int, ...]
    output: Path | None
    batch_size: int
    device: str
    dtype: str
    random_weights: bool
    seed: int
    dry_run: bool

    @property
    def model_dir(self) -> Path:
        """Return the model's folder, the run's where a run was named."""
        return model_folder(self.model_or_run)

    @property
    def folder(self) -> Path:
        """Return the output's folder."""
        return self.output or Path(f"{self.model_or_run.resolve().name}-probe")


def _probe_model(request: _Request) -> None:
    from prebench.export import weights_hash
    from prebench.probe.files import read_hashes
    from prebench.probe.models import look
    from prebench.records import PROBE_FILE, content_hash
    from prebench.runtime import choose_device, choose_dtype
    from prebench.store import require_writable

    found = look(request.model_dir)
    device = choose_device(request.device)
    dtype = choose_dtype(request.dtype, device)
    with tempfile.TemporaryDirectory(prefix="prebench-probe-data-") as cache:
        data = _data(request, Path(cache))
        if request.dry_run:
            _echo_plan(request, found, data, f"{device.type}, {dtype}")
            return
        settings = [str(dtype), request.random_weights, request.seed]
        hashes = {"weights": weights_hash(request.model_dir), "data": data.digest, "config": content_hash(settings)}
        known = read_hashes(request.folder / PROBE_FILE)
        if known == hashes:
            click.echo(f"{request.folder}: probed already; delete it to probe again")
            return
        if known is not None or (request.folder / PROBE_FILE).exists():
            differ = [name for name in hashes if known is None or known.get(name) != hashes[name]]
            raise StoreError(
                f"{request.folder / PROBE_FILE}: made with other {' and '.join(differ)}; take another --output, or "
                "delete it"
            )
        require_writable(request.folder)
        _carry_out(request, device, dtype, data, hashes)


def _data(request: _Request, cache: Path) -> ProbeData:
    from prebench.probe.data import Columns, open_data

    if request.semantic_masks and request.category_column:
        raise ConfigError("--semantic-masks: mask ids are categories themselves; leave out --category-column")
    if request.data == SCENES:
        return _scenes(request.suite)
    columns = Columns(
        request.image_column,
        request.label_columns,
        request.mask_column,
        request.subset_column,
        request.ignore_ids,
        request.category_column,
        request.semantic_masks,
    )
    return open_data(Path(request.data).expanduser(), columns, cache)


def _scenes(suite: str) -> ProbeData:
    """Return the scenes that the suite's probe task asks about."""
    from prebench.config import load_suite
    from prebench.data.probe_scenes import probe_scenes
    from prebench.probe.data import ProbeData
    from prebench.records import content_hash

    loaded = load_suite(suite)
    config = loaded.probe
    if config is None:
        raise ConfigError(f"--suite {suite}: it has no probe; take another, or name a data set with --data")
    scenes = probe_scenes(config, loaded.mirror_seed)
    return ProbeData(
        name=f"scenes of suite {loaded.name}",
        images=scenes.images,
        masks=scenes.masks,
        labels=scenes.labels,
        subsets=scenes.subsets,
        attributes=config.attributes,
        has_masks=True,
        categories=scenes.categories,
        digest=content_hash([config.model_dump(mode="json"), loaded.mirror_seed]),
    )


def _echo_plan(request: _Request, found: Outline, data: ProbeData, place: str) -> None:
    from collections import Counter

    sizes = Counter(data.subsets.tolist())
    labels = [f"{a.name} ({len(set(data.labels[a.name].tolist()))} classes)" for a in data.attributes]
    about = "" if found.tested else "; not among the tested ones: its attention is measured before the first batch"
    click.echo(f"model      {request.model_dir}: {found.model_type}, {found.num_layers} decoder layers{about}")
    click.echo(f"attention  image tokens: {found.attention}")
    click.echo(f"data       {data.name}: {len(data)} images ({', '.join(f'{n} {s}' for s, n in sizes.items())})")
    click.echo(f"labels     {', '.join(labels) or 'none: no linear probes'}")
    click.echo(f"masks      {'yes' if data.has_masks else 'none: no patch structure'}")
    click.echo(f"control    {'random weights: a second pass' if request.random_weights else 'no random weights'}")
    click.echo(f"runs on    {place}, {request.batch_size} images at a time")
    click.echo(f"output     {request.folder}")
    click.echo("nothing was written")


def _carry_out(request: _Request, device: Any, dtype: Any, data: ProbeData, hashes: dict[str, str]) -> None:
    import pandas as pd

    from prebench.analysis import probe_summary
    from prebench.probe.files import write_maps, write_rows
    from prebench.probe.models import load
    from prebench.probe.standalone import Settings, probe_model
    from prebench.records import MAPS_FILE, PROBE_FILE, to_dict
    from prebench.runtime import prepare_cpu, versions
    from prebench.store import write_json

    prepare_cpu()
    model, processor = load(request.model_dir, device, dtype)
    settings = Settings(request.batch_size, request.random_weights, request.seed)
    rows, maps = probe_model(model, processor, data, settings)
    frame = pd.DataFrame([to_dict(row) for row in rows])
    folder = request.folder
    title = f"{request.model_or_run.resolve().name}: probes by layer"
    about: dict[str, Any] = {
        "model": str(request.model_dir.resolve()),
        "data": request.data,
        "hashes": hashes,
        "versions": versions(),
    }
    about |= {"dtype": str(dtype).removeprefix("torch."), "seed": request.seed, "images": len(data)}
    write_json(folder / "probe.json", about)
    write_maps(folder / MAPS_FILE, maps, hashes)
    probe_summary.write_csv(frame, folder / "summary.csv")
    figures = probe_summary.write_curves(frame, folder / "layer_curves.svg", title)
    write_rows(folder / PROBE_FILE, rows, hashes)  # last: its presence says "complete"
    for line in probe_summary.sentences(frame):
        click.echo(line)
    click.echo("written:")
    for path in (folder / PROBE_FILE, folder / "summary.csv", *figures, folder / MAPS_FILE, folder / "probe.json"):
        click.echo(f"  {path}")
