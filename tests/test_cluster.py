"""A study trained by several real processes: through a launcher, interrupted, and run by run as SLURM's jobs."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from click.testing import CliRunner

from prebench.cli import main
from tests.tiny_study import RUNS, STUDY, call, run_command

ROOT = Path(__file__).parents[1]
LAUNCH = "accelerate launch --multi_gpu --num_processes 2 --num_machines 1 --mixed_precision no --dynamo_backend no"
ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1"}


def weights(study: Path) -> dict[str, bytes]:
    return {name: (study / "runs" / name / "model/model.safetensors").read_bytes() for name in RUNS}


@pytest.mark.slow
def test_a_launched_study_goes_on_after_an_interruption_and_ends_with_a_report(tmp_path):
    suite = tmp_path / "short.yaml"
    suite.write_text(SUITE)
    more = ("--launch", LAUNCH, "--variants", "pre", "--suite", str(suite), "--name", STUDY)
    arguments = run_command(tmp_path, *more, train__log_every=1, train__instruct__steps=60)
    log = tmp_path / STUDY / "runs/pre-s0/train.jsonl"
    with subprocess.Popen(arguments, env=ENVIRONMENT, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        while not (log.is_file() and log.read_bytes().count(b"\n") > 3):
            assert process.poll() is None, process.stderr.read()
            time.sleep(0.01)
        process.send_signal(signal.SIGTERM)
        assert process.stderr.read().splitlines()[-1].startswith("prebench: interrupted after step ")
    assert process.returncode == 75
    assert list((tmp_path / STUDY).glob("runs/pre-s0/checkpoints/step-*"))
    assert not list((tmp_path / STUDY).glob(".launch-*"))
    done = call(arguments)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "goes on after step" in done.stderr
    assert (tmp_path / STUDY / "report.html").is_file() and (tmp_path / STUDY / "scores.csv").is_file()
    assert log.read_bytes().count(b"\n") == 62


SUITE = """
defaults: {preset: smoke}
tasks:
  - {task: gqa, label: GQA on scenes, data_source: generated, primary_metric: exact_match, num_images: 2,
     questions_per_image: 2}
"""
STUB = """
echo "$#: $*"
[ "$ENDS" = well ] && exit 0
[ "$ENDS" = early ] && kill -TERM "$PPID" && exec sleep 60
trap 'echo saved; exit 75' TERM
echo waiting
while true; do sleep 0.05; done
"""


def slurm(folder: Path, *arguments: str, **variables: str) -> subprocess.Popen[str]:
    """Start the example as a job would; `sbatch` and `scontrol` note what they are asked."""
    for tool in ("sbatch", "scontrol"):
        (folder / tool).write_text(f'#!/bin/bash\necho "{tool} $*" >>"{folder}/asked"\nwc -l <"{folder}/asked"\n')
        (folder / tool).chmod(0o755)
    (folder / "stub.sh").write_text(STUB)
    chosen = {
        "PATH": f"{folder}:{os.environ['PATH']}",
        "SUITE": "smoke",
        "PRESET": "smoke",
        "STUDY": STUDY,
        "RESULTS": str(folder),
        "SEEDS": "0",
        "MORE": "--set train.log_every=1",
        "PREBENCH": f"bash {folder}/stub.sh",
        "ENDS": "well",
        "SLURM_JOB_ID": "7",
    }
    return subprocess.Popen(
        ["bash", str(ROOT / "examples/slurm.sh"), *arguments],
        env=ENVIRONMENT | chosen | variables,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def ended(process: subprocess.Popen[str]) -> str:
    output, errors = process.communicate(timeout=400)
    assert process.returncode == 0, errors[-3000:]
    return output


def test_the_slurm_example_submits_a_job_per_run_and_the_rest_behind_them(tmp_path):
    said = ended(slurm(tmp_path, SEEDS="0 1"))
    assert "4 runs (baseline-s0 pre-s0 baseline-s1 pre-s1): array 2" in said
    prepare, train, finish = (tmp_path / "asked").read_text().splitlines()
    assert prepare.endswith("slurm.sh prepare")
    assert "--dependency=afterok:1 --array=0-3" in train
    assert "--dependency=afterok:2" in finish and finish.endswith("slurm.sh finish")


def test_the_jobs_of_the_slurm_example_are_commands_that_there_are(tmp_path):
    train = ended(slurm(tmp_path, SLURM_ARRAY_TASK_ID="1", LAUNCH="accelerate launch --num_processes 8"))
    launch = "--launch accelerate launch --num_processes 8"
    assert train == f"9: train --study {STUDY} --results {tmp_path} --run pre-s0 {launch}\n"
    for job, last in (("prepare", "--prepare"), ("finish", "train.log_every=1")):
        words = ended(slurm(tmp_path, job)).split()[1:]
        assert words[0] == "run" and words[-1] == last
        done = CliRunner().invoke(main, [*words, "--dry-run"])
        assert done.exit_code == 0, done.output
        assert f"study      {tmp_path / STUDY}" in done.output and "to train   baseline-s0, pre-s0" in done.output


def test_a_preempted_job_is_queued_again(tmp_path):
    job = slurm(tmp_path, SLURM_ARRAY_TASK_ID="0", ENDS="never")
    assert job.stdout is not None
    while job.stdout.readline() != "waiting\n":
        assert job.poll() is None
    job.send_signal(signal.SIGTERM)
    assert "saved" in ended(job)
    assert (tmp_path / "asked").read_text() == "scontrol requeue 7\n"


def test_a_job_that_is_preempted_before_its_command_listens_is_queued_again(tmp_path):
    ended(slurm(tmp_path, SLURM_ARRAY_TASK_ID="0", ENDS="early"))
    assert (tmp_path / "asked").read_text() == "scontrol requeue 7\n"


@pytest.mark.slow
def test_jobs_train_runs_of_one_study_side_by_side_with_the_bytes_of_one_after_the_other(tmp_path, tiny_results):
    study = tmp_path / STUDY
    study.mkdir()
    shutil.copy(tiny_results / STUDY / "study.yaml", study)
    real = {"PREBENCH": f"{sys.executable} -m prebench.cli", "LAUNCH": ""}
    jobs = [slurm(tmp_path, SLURM_ARRAY_TASK_ID=str(number), **real) for number in range(2)]
    for job in jobs:
        ended(job)
    assert weights(study) == weights(tiny_results / STUDY)
    assert len(json.loads((study / "manifest.json").read_text())) == 1
