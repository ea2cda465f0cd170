"""The ablation suite through the real command line: it goes on after a kill, and frozen features are computed once."""

from __future__ import annotations

import csv
import os
import signal
import subprocess
import time
from pathlib import Path

import pytest
import yaml

from prebench.config import load_suite
from prebench.runtime import data_dir
from prebench.store import read_jsonl
from tests.tiny_study import SETTINGS, call, command, finished

pytestmark = pytest.mark.slow

VARIANTS = load_suite("ablation").defaults.variants
TOWER = {name: value for name, value in SETTINGS.items() if not name.startswith("model.vision_tower.")}
RECIPE = TOWER | {"train.align.steps": 2, "train.instruct.steps": 4}
RECIPE |= {"train.validate_every": 4, "train.validation_images": 3}


def small(folder: Path) -> list[str]:
    """Return the command: the suite as it ships, with fewer pictures and questions, on the shipped vision tower."""
    suite = yaml.safe_load((data_dir("configs") / "suites" / "ablation.yaml").read_text())
    for task in suite["tasks"]:
        task |= {"num_images": 4} | ({"questions_per_image": 2} if "questions_per_image" in task else {})
    reference = [a for a in suite["probe"]["attributes"] if a["name"] == suite["probe"]["reference_attribute"]]
    suite["probe"] |= {"num_train": 40, "num_val": 10, "num_test": 20, "attributes": reference}
    suite["max_error_share"] = 0.9
    (folder / "ablation.yaml").write_text(yaml.safe_dump(suite))
    sets = [part for name, value in RECIPE.items() for part in ("--set", f"{name}={value}")]
    where = ["--suite", str(folder / "ablation.yaml"), "--preset", "smoke", "--results", str(folder)]
    return command("run", *where, "--seeds", "0", "--jobs", "1", *sets)


def test_the_grid_goes_on_after_a_kill_and_computes_frozen_features_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "200")  # cells of one line each
    study = tmp_path / "ablation-smoke"
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        small(tmp_path), env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True
    )
    try:
        while process.poll() is None and len(list(study.glob("runs/*/model/prebench.json"))) < 3:
            time.sleep(0.05)
        assert process.poll() is None, "it ended before it could be killed"
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    before = finished(study)
    assert before and len(list(study.glob("runs/*/model/prebench.json"))) < len(VARIANTS)

    done = call(small(tmp_path))
    assert done.returncode == 0, done.stderr[-3000:]
    after = finished(study)
    assert {path: after[path] for path in before} == before, "what was finished stays as it was"
    assert {path.parent.parent.name for path in study.glob("runs/*/model/prebench.json")} == {
        f"{name}-s0" for name in VARIANTS
    }
    computed = list(read_jsonl(study / "cache" / "features.jsonl"))
    # 80 pictures to train on, and 3 of each of two sources to validate with.
    assert [line["images"] for line in computed] == [80, 6], "one computation for all runs, the killed ones included"
    logs = [list(read_jsonl(path)) for path in study.glob("runs/*/train.jsonl")]
    assert len(logs) == len(VARIANTS) and all(any(line.get("kind") == "validation" for line in log) for log in logs)
    printed = " ".join(done.stdout.split())
    assert "ablation: score in % and gain over baseline" in printed
    assert "the paper's ablation (arXiv 2603.20808: CLIP* + Vicuna-7B, the real benchmarks; another model" in printed
    assert "62.7 (+0.7) 36.1 (+0.4) 46.6 (+1.1) 55.4 (+0.6) 22.0 (+2.0)" in printed
    assert "no claim: n too small" in printed
    with (study / "tables" / "ablation.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["variant"] for row in rows] == list(VARIANTS)
    assert rows[8]["layer"] == "quarter half three_quarters"
