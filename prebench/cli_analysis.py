"""Commands that read a study's records alone: compare and plan."""

from __future__ import annotations

from pathlib import Path

import click

from prebench.cli_options import chosen_study, results_option, study_option, width
from prebench.errors import ConfigError


@click.command()
@click.argument("baseline")
@click.argument("variant")
@study_option
@results_option
@click.option(
    "--format", "form", type=click.Choice(["text", "csv", "latex", "json"]), default="text", show_default=True
)
@click.option(
    "--margin",
    type=click.FloatRange(min=0, min_open=True),
    default=1.0,
    show_default=True,
    help="Equivalence margin, in points: a smaller difference either way counts as none.",
)
@click.option("-o", "--output", type=click.Path(path_type=Path, dir_okay=False), help="Write to a file.")
def compare(
    baseline: str, variant: str, study: str | None, results: Path, form: str, margin: float, output: Path | None
) -> None:
    """Set two variants side by side: paired differences with 95% intervals.

    \b
    Examples:
      prebench compare baseline pre
      prebench compare baseline pre --margin 0.5       does it cost less than half a point anywhere?
      prebench compare baseline pre --format latex -o pre.tex
    """
    from prebench.analysis.compare import compare as compare_variants
    from prebench.analysis.compare import render
    from prebench.analysis.join import load_study
    from prebench.store import write_text

    comparison = compare_variants(load_study(chosen_study(results, study)), baseline, variant, margin / 100)
    text = render(comparison, form, width=width())
    if output is None:
        click.echo(text)
    else:
        write_text(output, text if text.endswith("\n") else text + "\n")
        click.echo(f"written: {output}", err=True)


@click.command()
@click.argument("variants", nargs=-1, metavar="[BASELINE VARIANT]")
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
def plan(
    variants: tuple[str, ...],
    difference: float,
    power: float,
    study: str | None,
    results: Path,
    seed_sd: float | None,
    discordant: float,
    icc: float,
    questions_per_image: float,
) -> None:
    """Say how many seeds and images it takes to find a difference.

    \b
    Examples:
      prebench plan baseline pre --difference 0.5        from the spreads of a study
      prebench plan --seed-sd 0.8 --discordant 10 --questions-per-image 30       before any study
    """
    from prebench.analysis import power as planning
    from prebench.analysis.compare import compare as compare_variants
    from prebench.analysis.join import load_study

    if seed_sd is not None:
        shares = (discordant / 100, icc, questions_per_image)
        click.echo(planning.text_before(difference / 100, power, seed_sd / 100, *shares))
        return
    loaded = load_study(chosen_study(results, study))
    names = variants or tuple(loaded.variants[:2])
    if len(names) != 2:
        raise ConfigError(
            f"plan: two variants are compared, not {len(names)}; or give --seed-sd to plan without a study"
        )
    click.echo(planning.text(compare_variants(loaded, *names), difference / 100, power, width()))
