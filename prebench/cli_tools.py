"""Commands that need no study: pretrained parts. Heavy imports happen inside commands."""

from __future__ import annotations

from pathlib import Path

import click


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
