"""The command `plan`: how many seeds a difference needs, or what training a preset costs."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, NamedTuple

import click

from prebench.cli_options import chosen_study, names, results_option, study_option, width
from prebench.errors import ConfigError


class _Gpu(NamedTuple):
    """A GPU's data sheet: dense peaks in TFLOP/s (float32: without tensor cores), memory in GB."""

    bfloat16: float
    float32: float
    memory: float


GPUS = {
    "h100": _Gpu(989, 67, 80),
    "h200": _Gpu(989, 67, 141),
    "a100": _Gpu(312, 19.5, 80),
    "a100-40gb": _Gpu(312, 19.5, 40),
    "l40s": _Gpu(362, 91.6, 48),
    "rtx4090": _Gpu(165, 82.6, 24),
}
OF_SEEDS = ("pair", "difference", "power", "study", "results", "seed_sd", "discordant", "icc", "questions_per_image")


def _lengths(_ctx: click.Context, _param: click.Parameter, value: str | None) -> dict[str, float]:
    if value is None:
        return {}
    parts = value.split(",")
    try:
        numbers = [float(part) for part in parts]
    except ValueError:
        numbers = []
    if len(numbers) not in (1, 2) or not all(0 < number < 1e6 for number in numbers):
        raise click.BadParameter(f"{value!r}: write one number, or two for align and instruct, such as 30,250")
    return {"align": numbers[0], "instruct": numbers[-1]}


def _of_costs(function: Callable[..., Any]) -> Callable[..., Any]:
    """Add the options that go with --preset."""
    for option in reversed(
        [
            click.option("--preset", help="Plan what training this preset costs: a name or a YAML file."),
            click.option("--gpus", type=click.IntRange(min=1), default=1, show_default=True, help="All together."),
            click.option("--gpu", type=click.Choice(list(GPUS)), default="h100", show_default=True),
            click.option("--gpu-memory", type=click.FloatRange(min=0, min_open=True), help="GB; --gpu's by default."),
            click.option(
                "--tflops",
                type=click.FloatRange(min=0, min_open=True),
                help="Peak of one GPU in TFLOP/s; --gpu's by default.",
            ),
            click.option(
                "--utilisation",
                type=click.FloatRange(0, 1, min_open=True),
                default=0.4,
                show_default=True,
                help="Share of the peak that training reaches.",
            ),
            click.option("--sharding", type=click.Choice(["ddp", "fsdp"]), default="ddp", show_default=True),
            click.option(
                "--variants",
                callback=names,
                help="Training objectives, separated by commas; baseline,pre by default.",
            ),
            click.option("--seeds", type=click.IntRange(min=1), default=3, show_default=True, help="How many."),
            click.option("--set", "overrides", multiple=True, metavar="A.B=C", help="Change one field of the preset."),
            click.option(
                "--text-tokens",
                callback=_lengths,
                metavar="N[,N]",
                help="Mean text tokens per example, of align and instruct; measured where data and tokenizer are here.",
            ),
            click.option("--json", "output", type=click.Path(path_type=Path, dir_okay=False), help="Write everything."),
        ]
    ):
        function = option(function)
    return function


@click.command()
@click.argument("pair", nargs=-1, metavar="[BASELINE VARIANT]")
@click.option(
    "--difference",
    type=click.FloatRange(min=0, min_open=True),
    default=1.0,
    show_default=True,
    help="What is to be found, in points.",
)
@click.option(
    "--power", type=click.FloatRange(0.5, 0.999), default=0.8, show_default=True, help="Probability of finding it."
)
@study_option
@results_option
@click.option(
    "--seed-sd", type=click.FloatRange(min=0), help="Before any study: SD over seeds of a difference, in points."
)
@click.option(
    "--discordant",
    type=click.FloatRange(0, 100, min_open=True),
    default=10.0,
    show_default=True,
    help="Before any study: per cent of the questions that one of two models alone answers right.",
)
@click.option(
    "--icc",
    type=click.FloatRange(0, 1),
    default=0.05,
    show_default=True,
    help="Before any study: correlation among the questions about one image.",
)
@click.option(
    "--questions-per-image", type=click.FloatRange(min=1), default=1.0, show_default=True, help="Before any study."
)
@_of_costs
@click.pass_context
def plan(ctx: click.Context, **given: Any) -> None:
    """Say how many seeds and images it takes to find a difference; or what training a preset costs.

    With --preset: memory per GPU, operations and hours of a run and of a study, from shapes alone. Nothing is fetched;
    everything that is assumed is printed. The options up to --questions-per-image are for seeds, the others for costs.

    \b
    Examples:
      prebench plan baseline pre --difference 0.5        from the spreads of a study
      prebench plan --seed-sd 0.8 --discordant 10 --questions-per-image 30       before any study
      prebench plan --preset llava15-vicuna7b --gpus 8 --gpu a100                memory, FLOPs, hours
      prebench plan --preset siglip2-qwen25-7b --gpus 8 --sharding fsdp --json plan.json
    """
    _one_question(ctx, given["preset"] is not None)
    if given["preset"] is not None:
        _costs(**{name: value for name, value in given.items() if name not in OF_SEEDS})
    else:
        _seeds(**{name: given[name] for name in OF_SEEDS})


