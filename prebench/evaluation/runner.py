"""Evaluation of a study in subprocesses whose working directory is the mirror.

`datasets` resolves a repository id to a folder of that name in the working directory, so upstream's task code reads the
mirror unchanged, without a network. The subprocess reports progress as JSON lines on its standard output; what
libraries print goes to a log file.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import IO, Any

from prebench.config import validate
from prebench.errors import EvaluationError, PrebenchError, user_error
from prebench.evaluation.request import EvaluationRequest, RunRequest, Work, WorkItem, find_task, plan
from prebench.progress import ProgressLine, say
from prebench.runtime import visible_gpus
from prebench.schema import SuiteConfig
from prebench.store import read_json, write_json

WORK_FILE = "evaluation-{}.json"
LOG_FILE = "evaluate-{}.log"
LOG_LINES = 5
"""Last lines of the log that a crash is reported with."""
USER_ERROR = 2


def evaluate_study(
    runs: Sequence[Any],
    suite: SuiteConfig,
    mirror: Path,
    manifest: Mapping[str, Any],
    cache: Path,
    answers: Path,
    device: str,
    dtype: str,
    cpu_threads: int | None = None,
    jobs: int = 1,
) -> None:
    """Evaluate and probe runs on a suite; results that stand are kept.

    Args:
        runs: `prebench.study.Run`s with exported models.
        suite: tasks and probe.
        mirror: folder with the data sets.
        manifest: the mirror's `mirror.json` (`references` per task).
        cache: folder for `datasets`' cache and the log.
        answers: folder of the answer logs (`prebench.evaluation.answers`), shared by the studies beside each other.
        device: "auto", "cpu" or "cuda".
        dtype: "float32" or "bfloat16", never "auto": a result in one precision does not stand for the other.
        cpu_threads: threads of one process on a CPU; None leaves torch's choice.
        jobs: processes side by side, each with runs or tasks of its own (`split`).

    Raises:
        EvaluationError: a task is missing or failed; the results of the others are written.
    """
    request = EvaluationRequest(
        runs=tuple(
            RunRequest(
                variant=r.variant,
                seed=r.seed,
                model_dir=r.model_dir.resolve(),
                run_dir=r.folder.resolve(),
                step=r.step,
            )
            for r in runs
        ),
        tasks=suite.tasks,
        probe=suite.probe,
        max_error_share=suite.max_error_share,
        references=references(manifest),
        device=device,
        dtype=dtype,
        answers=answers.resolve(),
    )
    run_in_subprocesses(request, mirror, cache, cpu_threads, jobs)


def references(manifest: Mapping[str, Any]) -> dict[str, dict[str, float]]:
    """Return each task's scores without an image from a mirror's manifest."""
    tasks = manifest.get("tasks", {})
    return {name: dict(entry.get("references") or {}) for name, entry in tasks.items()}


def run_in_subprocesses(
    request: EvaluationRequest, mirror: Path, cache: Path, cpu_threads: int | None = None, jobs: int = 1
) -> None:
    """Evaluate what is missing in subprocesses, showing their progress.

    Raises:
        EvaluationError: see `evaluate_runs`; or a subprocess died (its last lines are quoted); names the logs.
    """
    work = plan(request, mirror)
    if not work.items:
        say("evaluate: every task has been scored already")
        return
    environment = _environment(cache.resolve() / "datasets" / work.data, cpu_threads)
    gpus = visible_gpus() if request.device != "cpu" else []
    say("evaluate: starting lmms-eval")
    children: list[_Child] = []
    try:
        for number, part in enumerate(split(work, jobs)):
            own = {"CUDA_VISIBLE_DEVICES": gpus[number % len(gpus)]} if gpus else {}
            children.append(_Child(part, number, mirror, cache.resolve(), environment | own))
        for child in children:
            child.join()
    except BaseException:  # Ctrl-C included: the children must not go on alone
        for child in children:
            child.process.terminate()
        raise
    problems = {child: problem for child in children if (problem := child.problem())}
    if problems:
        logs = ", ".join(str(child.log) for child in problems)
        raise EvaluationError(f"{'; '.join(dict.fromkeys(problems.values()))} (more in {logs})")


def split(work: Work, jobs: int) -> list[Work]:
    """Share the work out over at most `jobs` processes: whole runs, or where there are fewer of them, their tasks."""
    by_run: dict[RunRequest, list[WorkItem]] = {}
    for item in work.items:
        by_run.setdefault(item.run, []).append(item)
    found = list(by_run.values())
    if jobs <= len(found):
        shares = [[item for items in found[number::jobs] for item in items] for number in range(jobs)]
    else:
        processes = [len(range(number, jobs, len(found))) for number in range(len(found))]
        shares = [items[part::parts] for items, parts in zip(found, processes, strict=True) for part in range(parts)]
    return [work.model_copy(update={"items": tuple(share)}) for share in shares if share]


class _Child:
    """One evaluation process; a thread shows its progress."""

    def __init__(self, work: Work, number: int, mirror: Path, cache: Path, environment: dict[str, str]) -> None:
        path = cache / WORK_FILE.format(number)
        write_json(path, work.model_dump(mode="json"))
        self.log = cache / LOG_FILE.format(number)
        self._error: str | None = None
        with self.log.open("w", encoding="utf-8") as log_file:
            self.process = subprocess.Popen(  # noqa: S603
                # -P: the mirror may hold a folder called prebench, which must not become importable
                [sys.executable, "-P", "-m", "prebench.evaluation.runner", str(path)],
                cwd=mirror,
                env=environment,
                stdin=subprocess.PIPE,  # never written to: its end tells the child that this process is gone
                stdout=subprocess.PIPE,
                stderr=log_file,
                text=True,
            )
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()

    def _watch(self) -> None:
        assert self.process.stdout is not None
        try:
            self._error = _follow(self.process.stdout)
        except (OSError, SystemExit):  # the terminal went away; the child must not block on a full pipe
            self._error = next((m["error"] for m in _messages(self.process.stdout) if "error" in m), None)

    def join(self) -> None:
        self._thread.join()
        self.process.wait()

    def problem(self) -> str | None:
        """Return what went wrong, or None."""
        if self._error is not None or self.process.returncode == 0:
            return self._error
        lines = [line for line in self.log.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
        tail = " | ".join(lines[-LOG_LINES:])
        return f"the evaluation process ended with code {self.process.returncode}: {tail}"


def evaluate_runs(work: Work, send: Callable[[dict[str, Any]], None]) -> None:
    """Evaluate and probe in this process; its working directory must be the mirror.

    Args:
        work: what is missing.
        send: called with progress and with lines to show (`prebench.evaluation.harness.Send`).

    Raises:
        EvaluationError: tasks failed (all are named); what did not fail is written.
    """
    from prebench.evaluation.engine import DEFAULT_TOKEN_BUDGET, Engine
    from prebench.evaluation.harness import evaluate_probe, evaluate_task

    request = work.request
    if request.probe is not None:
        from prebench.evaluation.probe_task import CONFIG_VARIABLE

        chosen = request.probe.model_dump(mode="json", include={"attributes", "reference_attribute"})
        os.environ[CONFIG_VARIABLE] = json.dumps(chosen)
    configs = {config.task: config for config in request.tasks}
    load = cache(_load)  # each task once for all runs
    problems: dict[str, None] = {}
    for run in dict.fromkeys(item.run for item in work.items):
        try:
            engine = Engine(run.model_dir, request.device, request.dtype, request.token_budget or DEFAULT_TOKEN_BUDGET)
        except PrebenchError as error:
            _note(error, problems)
            continue
        for item in work.items:
            if item.run != run:
                continue
            try:
                task = load(item.task)
                if isinstance(task, PrebenchError):
                    raise task
                if item.task in configs:
                    evaluate_task(engine, task, run, configs[item.task], request, item.hashes, send)
                else:
                    evaluate_probe(engine, task, run, item.hashes, send)
            except PrebenchError as error:
                _note(error, problems)
    if problems:
        raise EvaluationError("; ".join(problems))


def _note(error: PrebenchError, problems: dict[str, None]) -> None:
    """Keep the line for the user, and for the log where in upstream's code it began."""
    problems[str(error)] = None
    with suppress(OSError):  # on a full disk the line is all that can be given
        traceback.print_exception(error)


