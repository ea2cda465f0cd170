"""A command that reads a study's records alone: compare."""

from __future__ import annotations

from pathlib import Path

import click

from prebench.cli_options import chosen_study, results_option, study_option, width


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
