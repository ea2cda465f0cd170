"""An evaluation that is killed again and again ends with the samples of an undisturbed one, and computes nothing twice
but one batch, whether one thread computes it or two do."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from prebench.evaluation.answers import read_answers
from prebench.evaluation.request import EvaluationRequest, RunRequest, plan
from prebench.evaluation.runner import run_in_subprocesses
from prebench.model.builder import build_model, build_processor
from prebench.runtime import available_cores
from prebench.schema import TaskConfig
from prebench.store import write_json
from tests.conftest import TINY
from tests.evaluation import forks
from tests.evaluation.mirror import NUM_IMAGES, QUESTIONS, write_mirror

pytestmark = pytest.mark.slow

KILLS = 10
BATCH = 2
"""Questions that the token budget holds, of one part or of two."""
TIMEOUT = 300.0
TASKS = tuple(
    TaskConfig(task=name, label=name, data_source=source, primary_metric="exact_match", num_images=NUM_IMAGES)
    for name, source in (("gqa", "generated"), ("prebench_easy_vqa", "real"))
)
DOCUMENTS = 2 * len(TASKS) * NUM_IMAGES * len(QUESTIONS)  # of two runs


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory, tiny_tokenizer) -> list[Path]:
    """Two exports with different weights."""
    folders = [tmp_path_factory.mktemp("export") / "model" for _ in range(2)]
    for seed, folder in enumerate(folders):
        build_model(TINY, tiny_tokenizer, seed=seed).save_pretrained(folder)
        build_processor(TINY.vision_tower, tiny_tokenizer).save_pretrained(folder)
    return folders


class Evaluation:
    """Evaluates a request in forks that can be killed."""

    def __init__(
        self, server: subprocess.Popen[str], trace: Path, mirror: Path, models: list[Path], threads: int
    ) -> None:
        self._server, self._trace, self.mirror, self._models, self.threads = server, trace, mirror, models, threads

    def request(self, folder: Path, answers: Path | None) -> EvaluationRequest:
        runs = tuple(
            RunRequest(variant="pre", seed=seed, model_dir=model, run_dir=folder / f"pre-s{seed}")
            for seed, model in enumerate(self._models)
        )
        return EvaluationRequest(
            runs=runs, tasks=TASKS, device="cpu", dtype="float32", token_budget=280, answers=answers
        )

    def start(self, request: EvaluationRequest) -> int:
        """Start what is missing and return the process id."""
        path = self._trace.with_name("work.json")
        write_json(path, plan(request, self.mirror).model_dump(mode="json"))
        assert self._server.stdin is not None
        self._server.stdin.write(f"{path}\n")
        self._server.stdin.flush()
        return int(self._line())

    def status(self) -> int:
        """Wait for the end of what was started."""
        return os.waitstatus_to_exitcode(int(self._line()))

    def batches(self) -> list[int]:
        """Return the sizes of all batches so far."""
        return [int(line) for line in self._trace.read_text().split()] if self._trace.exists() else []

    def _line(self) -> str:
        assert self._server.stdout is not None
        return self._server.stdout.readline()


@pytest.fixture(scope="module", params=[1, 2], ids=["one-thread", "two-threads"])
def evaluation(request, tmp_path_factory: pytest.TempPathFactory, models: list[Path]) -> Iterator[Evaluation]:
    if available_cores() < request.param:
        pytest.skip("needs as many cores as threads")
    folder = tmp_path_factory.mktemp("forks")
    mirror = write_mirror(folder / "mirror")
    offline = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "HF_DATASETS_CACHE": str(folder / "cache")}
    with subprocess.Popen(
        [sys.executable, "-P", forks.__file__, str(folder / "trace")],
        cwd=mirror,
        env=os.environ
        | offline
        | {"LMMS_EVAL_DATASETS_CACHE": str(folder / "cache"), "OMP_NUM_THREADS": str(request.param)},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    ) as server:
        yield Evaluation(server, folder / "trace", mirror, models, threads=request.param)


def samples(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*.samples.jsonl"))}


def num_answers(folder: Path) -> int:
    """Return the number of lines in all logs; none may be damaged, and no answer may be in twice."""
    count = 0
    for path in folder.rglob("*.jsonl"):
        lines = path.read_bytes().count(b"\n")  # first: the next answer may come between the two looks
        texts, damaged = read_answers(path)
        assert damaged == 0
        assert lines <= len(texts)
        count += len(texts)
    return count


def test_an_evaluation_killed_at_random_moments(evaluation: Evaluation, tmp_path: Path) -> None:
    evaluation.start(evaluation.request(tmp_path / "undisturbed", None))
    assert evaluation.status() == 0
    expected = samples(tmp_path / "undisturbed")
    assert len(expected) == 2 * len(TASKS)
    assert max(evaluation.batches()) * evaluation.threads == BATCH  # small: many moments to kill

    killed, answers = tmp_path / "killed", tmp_path / "answers"
    request = evaluation.request(killed, answers)
    random = np.random.default_rng(0)
    for _ in range(KILLS):
        known, before = num_answers(answers), len(evaluation.batches())
        pid = evaluation.start(request)
        wanted = known + int(random.integers(0, 5))
        begun = time.monotonic()
        while num_answers(answers) < wanted:
            os.kill(pid, 0)  # fails once it has ended
            assert time.monotonic() - begun < TIMEOUT
            time.sleep(0.001)
        time.sleep(random.uniform(0, 4 * forks.PAUSE))
        os.kill(pid, signal.SIGKILL)
        assert evaluation.status() == -signal.SIGKILL, "it ended before the moment to kill it"
        computed = evaluation.batches()[before:]
        lost = sum(computed) - (num_answers(answers) - known)
        assert 0 <= lost <= BATCH, "more was lost than one batch"
    assert 0 < num_answers(answers) < DOCUMENTS

    run_in_subprocesses(request, evaluation.mirror, tmp_path / "cache")  # as the command line goes on
    assert samples(killed) == expected
    assert num_answers(answers) == DOCUMENTS

    # A second study with the same weights, in another place: nothing is computed.
    before = len(evaluation.batches())
    evaluation.start(evaluation.request(tmp_path / "second", answers))
    assert evaluation.status() == 0
    assert samples(tmp_path / "second") == expected
    assert len(evaluation.batches()) == before and num_answers(answers) == DOCUMENTS
