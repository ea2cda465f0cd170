"""The real `lmms-eval` command, as a user would run it on a mirror."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

from prebench.runtime import data_dir


def run_lmms_eval(
    mirror: Path, output: Path, model: str, arguments: str, *tasks: str, limit: int | None = None
) -> dict[str, dict]:
    """Run the lmms-eval command offline in a mirror; results and samples go to `output`.

    Returns:
        By task: exact_match as `score`, the answers by document as `texts` (stripped, as it logs them).
    """
    names = ",".join(tasks)
    command = [sys.executable, "-P", "-m", "lmms_eval", "--model", model, "--model_args", arguments, "--tasks", names]
    command += ["--include_path", str(data_dir("tasks")), "--output_path", str(output), "--log_samples"]
    command += ["--batch_size", "1", *([] if limit is None else ["--limit", str(limit)])]
    offline = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "HF_DATASETS_CACHE": str(output / "cache")}
    done = subprocess.run(command, cwd=mirror, env=os.environ | offline, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    results = json.loads(next(output.rglob("*_results.json")).read_text(encoding="utf-8"))["results"]
    return {task: {"score": results[task]["exact_match,none"], "texts": _texts(output, task)} for task in tasks}


def _texts(output: Path, task: str) -> dict[int, str]:
    lines = next(output.rglob(f"*_samples_{task}.jsonl")).read_text(encoding="utf-8").splitlines()
    answers = {sample["doc_id"]: sample["filtered_resps"] for sample in map(json.loads, lines)}
    return {doc_id: (a if isinstance(a, str) else a[0]).strip() for doc_id, a in answers.items()}