def _load(task: str) -> Any:
    """Return the loaded task, or the error that every run will report."""
    from PIL import ImageFile

    from prebench.evaluation.harness import LoadedTask

    # lmms-eval switches this on when imported, and half a picture would be filled up with grey and asked about. While
    # it loads a task it looks at the first document; that this one is damaged is no reason to lose the others.
    ImageFile.LOAD_TRUNCATED_IMAGES = True
    try:
        return LoadedTask(find_task(task))
    except PrebenchError as error:
        return error
    finally:
        ImageFile.LOAD_TRUNCATED_IMAGES = False


def _environment(cache: Path, cpu_threads: int | None) -> dict[str, str]:
    """Return the child's environment: no network, and a cache that belongs to these very data sets.

    `datasets` keys its cache on the README of a local folder, not on the content of its files, so that one cache for
    two mirrors would answer with the first one's documents.
    """
    offline = {
        "HF_HUB_OFFLINE": "1",
        "HF_DATASETS_OFFLINE": "1",
        "HF_DATASETS_CACHE": str(cache),
        "LMMS_EVAL_DATASETS_CACHE": str(cache),
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "PYTHONIOENCODING": "utf-8",
    }
    threads = {} if cpu_threads is None else {"OMP_NUM_THREADS": str(cpu_threads)}
    return dict(os.environ) | offline | threads


def _follow(stream: IO[str]) -> str | None:
    """Show the child's progress and its lines until it ends; return the error that it reported."""
    error: str | None = None
    line: ProgressLine | None = None
    for message in _messages(stream):
        if "error" in message:
            error = message["error"]
            continue
        if "say" in message:
            say(message["say"])
            continue
        title, done, total = message["title"], message["done"], message["total"]
        if line is None or line.title != title:
            line = ProgressLine(title, total, "document").__enter__()
        line.update(done, message.get("note", ""))
        if done >= total:
            line.__exit__(None, None, None)
            line = None
    if line is not None:
        line.__exit__(EvaluationError, None, None)
    return error


def _messages(stream: IO[str]) -> Iterator[dict[str, Any]]:
    for text in stream:
        try:
            message = json.loads(text)
        except ValueError:
            continue
        if isinstance(message, dict):
            yield message


def _end_with_parent() -> None:
    """Wait for the end of standard input, which the parent holds open, and stop at once."""
    while os.read(0, 1):
        pass
    os._exit(1)


def main(arguments: Sequence[str]) -> int:
    """Run `python -m prebench.evaluation.runner REQUEST.json` in the mirror; return the exit code."""
    path = Path(arguments[0])
    # Upstream code prints to standard output; only our messages may reach the parent.
    channel = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)

    threading.Thread(target=_end_with_parent, daemon=True).start()

    def send(message: dict[str, Any]) -> None:
        channel.write(json.dumps(message) + "\n")
        channel.flush()

    try:
        work = validate(Work, read_json(path), str(path))
        evaluate_runs(work, send)
    except Exception as error:
        known = user_error(error)
        if known is None:
            raise
        send({"error": str(known)})
        return USER_ERROR
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