def _one_question(ctx: click.Context, costs: bool) -> None:
    """Refuse options of the other question."""
    for param in ctx.command.params:
        name = str(param.name)
        if ctx.get_parameter_source(name) is not click.core.ParameterSource.COMMANDLINE:
            continue
        shown = param.opts[0] if isinstance(param, click.Option) else "BASELINE VARIANT"
        if costs and name in OF_SEEDS:
            raise ConfigError(f"plan: {shown} is for planning seeds, --preset plans what training costs: one at a time")
        if not costs and name not in OF_SEEDS:
            raise ConfigError(f"plan: {shown} is for planning what training costs: name the --preset")


def _seeds(
    pair: tuple[str, ...],
    difference: float,
    power: float,
    study: str | None,
    results: Path,
    seed_sd: float | None,
    discordant: float,
    icc: float,
    questions_per_image: float,
) -> None:
    from prebench.analysis import power as planning
    from prebench.analysis.compare import compare
    from prebench.analysis.join import load_study

    if seed_sd is not None:
        shares = (discordant / 100, icc, questions_per_image)
        click.echo(planning.text_before(difference / 100, power, seed_sd / 100, *shares))
        return
    loaded = load_study(chosen_study(results, study))
    two = pair or tuple(loaded.variants[:2])
    if len(two) != 2:
        raise ConfigError(f"plan: two variants are compared, not {len(two)}; or give --seed-sd to plan without a study")
    click.echo(planning.text(compare(loaded, *two), difference / 100, power, width()))


def _costs(
    preset: str,
    gpus: int,
    gpu: str,
    gpu_memory: float | None,
    tflops: float | None,
    utilisation: float,
    sharding: Literal["ddp", "fsdp"],
    variants: tuple[str, ...] | None,
    seeds: int,
    overrides: tuple[str, ...],
    text_tokens: dict[str, float],
    output: Path | None,
) -> None:
    from prebench.config import load_preset, load_variant
    from prebench.costs.plan import plan_costs
    from prebench.costs.stages import Machine
    from prebench.costs.text import as_json, render, unknown_regularizers
    from prebench.store import write_json

    loaded = load_preset(preset, overrides)
    cuda = loaded.train.device != "cpu"
    half = loaded.train.dtype == "bfloat16" or (loaded.train.dtype == "auto" and cuda)
    dtype = "bfloat16" if half else "float32"
    if cuda:
        tflops = tflops or getattr(GPUS[gpu], dtype)
        gpu_memory = gpu_memory or GPUS[gpu].memory
    speed = None if tflops is None else tflops * 1e12 * utilisation
    machine = Machine(gpus, sharding, half, cuda, speed)
    limit = None if gpu_memory is None else gpu_memory * 1e9
    chosen = [load_variant(name) for name in dict.fromkeys(variants or ("baseline", "pre"))]
    found = plan_costs(loaded, chosen, seeds, machine, limit, text_tokens)
    words = f"{gpus} x {gpu}, {sharding}, {dtype}" if cuda else f"a CPU, {gpus} x {dtype}"
    assumptions = [*_speed_in_words(cuda, dtype, tflops, utilisation), *unknown_regularizers(chosen)]
    click.echo(render(found, words, assumptions))
    if output is not None:
        write_json(output, as_json(found, words, assumptions))


def _speed_in_words(cuda: bool, dtype: str, tflops: float | None, utilisation: float) -> list[str]:
    if tflops is None:
        return ["no hours: a CPU's speed differs too much; give --tflops, its measured peak in float32"]
    what = "GPU" if cuda else "process"
    return [f"a {what} reaches {utilisation:.0%} of its dense {dtype} peak of {tflops:g} TFLOP/s (--utilisation)"]
