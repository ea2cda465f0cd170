"""Data flows one way: no import points up, and only evaluation knows lmms-eval (docs: README, Layout)."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

import prebench

ROOT = Path(prebench.__file__).parent
BASE = {"errors", "records", "schema", "config", "runtime", "store", "progress", "study", "images", "__init__"}
CLI = {"cli", "cli_options", "cli_analysis", "cli_plan", "cli_probe", "cli_tools"}
ALLOWED = {
    "errors": set(),
    "records": set(),
    "images": set(),
    "runtime": {"errors", "__init__"},
    "schema": set(),
    "config": {"errors", "runtime", "schema"},
    "store": {"records", "errors"},
    "progress": set(),
    "jobs": {"errors", "progress", "runtime"},
    "launch": {"errors", "runtime", "store"},
    "study": {"config", "errors", "runtime", "schema", "store"},
    "data": BASE,
    "model": BASE | {"data"},
    "train": BASE | {"data", "model"},
    "costs": BASE | {"data", "model"},
    "export": BASE | {"model"},
    "probe": BASE | {"model"},
    "evaluation": BASE | {"model", "probe"},
    "analysis": BASE,
    "train_runs": BASE | {"jobs", "data", "model", "train", "export"},
    "pipeline": BASE
    | {"launch", "jobs", "train_runs", "data", "model", "train", "export", "probe", "evaluation", "analysis"},
    "cli": BASE | CLI | {"launch", "pipeline", "analysis"},
    "cli_options": {"analysis"},
    "cli_analysis": BASE | {"analysis", "cli_options"},
    "cli_plan": BASE | {"analysis", "cli_options", "costs"},
    "cli_probe": BASE | {"cli_options", "pipeline", "data", "export", "probe", "analysis"},
    "cli_tools": BASE | {"cli_options", "data", "model", "evaluation"},
    "__init__": {"train"},  # its public names, loaded when they are asked for
}
MODULES = sorted(ROOT.rglob("*.py"))


def imports(path: Path) -> set[str]:
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def part(path: Path) -> str:
    return path.relative_to(ROOT).parts[0].removesuffix(".py")


@pytest.mark.parametrize("path", MODULES, ids=lambda p: str(p.relative_to(ROOT)))
def test_no_import_points_up(path):
    for name in imports(path):
        parts = name.split(".")
        if parts[0] != "prebench":
            continue
        target = parts[1] if (ROOT / parts[1]).is_dir() or (ROOT / f"{parts[1]}.py").is_file() else "__init__"
        assert target == part(path) or target in ALLOWED[part(path)], f"{path} imports {name}"


@pytest.mark.parametrize(
    ("package", "owners"), [("lmms_eval", {"evaluation"}), ("accelerate", {"train", "evaluation"}), ("click", CLI)]
)
def test_frameworks_have_one_owner(package, owners):
    users = {part(p) for p in MODULES if any(n.split(".")[0] == package for n in imports(p))}
    assert users == owners


def test_analysis_never_needs_torch():
    for path in MODULES:
        if part(path) == "analysis":
            assert not any(n.split(".")[0] in ("torch", "transformers") for n in imports(path)), path


def test_files_stay_readable():
    for path in MODULES:
        assert len(path.read_text(encoding="utf-8").splitlines()) <= 400, path
