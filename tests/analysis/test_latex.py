"""Every LaTeX table compiles with pdflatex and booktabs, whatever the names, and stays inside the page."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest
import yaml
from click.testing import CliRunner

from prebench.cli import main

from .conftest import sample, study_maker, write_curve, write_snapshots, write_task
from .test_ablation import make_grid

pytestmark = [pytest.mark.latex, pytest.mark.slow]

INSTALL = "apt-get install --no-install-recommends texlive-latex-base texlive-latex-recommended"
LABELS = {
    "gqa": "50% of #1_a & b",
    "prebench_easy_vqa": "{~^\\} $x$ <y> [z] |w|",
    "vqav2_val": "VQAv2 on scenes",
    "pope": "POPE on scenes",
}
TABLES = ("main", "question_types", "seeds", "probes", "degradation", "correlation", "matched", "dynamics")
GRID = ("ablation", "dose_response", "dose_trend")
STUDY = "a_b & 5% #1"
VARIANT = "pre_x.y-z"
DOCUMENT = r"""\documentclass{article}
\usepackage{booktabs}
%s
\begin{document}
\input{%s}
\end{document}
"""


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Tables that the command line writes for a study of awkward names, by name."""
    tmp_path = tmp_path_factory.mktemp("latex")
    folder = study_maker(tmp_path)({"baseline": 0.4, VARIANT: 0.7, "early": 0.5})
    for run in (folder / "runs").iterdir():
        write_curve(run, [1.5, 1.0, 0.7])
        for task in ("vqav2_val", "pope"):
            kinds = [{"question_type": ("color_count", "relation")[i % 2], "blind_score": i % 3 / 2} for i in range(40)]
            samples = [sample(i, float(i % 5 > 0), **kind) for i, kind in enumerate(kinds)]
            write_task(run, task, LABELS[task], "generated", samples)
    write_snapshots(folder)
    config = yaml.safe_load((folder / "study.yaml").read_text())
    known = config["suite"]["tasks"]
    config["suite"]["tasks"] = [known[0], known[1], known[0] | {"task": "vqav2_val"}, known[0] | {"task": "pope"}]
    for task in config["suite"]["tasks"]:
        task["label"] = LABELS[task["task"]]
    config["name"] = STUDY
    folder = folder.rename(folder.with_name(STUDY))
    (folder / "study.yaml").write_text(yaml.safe_dump(config))
    _prebench("report", "--results", folder.parent)
    compared = tmp_path / "compare.tex"
    _prebench("compare", "baseline", VARIANT, "--results", folder.parent, "--format", "latex", "-o", compared)
    grid = make_grid(tmp_path / "grid", 3)
    _prebench("report", "--results", grid.parent)
    known = {path.stem for path in (grid / "tables").glob("*.tex")}
    assert known >= set(GRID)
    own = [grid / "tables" / f"{name}.tex" for name in GRID]
    paths = [*sorted((folder / "tables").glob("*.tex")), *own, compared]
    return {path.stem: path.read_text(encoding="utf-8") for path in paths}


def _prebench(*arguments: object) -> None:
    result = CliRunner().invoke(main, [str(a) for a in arguments])
    assert result.exit_code == 0, result.output


def _compile(folder: Path, name: str, text: str, packages: str) -> str:
    """Return pdflatex's log of a document that holds one table."""
    if shutil.which("pdflatex") is None:
        pytest.fail(f"pdflatex is missing; install it: {INSTALL}")
    (folder / f"{name}.tex").write_text(text, encoding="utf-8")
    (folder / "document.tex").write_text(DOCUMENT % (packages, name), encoding="utf-8")
    command = ["pdflatex", "-interaction=nonstopmode", "-halt-on-error", "document.tex"]
    done = subprocess.run(command, cwd=folder, capture_output=True, timeout=120, check=False)
    log = (folder / "document.log").read_text(encoding="latin-1")
    assert done.returncode == 0, f"{name}: {log[-2000:]}"
    return log


def test_every_table_compiles_and_stays_inside_the_page(sources: dict[str, str], tmp_path: Path) -> None:
    assert set(sources) == {*TABLES, *GRID, "compare"}
    for name, text in sources.items():
        log = _compile(tmp_path, name, text, r"\usepackage{graphicx}")
        wide = [line for line in log.splitlines() if re.match(r"Overfull|LaTeX Warning: Float too large", line)]
        assert not wide, f"{name}: {wide}"


def test_booktabs_alone_is_enough_to_compile(sources: dict[str, str], tmp_path: Path) -> None:
    for name, text in sources.items():
        _compile(tmp_path, name, text, "")


def test_names_are_printed_as_they_are_written(sources: dict[str, str]) -> None:
    assert r"50\% of \#1\_a \& b" in sources["main"]
    assert r"pre\_x.y-z" in sources["probes"]
    assert r"Study a\_b \& 5\% \#1" in sources["degradation"]
