"""The command line: help, dry runs, and one clear line with exit code 2 for bad input."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner

from prebench.cli import main
from prebench.config import load_preset, load_suite, load_variant
from prebench.schema import StudyConfig
from prebench.study import open_study

COMMANDS = ("compare", "doctor", "evaluate", "list", "mirror", "plan", "pretrain", "probe", "report", "run", "train")


def invoke(*arguments: object):
    return CliRunner().invoke(main, [str(a) for a in arguments])


def assert_refused(result, *parts: str) -> None:
    assert result.exit_code == 2, result.output
    assert isinstance(result.exception, SystemExit)
    lines = [line for line in result.stderr.splitlines() if line.startswith(("prebench:", "Error:"))]
    assert len(lines) == 1, result.stderr
    for part in parts:
        assert part in lines[0], lines[0]


@pytest.fixture
def study(tmp_path: Path) -> Path:
    config = StudyConfig(
        name="smoke-smoke",
        preset=load_preset("smoke"),
        suite=load_suite("smoke"),
        variants=(load_variant("baseline"), load_variant("pre")),
        seeds=(0,),
    )
    open_study(tmp_path / "smoke-smoke", config)
    return tmp_path


def test_help_imports_nothing_heavy():
    code = (
        "import sys; from click.testing import CliRunner; from prebench.cli import main; "
        "r = CliRunner().invoke(main, ['--help']); assert r.exit_code == 0, r.output; "
        "heavy = {'torch', 'transformers', 'pandas', 'pydantic', 'lmms_eval', 'numpy', 'yaml'} & set(sys.modules); "
        "assert not heavy, heavy"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help(command):
    result = invoke(command, "--help")
    assert result.exit_code == 0
    assert len(result.output.splitlines()) > 4
    assert sorted(main.commands) == sorted(COMMANDS)


def test_list_shows_what_is_shipped(study):
    result = invoke("list", "--results", study)
    assert result.exit_code == 0
    for name in ("embedded", "smoke", "full", "baseline", "pre", "gqa", "prebench_easy_vqa", "smoke-smoke"):
        assert name in result.output


def test_dry_run_writes_nothing(tmp_path):
    result = invoke("run", "--suite", "smoke", "--results", tmp_path / "results", "--dry-run")
    assert result.exit_code == 0
    assert "to train   baseline-s0, pre-s0" in result.output
    assert not (tmp_path / "results").exists()


@pytest.mark.parametrize(
    ("variants", "expected"),
    [
        ([], "baseline-s0, pre-s0, pre-shuffled-s0, pre-frozen-copy-s0, norm-penalty-s0, baseline-again-s0"),
        (
            ["--variants", "norm-penalty,baseline"],
            "norm-penalty-s0, baseline-s0, pre-shuffled-s0, pre-frozen-copy-s0, baseline-again-s0",
        ),
    ],
)
def test_controls_are_added_once(tmp_path, variants, expected):
    result = invoke("run", "--suite", "smoke", "--controls", "--results", tmp_path / "r", "--dry-run", *variants)
    assert result.exit_code == 0, result.output
    assert f"to train   {expected}\n" in result.output
    without = invoke("run", "--suite", "smoke", "--results", tmp_path / "r", "--dry-run", *variants)
    assert "baseline-again" not in without.output


def test_help_names_the_controls():
    text = " ".join(invoke("run", "--help").output.split())
    assert "--controls" in text
    for name in ("pre-shuffled", "pre-frozen-copy", "norm-penalty", "baseline-again"):
        assert name in text.replace("- ", "-")


def test_a_shuffled_anchor_needs_two_images(tmp_path):
    for change in ("train.align.batch_size=1", "train.align.gradient_accumulation_steps=16"):
        result = invoke("run", "--suite", "smoke", "--controls", "--set", change, "--results", tmp_path / "r")
        assert_refused(result, "variant pre-shuffled", "train.align.batch_size", "must be at least 2 (is 1)")
        assert not (tmp_path / "r").exists()


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (["--suite", "smok"], ["unknown suite 'smok'", "did you mean 'smoke'"]),
        (["--suite", "smoke", "--preset", "embeded"], ["unknown preset 'embeded'", "did you mean 'embedded'"]),
        (["--suite", "smoke", "--variants", "baseline,prr"], ["unknown variant 'prr'", "did you mean 'pre'"]),
        (["--suite", "smoke", "--set", "train.log_evry=1"], ["unknown key 'train.log_evry'", "'log_every'"]),
        (["--suite", "smoke", "--name", "../x"], ["--name '../x'", "plain folder name"]),
        (["--suite", "smoke", "--seeds", "a"], ["whole numbers"]),
        (["--suite", "smoke", "--seeds", "²"], ["whole numbers"]),
    ],
)
def test_bad_requests(tmp_path, arguments, parts):
    assert_refused(invoke("run", "--results", tmp_path / "results", *arguments), *parts)
    assert not (tmp_path / "results").exists()


def test_a_suite_without_embedded_data_is_refused_before_anything_is_written(tmp_path):
    text = """
defaults: {preset: smoke}
tasks:
  - {task: mmvp, label: MMVP, data_source: generated, primary_metric: accuracy, num_images: 5}
"""
    (tmp_path / "mine.yaml").write_text(text)
    for more in ([], ["--dry-run"]):
        result = invoke("run", "--suite", tmp_path / "mine.yaml", "--results", tmp_path / "results", *more)
        assert_refused(result, "task 'mmvp' has no embedded data")
        assert not (tmp_path / "results").exists()


def test_a_variant_of_an_impossible_layer_is_refused(tmp_path):
    (tmp_path / "deep.yaml").write_text("extends: baseline\nregularizer: {layer: 99}\n")
    result = invoke("run", "--suite", "smoke", "--variants", tmp_path / "deep.yaml", "--results", tmp_path / "results")
    assert_refused(result, "variant deep: regularizer.layer 99")


def test_evaluating_before_training_is_refused(study):
    assert_refused(invoke("evaluate", "--results", study), "no run is trained yet")
    assert_refused(invoke("probe", "--results", study), "no run is trained yet")


def test_malformed_yaml(tmp_path):
    path = tmp_path / "my.yaml"
    path.write_text("train: [1\n")
    assert_refused(invoke("run", "--preset", path, "--results", tmp_path / "r"), str(path), "malformed YAML")


def test_results_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("x")
    assert_refused(invoke("run", "--suite", "smoke", "--results", tmp_path / "file"), "can't be written", "--results")


def test_a_changed_recipe_is_refused(study):
    before = {p: p.read_bytes() for p in study.rglob("*") if p.is_file()}
    result = invoke("run", "--suite", "smoke", "--results", study, "--set", "train.instruct.steps=26")
    assert_refused(result, "preset.train.instruct.steps: 25 -> 26", "--name")
    assert {p: p.read_bytes() for p in study.rglob("*") if p.is_file() and p.name != ".lock"} == before


def test_compare_without_results(study):
    assert_refused(invoke("compare", "baseline", "pre", "--results", study, "--study", "smok-smoke"), "smoke-smoke")
    assert_refused(invoke("compare", "baseline", "pre", "--results", study))
    assert_refused(invoke("compare", "baseline", "pre", "--results", study / "none"))


def test_unknown_commands_and_tasks(study):
    assert_refused(invoke("comprae"), "unknown command 'comprae'", "did you mean 'compare'")
    assert_refused(invoke("evaluate", "--results", study, "--tasks", "gqaa"), "unknown task 'gqaa'", "'gqa'")
