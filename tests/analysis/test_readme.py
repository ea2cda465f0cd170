"""The README's block on the reference study says what the study's tables say, and nothing where there is no study."""

from __future__ import annotations

import importlib.util
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

from prebench.analysis.join import load_study
from prebench.analysis.plots import write_figures
from prebench.analysis.tables import write_tables

from .conftest import StudyMaker

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "docs" / "readme.py"
REFERENCE = ROOT / "results" / "reference"


@pytest.fixture(scope="module")
def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("readme", SCRIPT)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def study(make_study: StudyMaker) -> Path:
    folder = make_study()
    write_tables(load_study(folder))
    write_figures(load_study(folder))
    shutil.rmtree(folder / "runs")
    return folder


def rewrite(study: Path, readme: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(SCRIPT), "--study", str(study), "--readme", str(readme)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_the_readme_shows_the_stored_reference_study(script: ModuleType) -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    stored = (REFERENCE / "study.yaml").is_file()
    assert (text.count(script.BEGIN), text.count(script.END)) == (int(stored), int(stored))
    if stored:
        assert script.block(REFERENCE, ROOT / "README.md") in text, "run `python docs/readme.py`"


def test_the_block_is_put_below_the_introduction_and_then_replaced(study: Path, tmp_path: Path) -> None:
    readme = tmp_path / "README.md"
    readme.write_text("# x\n\nIntroduction.\n\n## Start\n\nmore\n\n## End\n")
    assert rewrite(study, readme).returncode == 0
    text = readme.read_text()
    assert text.startswith("# x\n\nIntroduction.\n\n<!-- reference study: begin -->\n\n")
    assert text.endswith("<!-- reference study: end -->\n\n## Start\n\nmore\n\n## End\n")
    for line in (study / "tables" / "verdict.txt").read_text().splitlines():
        assert f"\n- {line}\n" in text
    header, rule, *rows = [line for line in text.splitlines() if line.startswith("|")]
    assert header == "|  | GQA on scenes (generated) | easy_VQA & more | D of background | reduction |"
    assert len(rows) == 4 and all(line.count("|") == header.count("|") for line in (rule, *rows))
    assert rows[1].startswith("| pre | ") and rows[1].endswith(" | +15.0 | +11.0 [+8.5, +13.5] |")
    assert "](results/tiny-p/figures/layer_curves.svg)" in text
    assert (tmp_path / "results/tiny-p/figures/layer_curves.svg").is_file()
    (study / "tables" / "verdict.txt").write_text("Another verdict.\n")
    assert rewrite(study, readme).returncode == 0
    again = readme.read_text()
    assert "- Another verdict.\n" in again and again.count("reference study: begin") == 1
    assert again.endswith(text[text.index("## Start") :])
    assert rewrite(study, readme).returncode == 0 and readme.read_text() == again


def test_what_is_missing_is_named_and_nothing_is_written(study: Path, tmp_path: Path) -> None:
    readme = tmp_path / "README.md"
    readme.write_text("# x\n<!-- reference study: begin -->\n## Start\n")
    done = rewrite(study, readme)
    assert done.returncode == 2 and "must both stand there once" in done.stderr
    (study / "tables" / "main.csv").unlink()
    done = rewrite(study, readme)
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1 and "tables/main.csv: not found; `prebench report` writes it" in done.stderr
    assert readme.read_text() == "# x\n<!-- reference study: begin -->\n## Start\n"


@pytest.mark.parametrize(
    ("path", "ignored"),
    [
        ("study.yaml", False),
        ("scores.csv", False),
        ("tables/main.csv", False),
        ("figures/layer_curves.svg", False),
        ("runs/pre-s0/model/model.safetensors", True),
        ("mirror/x", True),
        ("cache/x", True),
    ],
)
def test_the_reference_study_can_be_committed_without_its_models(path: str, ignored: bool, tmp_path: Path) -> None:
    subprocess.run(["git", "init", "-q", str(tmp_path)], check=True, capture_output=True)
    shutil.copy(ROOT / ".gitignore", tmp_path)
    command = ["git", "-C", str(tmp_path), "check-ignore", "-q", f"results/reference/{path}"]
    assert (subprocess.run(command, check=False).returncode == 0) == ignored
