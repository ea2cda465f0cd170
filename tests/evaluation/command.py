"""The real `lmms-eval` command, as a user would run it on a mirror."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

from prebench.runtime import data_dir


def lmms_eval_command(
    mirror: Path, output: Path, model: str, arguments: str, task: str, *more: str
) -> subprocess.CompletedProcess[str]:
    """Run the lmms-eval command offline in a mirror; results and samples go to `output`."""
    command = [sys.executable, "-P", "-m", "lmms_eval", "--model", model, "--model_args", arguments, "--tasks", task]
    command += ["--include_path", str(data_dir("tasks")), "--output_path", str(output), "--log_samples"]
    offline = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "HF_DATASETS_CACHE": str(output / "cache")}
    return subprocess.run(
        [*command, "--batch_size", "1", *more],
        cwd=mirror,
        env=os.environ | offline,
        capture_output=True,
        text=True,
        check=False,
    )


def run_lmms_eval(mirror: Path, output: Path, model: str, arguments: str, task: str, *more: str) -> dict:
    """Run the lmms-eval command and return its exact_match and its answers by document (stripped, as it logs them)."""
    done = lmms_eval_command(mirror, output, model, arguments, task, *more)
    assert done.returncode == 0, done.stderr[-3000:]
    results = json.loads(next(output.rglob("*_results.json")).read_text(encoding="utf-8"))["results"][task]
    lines = next(output.rglob(f"*_samples_{task}.jsonl")).read_text(encoding="utf-8").splitlines()
    answers = {sample["doc_id"]: sample["filtered_resps"] for sample in map(json.loads, lines)}
    texts = {doc_id: (a if isinstance(a, str) else a[0]).strip() for doc_id, a in answers.items()}
    score = next((value for key, value in results.items() if key.startswith("exact_match,")), None)
    return {"score": score, "texts": texts, "results": results}
