"""lmms-eval's command in one process and two: equal answers and aggregates, and the numbers of `prebench probe`."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from click.testing import CliRunner

from prebench.cli import main
from prebench.config import load_suite
from prebench.data.mirror import build_mirror
from prebench.evaluation.probe_task import DEFAULT_ATTRIBUTES
from prebench.runtime import data_dir
from prebench.store import read_json, write_json
from tests.evaluation import mirror as mirror_module
from tests.evaluation.mirror import write_questions

pytestmark = pytest.mark.slow
PROBE = "prebench_visual_probe"
TASKS = ("gqa", PROBE)
KEYS = ["layer", "num_layers", "level", "attribute", "kind", "metric", "n"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A suite of 45 scenes and a mirror of them, with 15 questions of gqa.

    Odd numbers: the second process has fewer scenes, and lmms-eval fills up its questions with a copy of the last one.
    """
    root = tmp_path_factory.mktemp("processes")
    attributes = [attribute.model_dump() for attribute in DEFAULT_ATTRIBUTES]
    sizes = {"num_train": 24, "num_val": 8, "num_test": 13}
    probe = {"attributes": attributes, "reference_attribute": "background", **sizes}
    write_json(root / "tiny.yaml", {"defaults": {"preset": "smoke"}, "tasks": [], "probe": probe})
    build_mirror(root / "mirror", load_suite(str(root / "tiny.yaml")))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(mirror_module, "NUM_IMAGES", 5)
        patch.setattr(mirror_module, "QUESTIONS", mirror_module.QUESTIONS[:3])
        write_questions(root / "mirror")
    return root


def lmms_eval(mirror: Path, output: Path, model: Path, tasks: str, processes: int) -> subprocess.CompletedProcess[str]:
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
    command = [sys.executable, "-P", *(launcher if processes > 1 else []), "-m", "lmms_eval", "--model", "prebench"]
    command += ["--model_args", f"pretrained={model}", "--tasks", tasks, "--batch_size", "1", "--log_samples"]
    command += ["--include_path", str(data_dir("tasks")), "--output_path", str(output)]
    offline = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "HF_DATASETS_CACHE": str(mirror / "cache")}
    (output / "probe").mkdir(parents=True)
    leaked = ("HF_", "LMMS_EVAL_", "PREBENCH_", "TORCHELASTIC_", "RANK", "LOCAL_", "WORLD_", "MASTER_")
    clean = {name: value for name, value in os.environ.items() if not name.startswith(leaked)}  # of tests before
    settings = {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1", "PREBENCH_PROBE_DIR": str(output / "probe")}
    return subprocess.run(
        command, cwd=mirror, env=clean | offline | settings, capture_output=True, text=True, check=False, timeout=600
    )


@pytest.fixture(scope="module")
def evaluated(folder: Path, tiny_export: Path) -> Callable[[int], Path]:
    """Return a function from a number of processes to the output of lmms-eval's command, each called once."""

    @cache
    def run(processes: int) -> Path:
        output = folder / f"lmms-{processes}"
        done = lmms_eval(folder / "mirror", output, tiny_export, ",".join(TASKS), processes)
        assert done.returncode == 0, done.stderr[-3000:]
        assert len(list(output.glob("probe/features-rank*.safetensors"))) == processes
        return output

    return run


def aggregates(output: Path, task: str) -> dict[str, float]:
    (path,) = output.rglob("*_results.json")
    found = read_json(path)["results"][task]
    return {name.removesuffix(",none"): value for name, value in found.items() if name.endswith(",none")}


def answers(output: Path) -> dict[int, str]:
    """Return gqa's answers by document."""
    lines = next(output.rglob("*_samples_gqa.jsonl")).read_text(encoding="utf-8").splitlines()
    samples = [json.loads(line) for line in lines]
    assert len(samples) == 15
    return {sample["doc_id"]: sample["filtered_resps"] for sample in samples}


def test_two_processes_give_what_one_gives(evaluated: Callable[[int], Path]) -> None:
    one, two = evaluated(1), evaluated(2)
    assert sorted(answers(one)) == list(range(15)) and len(set(map(str, answers(one).values()))) > 5
    assert answers(one) == answers(two)
    for task in TASKS:
        assert aggregates(one, task) == aggregates(two, task), task
    assert set(aggregates(one, PROBE)) >= {"degradation", "encoder_accuracy"}


@pytest.fixture(scope="module")
def ours(folder: Path, tiny_export: Path) -> pd.Series:
    """What `prebench probe` finds, without lmms-eval."""
    arguments = ["probe", tiny_export, "--suite", folder / "tiny.yaml", "--output", folder / "ours", "--device", "cpu"]
    result = CliRunner().invoke(main, [*map(str, arguments), "--no-random-weights"])
    assert result.exit_code == 0, result.output
    return pd.read_parquet(folder / "ours" / "probe.parquet").set_index(KEYS)["value"].sort_index()


@pytest.mark.parametrize("processes", [1, 2])
def test_lmms_eval_and_prebench_probe_agree(evaluated: Callable[[int], Path], ours: pd.Series, processes: int) -> None:
    output = evaluated(processes)
    rows = pd.DataFrame(read_json(output / "probe" / "probe_layers.json")).set_index(KEYS)["value"].sort_index()
    assert {"global", "patch", "statistics", "similarity", "lm_head", "model"} <= set(
        rows.index.get_level_values("level")
    )
    pd.testing.assert_series_equal(rows, ours, rtol=0, atol=1e-6)
    accuracy = ours.xs("background", level="attribute").xs("accuracy", level="metric").droplevel(list(KEYS[1:3]))
    by = {layer: float(value) for layer, value in zip(accuracy.index.get_level_values("layer"), accuracy, strict=True)}
    middle = (by[1] + by[2] + by[3]) / 3
    expected = {"encoder_accuracy": by[-1], "mid_depth_accuracy": middle, "degradation": by[-1] - middle}
    results = aggregates(output, PROBE)
    assert {name: results[name] for name in expected} == pytest.approx(expected, abs=1e-6)


def test_a_failed_document_ends_all_processes_with_a_code(folder: Path, tiny_export: Path, tmp_path: Path) -> None:
    """Document 3 is the second process's; the first one must not wait for it for ever."""
    broken = Path(shutil.copytree(folder / "mirror", tmp_path / "mirror"))
    path = broken / "prebench" / "easy_vqa" / "default.parquet"
    table = pq.read_table(path)
    rows = table.to_pylist()
    rows[3]["image"]["bytes"] = rows[3]["image"]["bytes"][:5000]
    pq.write_table(pa.Table.from_pylist(rows, schema=table.schema), path)
    done = lmms_eval(broken, tmp_path / "out", tiny_export, "prebench_easy_vqa", 2)
    assert done.returncode != 0, done.stdout[-3000:]
    shown = " ".join(done.stderr.split())
    assert "prebench: 1 of 8 documents failed (prebench_easy_vqa document 3: OSError: image file is truncated" in shown
    assert not list((tmp_path / "out").rglob("*_results.json"))
