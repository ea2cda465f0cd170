"""A study of seconds for tests that run the real command line: a random tower, four decoder layers, few pictures."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

STUDY = "tiny-smoke"
RUNS = ("baseline-s0", "pre-s0")
TASKS = ("gqa", "prebench_easy_vqa")
ALONE = ("--jobs", "1")
"""Options of a command whose processes side by side are not what is tested: each imports for seconds."""
SUITE = """
defaults: {preset: smoke}
max_error_share: 0.2
tasks:
  - {task: gqa, label: GQA on scenes, data_source: generated, primary_metric: exact_match, num_images: 6,
     questions_per_image: 4}
  - {task: prebench_easy_vqa, label: easy-VQA, data_source: real, primary_metric: exact_match, num_images: 30}
probe:
  num_train: 40
  num_val: 10
  num_test: 20
  attributes: [{name: background, kind: unasked}]
  reference_attribute: background
"""
SETTINGS = {
    "model.vision_tower.pretrained": "null",
    "model.vision_tower.hidden_size": 32,
    "model.vision_tower.num_hidden_layers": 1,
    "model.vision_tower.intermediate_size": 32,
    "model.language_model.pretrained": "null",
    "model.language_model.hidden_size": 32,
    "model.language_model.num_hidden_layers": 4,
    "model.language_model.intermediate_size": 64,
    "data.scenes.num_images": 40,
    "data.easy_vqa.num_images": 40,
    "train.align.steps": 2,
    "train.instruct.steps": 16,
    "train.log_every": 1,
}


def run_command(folder: Path, *more: str, **settings: object) -> list[str]:
    """Return `prebench run` of the tiny study with its results in `folder`; settings replace those above."""
    folder.mkdir(parents=True, exist_ok=True)
    suite = folder / "tiny.yaml"
    suite.write_text(SUITE)
    chosen = SETTINGS | {name.replace("__", "."): value for name, value in settings.items()}
    sets = [part for name, value in chosen.items() for part in ("--set", f"{name}={value}")]
    return command("run", "--suite", str(suite), "--results", str(folder), *sets, *more)


def command(*arguments: object) -> list[str]:
    """Return the real command line."""
    return [sys.executable, "-m", "prebench.cli", *map(str, arguments)]


def call(arguments: list[str], preexec: Callable[[], None] | None = None) -> subprocess.CompletedProcess[str]:
    """Run a command line to its end, one thread per process."""
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.run(
        arguments,
        capture_output=True,
        text=True,
        check=False,
        timeout=600,
        env=environment,
        preexec_fn=preexec,
    )


def assert_refused(done: subprocess.CompletedProcess[str], *parts: str) -> None:
    """Expect exit code 2, one line that says why, and no traceback."""
    assert done.returncode == 2, done.stderr[-3000:]
    assert "Traceback" not in done.stderr, done.stderr[-3000:]
    lines = [line for line in done.stderr.splitlines() if line.startswith("prebench:")]
    assert len(lines) == 1, done.stderr[-3000:]
    assert lines == done.stderr.splitlines()[-1:]
    for part in parts:
        assert part in lines[0], lines[0]


def finished(study: Path) -> dict[Path, tuple[int, str]]:
    """Return time of change and hash of every file that holds finished work."""
    logs = {run.parent.parent / "train.jsonl" for run in study.glob("runs/*/model/prebench.json")}
    patterns = ("runs/*/model/*", "runs/*/eval/*", "runs/*/probe.parquet", "mirror/**/*", "cache/*.safetensors")
    paths = logs | {path for pattern in patterns for path in study.glob(pattern) if not path.name.startswith(".")}
    return {
        path: (path.stat().st_mtime_ns, hashlib.sha256(path.read_bytes()).hexdigest())
        for path in sorted(paths)
        if path.is_file() and ".cache" not in path.parts
    }


def tables(study: Path) -> dict[str, bytes]:
    """Return the content of scores.csv, the tables, the figures, the answers and the probes by path."""
    patterns = ("scores.csv", "tables/*", "figures/*.svg", "runs/*/eval/*.samples.jsonl", "runs/*/probe.parquet")
    return {str(p.relative_to(study)): p.read_bytes() for pattern in patterns for p in sorted(study.glob(pattern))}
