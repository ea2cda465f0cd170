"""Documents shared out over two processes get the answers and the aggregates of one process."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from prebench.runtime import data_dir
from tests.evaluation import mirror as mirror_module
from tests.evaluation.mirror import write_mirror

pytestmark = pytest.mark.slow
TASKS = ("gqa", "prebench_visual_probe")


@pytest.fixture(scope="module")
def mirror(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A mirror with 15 questions of gqa: lmms-eval fills up the second share with a copy of its last request."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(mirror_module, "NUM_IMAGES", 5)
        patch.setattr(mirror_module, "QUESTIONS", mirror_module.QUESTIONS[:3])
        return write_mirror(tmp_path_factory.mktemp("mirror"))


def _lmms_eval(mirror: Path, output: Path, model: Path, tasks: str, processes: int) -> subprocess.CompletedProcess[str]:
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
    command = [sys.executable, "-P", *(launcher if processes > 1 else []), "-m", "lmms_eval", "--model", "prebench"]
    command += ["--model_args", f"pretrained={model}", "--tasks", tasks, "--batch_size", "1", "--log_samples"]
    command += ["--include_path", str(data_dir("tasks")), "--output_path", str(output)]
    offline = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "HF_DATASETS_CACHE": str(mirror / "cache")}
    shards = output / "probe"
    shards.mkdir(parents=True)
    leaked = ("HF_", "LMMS_EVAL_", "PREBENCH_", "TORCHELASTIC_", "RANK", "LOCAL_", "WORLD_", "MASTER_")
    clean = {name: value for name, value in os.environ.items() if not name.startswith(leaked)}  # of tests before
    settings = offline | {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1", "PREBENCH_PROBE_DIR": str(shards)}
    return subprocess.run(
        command, cwd=mirror, env=clean | settings, capture_output=True, text=True, check=False, timeout=600
    )


def _results(output: Path) -> tuple[dict, dict[int, str]]:
    """Return each task's aggregates and gqa's answers by document."""
    (path,) = output.rglob("*_results.json")
    found = json.loads(path.read_text(encoding="utf-8"))["results"]
    lines = next(output.rglob("*_samples_gqa.jsonl")).read_text(encoding="utf-8").splitlines()
    samples = [json.loads(line) for line in lines]
    assert len(samples) == 15
    answers = {sample["doc_id"]: sample["filtered_resps"] for sample in samples}
    return {task: {k: v for k, v in found[task].items() if k.endswith(",none")} for task in TASKS}, answers


def test_two_processes_give_what_one_gives(tiny_export: Path, mirror: Path, tmp_path: Path) -> None:
    found = []
    for processes in (1, 2):
        output = tmp_path / str(processes)
        done = _lmms_eval(mirror, output, tiny_export, ",".join(TASKS), processes)
        assert done.returncode == 0, done.stderr[-3000:]
        found.append(_results(output))
        assert len(list(output.glob("probe/features-rank*.safetensors"))) == processes
    assert sorted(found[0][1]) == list(range(15)) and len(set(map(str, found[0][1].values()))) > 5
    assert found[0] == found[1]
    assert set(found[0][0]["prebench_visual_probe"]) >= {"degradation,none", "encoder_accuracy,none"}


def test_a_failed_document_ends_all_processes_with_a_code(tiny_export: Path, mirror: Path, tmp_path: Path) -> None:
    """Document 3 is the second process's; the first one must not wait for it for ever."""
    broken = Path(shutil.copytree(mirror, tmp_path / "mirror"))
    path = broken / "prebench" / "easy_vqa" / "default.parquet"
    table = pq.read_table(path)
    rows = table.to_pylist()
    rows[3]["image"]["bytes"] = rows[3]["image"]["bytes"][:5000]
    pq.write_table(pa.Table.from_pylist(rows, schema=table.schema), path)
    done = _lmms_eval(broken, tmp_path / "out", tiny_export, "prebench_easy_vqa", 2)
    assert done.returncode != 0, done.stdout[-3000:]
    shown = " ".join(done.stderr.split())
    assert "prebench: 1 of 8 documents failed (prebench_easy_vqa document 3: OSError: image file is truncated" in shown
    assert not list((tmp_path / "out").rglob("*_results.json"))
