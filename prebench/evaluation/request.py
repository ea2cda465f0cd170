"""What an evaluation is asked to do, and which of it is done already. Imports neither torch nor lmms-eval."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from pydantic import Field

from prebench.errors import EvaluationError, ModelError, StoreError
from prebench.evaluation.protocols import SCORING
from prebench.records import PROBE_FILE, PROBE_HASHES, TaskRecord, content_hash
from prebench.runtime import data_dir, file_hash, versions
from prebench.schema import ProbeConfig, StrictModel, TaskConfig
from prebench.store import read_json, read_record

MIRROR_FILE = "mirror.json"


class RunRequest(StrictModel):
    """One exported model and the folder that receives its results."""

    variant: str
    seed: int
    model_dir: Path
    run_dir: Path
    step: int | None = None
    """Instruct steps done at a snapshot; None for the finished model."""

    @property
    def name(self) -> str:
        """Return the run's name in messages."""
        return f"{self.variant}-s{self.seed}" + ("" if self.step is None else f" after step {self.step}")


class EvaluationRequest(StrictModel):
    """Runs x tasks, to be evaluated by one process whose working directory is the mirror."""

    runs: tuple[RunRequest, ...]
    tasks: tuple[TaskConfig, ...] = ()
    probe: ProbeConfig | None = None
    max_error_share: float = 0.01
    references: dict[str, dict[str, float]] = Field(default_factory=dict)
    """Per task: scores that need no image (`majority`, `blind`)."""
    device: str = "auto"
    dtype: str = "auto"
    token_budget: int | None = None
    answers: Path | None = None
    """Folder of the answer logs, shared by all who evaluate the same weights; None keeps none."""

    @property
    def task_names(self) -> list[str]:
        """Return the lmms-eval ids, the probe last."""
        return [task.task for task in self.tasks] + ([self.probe.task] if self.probe else [])


@dataclass(frozen=True)
class TaskSource:
    """Where lmms-eval keeps a task's definition."""

    task: str
    yaml_path: Path
    dataset_path: str
    dataset_name: str | None
    """Config of the data set; None: its only or default one."""
    split: str
    """The evaluated split, as lmms-eval chooses it."""
    dataset_kwargs: Mapping[str, Any]

    def data_folder(self, mirror: Path) -> Path:
        """Return the task's data set in the mirror.

        Raises:
            EvaluationError: it is not there.
        """
        folder = mirror / self.dataset_path
        if not folder.is_dir():
            raise EvaluationError(
                f"task {self.task!r}: no data set {self.dataset_path} in the mirror {mirror}; `prebench evaluate` "
                "writes embedded data, `prebench mirror` fetches real ones"
            )
        return folder

    def definition_hash(self) -> str:
        """Return the hash of the task's YAML and Python files (prompt, parser, aggregation)."""
        files = sorted(path for path in self.yaml_path.parent.iterdir() if path.is_file())
        return content_hash({path.name: file_hash(path) for path in files})


class _TaskLoader(yaml.SafeLoader):
    """Reads task files without importing the functions that they name."""


_TaskLoader.add_constructor("!function", lambda _loader, node: node.value)


def find_task(task: str) -> TaskSource:
    """Find a task's YAML among prebench's own tasks and lmms-eval's.

    Raises:
        EvaluationError: no such task.
    """
    for root in (data_dir("tasks"), _lmms_eval_tasks()):
        candidates = [*root.rglob(f"{task}.yaml"), *(root / task.split("_")[0]).glob("*.yaml")]
        for path in candidates:
            values = _read_task(path)
            if values.get("task") == task and "dataset_path" in values:
                return _source(task, path, values)
    raise EvaluationError(f"unknown task {task!r}: neither prebench ({data_dir('tasks')}) nor lmms-eval defines it")


def _source(task: str, path: Path, values: Mapping[str, Any]) -> TaskSource:
    return TaskSource(
        task,
        path,
        str(values["dataset_path"]),
        values.get("dataset_name"),
        str(values.get("test_split") or values.get("validation_split") or "test"),
        values.get("dataset_kwargs") or {},
    )


def _lmms_eval_tasks() -> Path:
    spec = importlib.util.find_spec("lmms_eval")
    if spec is None or spec.origin is None:
        raise EvaluationError("lmms-eval is not installed; `pip install lmms-eval`")
    return Path(spec.origin).parent / "tasks"


def _read_task(path: Path) -> dict[str, Any]:
    try:
        values = yaml.load(path.read_text(encoding="utf-8"), _TaskLoader)  # noqa: S506  (a SafeLoader)
    except (OSError, yaml.YAMLError):
        return {}
    if not isinstance(values, dict):
        return {}
    include = values.get("include")
    if isinstance(include, str) and (path.parent / include).is_file():
        values = _read_task(path.parent / include) | values
    return values


