"""`lmms-eval --tasks prebench_visual_probe`, in one process and in two, and `prebench probe` give the same numbers."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest
from click.testing import CliRunner

from prebench.cli import main
from prebench.config import load_suite
from prebench.data.mirror import build_mirror
from prebench.evaluation.probe_task import DEFAULT_ATTRIBUTES
from prebench.runtime import data_dir
from prebench.store import read_json, write_json

pytestmark = pytest.mark.slow
KEYS = ["layer", "num_layers", "level", "attribute", "kind", "metric", "n"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A suite of 45 scenes (an odd number: the second process gets fewer), and its mirror."""
    root = tmp_path_factory.mktemp("agreement")
    attributes = [attribute.model_dump() for attribute in DEFAULT_ATTRIBUTES]
    sizes = {"num_train": 24, "num_val": 8, "num_test": 13}
    probe = {"attributes": attributes, "reference_attribute": "background", **sizes}
    write_json(root / "tiny.yaml", {"defaults": {"preset": "smoke"}, "tasks": [], "probe": probe})
    build_mirror(root / "mirror", load_suite(str(root / "tiny.yaml")))
    return root


@pytest.fixture(scope="module")
def ours(folder: Path, tiny_export: Path) -> pd.DataFrame:
    arguments = ["probe", tiny_export, "--suite", folder / "tiny.yaml", "--output", folder / "ours", "--device", "cpu"]
    result = CliRunner().invoke(main, [*map(str, arguments), "--no-random-weights"])
    assert result.exit_code == 0, result.output
    return pd.read_parquet(folder / "ours" / "probe.parquet").set_index(KEYS)["value"].sort_index()


def lmms_eval(folder: Path, model: Path, processes: int) -> tuple[pd.Series, dict[str, float]]:
    """Run upstream's command; return the rows that the aggregation left, and its results."""
    output = folder / f"lmms-{processes}"
    (output / "probe").mkdir(parents=True)
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
    command = [sys.executable, "-P", *(launcher if processes > 1 else []), "-m", "lmms_eval", "--model", "prebench"]
    command += ["--model_args", f"pretrained={model},device=cpu", "--tasks", "prebench_visual_probe"]
    command += ["--include_path", str(data_dir("tasks")), "--output_path", str(output), "--batch_size", "1"]
    settings = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "HF_DATASETS_CACHE": str(folder / "cache")}
    settings |= {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1", "PREBENCH_PROBE_DIR": str(output / "probe")}
    done = subprocess.run(
        command,
        cwd=folder / "mirror",
        env=os.environ | settings,
        capture_output=True,
        text=True,
        check=False,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert len(list((output / "probe").glob("features-rank*.safetensors"))) == processes
    rows = pd.DataFrame(read_json(output / "probe" / "probe_layers.json")).set_index(KEYS)["value"].sort_index()
    (path,) = output.rglob("*_results.json")
    found = read_json(path)["results"]["prebench_visual_probe"]
    return rows, {key.removesuffix(",none"): value for key, value in found.items() if key.endswith(",none")}


@pytest.mark.parametrize("processes", [1, 2])
def test_lmms_eval_and_prebench_probe_agree(folder: Path, tiny_export: Path, ours: pd.Series, processes: int) -> None:
    rows, results = lmms_eval(folder, tiny_export, processes)
    assert {"global", "patch", "statistics", "similarity", "lm_head", "model"} <= set(
        rows.index.get_level_values("level")
    )
    pd.testing.assert_series_equal(rows, ours, rtol=0, atol=1e-6)
    accuracy = ours.xs("background", level="attribute").xs("accuracy", level="metric").droplevel(list(KEYS[1:3]))
    by = {layer: float(value) for layer, value in zip(accuracy.index.get_level_values("layer"), accuracy, strict=True)}
    middle = (by[1] + by[2] + by[3]) / 3
    expected = {"encoder_accuracy": by[-1], "mid_depth_accuracy": middle, "degradation": by[-1] - middle}
    assert {name: results[name] for name in expected} == pytest.approx(expected, abs=1e-6)
