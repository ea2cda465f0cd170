"""Rewrite the block of README.md that shows the stored reference study: `python docs/readme.py [--study FOLDER]`.

The block is made from the study's verdict.txt, main.csv, degradation.csv and figure alone, so that it can't say what
the tables don't say.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

import pandas as pd

from prebench.analysis.render import interval, percent
from prebench.config import read_yaml, validate
from prebench.errors import PrebenchError, StoreError
from prebench.schema import StudyConfig
from prebench.store import write_text

ROOT = Path(__file__).parent.parent
BEGIN = "<!-- reference study: begin -->"
END = "<!-- reference study: end -->"
LEGEND = (
    "Scores in % ± SD over seeds (one seed: half the 95% interval over images). Degradation D: probe accuracy at the "
    "vision encoder minus at the middle layers, in points; reduction: against the baseline of the same seed. "
    "Intervals: 95% t over seeds. (generated): data in the benchmark's format, not the benchmark."
)
NEEDED = ("study.yaml", "tables/verdict.txt", "tables/main.csv", "tables/degradation.csv", "figures/layer_curves.svg")


def block(study: Path, readme: Path) -> str:
    """Return the block, markers included, as Markdown.

    Args:
        study: folder of the study; links are relative to the README.
        readme: where the block will stand.

    Raises:
        StoreError: a file of the study is missing (it is named) or can't be read.
        ConfigError: study.yaml is malformed.
    """
    for name in NEEDED:
        if not (study / name).is_file():
            raise StoreError(f"{study / name}: not found; `prebench report` writes it")
    config = validate(StudyConfig, read_yaml(study / "study.yaml"), str(study / "study.yaml"))
    link = Path(os.path.relpath(study, readme.parent)).as_posix()
    verdict = (study / "tables" / "verdict.txt").read_text(encoding="utf-8").splitlines()
    seeds = "one seed" if len(config.seeds) == 1 else f"{len(config.seeds)} seeds"
    parts = [
        BEGIN,
        f"**What the study [`{config.name}`]({link}) shows** (preset `{config.preset.name}`, {seeds} per variant):",
        "\n".join(f"- {line}" for line in verdict),
        _table(study),
        LEGEND,
        f"![Probes of the visual tokens by layer]({link}/figures/layer_curves.svg)",
        END,
    ]
    return "\n\n".join(parts)


def _table(study: Path) -> str:
    main = pd.read_csv(study / "tables" / "main.csv")
    degraded = pd.read_csv(study / "tables" / "degradation.csv")
    claim = degraded[degraded["claim"].astype(bool)].set_index("variant")
    tasks = [name for name in main.columns[3:] if not name.endswith(" ±")]
    names = list(claim["attribute"].unique())
    shown = [f"D of {names[0]}", "reduction"] if names else []
    rows = []
    for _, row in main.iterrows():
        cells = [str(row["variant"]), *(_score(row[task], row[f"{task} ±"]) for task in tasks)]
        if shown and row["variant"] in claim.index:
            mine = claim.loc[row["variant"]]
            cells.append(_with_interval(mine["degradation"], mine["low_degradation"], mine["high_degradation"]))
            cells.append(_with_interval(mine["reduction"], mine["low"], mine["high"]))
        rows.append(cells + [""] * (1 + len(tasks) + len(shown) - len(cells)))
    header = ["", *tasks, *shown]
    lines = [header, ["---", *["---:"] * (len(header) - 1)], *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)


def _score(mean: float, spread: float) -> str:
    return percent(mean) + ("" if pd.isna(spread) else f" ± {percent(spread)}")


def _with_interval(value: float, low: float, high: float) -> str:
    if pd.isna(value):
        return ""
    return percent(value, signed=True) + ("" if pd.isna(low) else f" {interval(low, high)}")


def rewritten(text: str, new: str, readme: Path) -> str:
    """Return a README with its block replaced, or put before the first heading of the second level.

    Raises:
        StoreError: one marker of the two is missing, or a marker stands twice.
    """
    if text.count(BEGIN) != text.count(END) or text.count(BEGIN) > 1:
        raise StoreError(f"{readme}: {BEGIN!r} and {END!r} must both stand there once, or not at all")
    if BEGIN in text:
        before, rest = text.split(BEGIN)
        return before + new + rest.split(END)[1]
    before, heading, rest = text.partition("\n## ")
    return f"{before}\n{new}\n{heading}{rest}"


def main() -> int:
    """Rewrite the README; 2 where the input is wrong."""
    parser = argparse.ArgumentParser(description="Rewrite the block of README.md that shows the reference study.")
    parser.add_argument("--study", type=Path, default=ROOT / "results" / "reference", help="folder of the study")
    parser.add_argument("--readme", type=Path, default=ROOT / "README.md")
    arguments = parser.parse_args()
    try:
        text = arguments.readme.read_text(encoding="utf-8")
        study, readme = arguments.study.resolve(), arguments.readme.resolve()
        write_text(readme, rewritten(text, block(study, readme), readme))
    except (PrebenchError, OSError) as error:
        sys.stderr.write(f"readme.py: {error}\n")
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