class Hashes:
    """What decides a task's results; computed once per folder and task."""

    def __init__(self, request: EvaluationRequest, mirror: Path) -> None:
        """Take the request and the mirror that holds its data."""
        self._request, self._mirror = request, mirror
        self._tasks: dict[str, dict[str, str]] = {}
        self._weights: dict[Path, str] = {}

    def of(self, run: RunRequest, source: TaskSource) -> dict[str, str]:
        """Return the hashes that a finished record must carry: weights, data, prompts, config."""
        return {"weights": self.weights(run.model_dir)} | self.of_task(source)

    def of_task(self, source: TaskSource) -> dict[str, str]:
        """Return the hashes that do not depend on the run.

        Raises:
            EvaluationError: the task's data set is not in the mirror.
        """
        if source.task not in self._tasks:
            self._tasks[source.task] = self._of_task(source)
        return self._tasks[source.task]

    def weights(self, model_dir: Path) -> str:
        """Return the hash of weights, processor, chat template and generation settings.

        Raises:
            ModelError: there is no exported model.
        """
        if model_dir not in self._weights:
            files = sorted(p for p in model_dir.glob("*") if p.suffix in (".safetensors", ".json", ".jinja", ".model"))
            if not any(path.suffix == ".safetensors" for path in files):
                raise ModelError(f"{model_dir}: no exported model here (no *.safetensors)")
            named = {path.name: file_hash(path) for path in files if path.name != "prebench.json"}
            self._weights[model_dir] = content_hash(named)
        return self._weights[model_dir]

    def _of_task(self, source: TaskSource) -> dict[str, str]:
        folder = source.data_folder(self._mirror)
        files = sorted(p for p in folder.rglob("*") if p.is_file() and ".cache" not in p.parts)
        data = self._recorded(source) or {str(path.relative_to(folder)): file_hash(path) for path in files}
        return {
            "data": content_hash(data),
            "prompts": content_hash([source.definition_hash(), versions()["lmms_eval"], SCORING]),
            "config": content_hash(task_settings(self._request, source.task)),
        }

    def _recorded(self, source: TaskSource) -> dict[str, str]:
        """Return the hashes in mirror.json, against which the files have just been checked; none for another folder."""
        path = self._mirror / MIRROR_FILE
        entry = read_json(path)["tasks"].get(source.task, {}) if path.is_file() else {}
        prefix = f"{source.dataset_path}/"
        files = {name: record["sha256"][:16] for name, record in entry.get("files", {}).items()}
        return {name.removeprefix(prefix): value for name, value in files.items() if name.startswith(prefix)}


def task_settings(request: EvaluationRequest, task: str) -> Mapping[str, Any]:
    """Return the suite's block for a task, and the numeric type of the computation."""
    blocks: list[TaskConfig | ProbeConfig] = [t for t in request.tasks if t.task == task]
    if request.probe is not None and request.probe.task == task:
        blocks.append(request.probe)
    return {"task": blocks[0].model_dump(mode="json"), "dtype": request.dtype}


class WorkItem(StrictModel):
    """One task of one run that has to be computed, and the hashes that its result will carry."""

    run: RunRequest
    task: str
    hashes: dict[str, str]


class Work(StrictModel):
    """What is handed to the evaluating process."""

    request: EvaluationRequest
    items: tuple[WorkItem, ...]
    data: str
    """Hash of all the request's data sets."""


def plan(request: EvaluationRequest, mirror: Path) -> Work:
    """Return what has no result yet, or one that other weights, data, prompts or settings made; run by run.

    Raises:
        EvaluationError: an unknown task, or its data set is not in the mirror.
        ModelError: a run has no exported model.
    """
    sources = [find_task(name) for name in request.task_names]
    hashes = Hashes(request, mirror)
    items = []
    for run in request.runs:
        for source in sources:
            expected = hashes.of(run, source)
            if not is_done(run, source.task, expected, request):
                items.append(WorkItem(run=run, task=source.task, hashes=expected))
    data = {source.task: hashes.of_task(source)["data"] for source in sources}
    return Work(request=request, items=tuple(items), data=content_hash(data))


def is_done(run: RunRequest, task: str, expected: Mapping[str, str], request: EvaluationRequest) -> bool:
    """Tell whether a run's result of a task stands and was made by exactly this.

    Failed documents are part of a result: as long as they are no more than `request.max_error_share`, it stands, and
    they are not tried again. Where they were more there is no result, and the next evaluation tries them again.
    """
    if request.probe is not None and task == request.probe.task:
        return _probe_hashes(run.run_dir / PROBE_FILE) == dict(expected)
    path = run.run_dir / "eval" / f"{task}.json"
    if not path.is_file() or not path.with_suffix(".samples.jsonl").is_file():
        return False
    try:
        record = read_record(path, TaskRecord)
    except StoreError:
        return False  # a damaged record is computed again
    return (
        record.hashes == dict(expected)
        # Compared as they are: in the hashes they would make every older record a stale one.
        and record.references == request.references.get(task, {})
        and record.n_errors <= request.max_error_share * record.n
    )


def _probe_hashes(path: Path) -> dict[str, str] | None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        metadata = pq.read_schema(path).metadata or {}
    except (OSError, pa.ArrowInvalid):
        return None
    found = metadata.get(PROBE_HASHES)
    return None if found is None else json.loads(found)
