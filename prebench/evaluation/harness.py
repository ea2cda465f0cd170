"""Drives lmms-eval's own Task objects: requests, answers, scores, aggregates, records.

lmms-eval's evaluator has no channel for errors, so its loop is not used; its tasks are, unmodified. A document that
fails to load, to generate or to be scored becomes a record with an error and enters no aggregate.
"""

from __future__ import annotations

import inspect
import os
import random
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from datasets.exceptions import DatasetsError
from lmms_eval.api.instance import Instance
from lmms_eval.tasks import TaskManager, get_task_dict
from tenacity import RetryError

from prebench.errors import EvaluationError, StoreError, one_line
from prebench.evaluation import scores
from prebench.evaluation.adapter import late_messages, probe_answers
from prebench.evaluation.answers import AnswerLog, answer_file, decided_by
from prebench.evaluation.documents import DecodedOnce
from prebench.evaluation.engine import Engine
from prebench.evaluation.generation import Answer, GenerationRequest, generation_settings
from prebench.evaluation.probe_task import LAYERS_FILE, PROBE_DIR_VARIABLE, probe_maps
from prebench.evaluation.prompts import DOCUMENT_ERRORS
from prebench.evaluation.protocols import protocol_of
from prebench.evaluation.request import EvaluationRequest, RunRequest, TaskSource
from prebench.probe.files import write_maps, write_rows
from prebench.records import (
    MAPS_FILE,
    PROBE_FILE,
    DocumentRecord,
    ProbeRow,
    SampleRecord,
    TaskRecord,
    documents_file,
    from_dict,
)
from prebench.runtime import versions
from prebench.schema import TaskConfig
from prebench.store import read_json, read_jsonl, write_jsonl, write_record

MODEL_NAME = "prebench"
"""Under which tasks look for model-specific prompts: one name for all variants, so that prompts agree."""

Send = Callable[[dict[str, Any]], None]
"""Called with progress (`title`, documents `done`, their `total`, a `note`), or with a line to show (`say`)."""


class LoadedTask:
    """An lmms-eval task with its documents; serves any number of runs."""

    def __init__(self, source: TaskSource) -> None:
        """Load the task's definition and its data from the working directory.

        Raises:
            EvaluationError: the task needs a judge, does not generate, or its data can't be loaded.
            StoreError: the mirror's file about the documents is damaged.
        """
        scores.require_judge_free(source.task)
        self.name = source.task
        manager = TaskManager("ERROR", str(source.yaml_path.parent), include_defaults=False, model_name=MODEL_NAME)
        try:
            self.task: Any = get_task_dict([source.task], manager, task_type="chat")[source.task]
        except (*DOCUMENT_ERRORS, RetryError, DatasetsError) as error:
            raise EvaluationError(f"task {source.task!r}: can't be loaded: {one_line(_cause(error))}") from error
        if self.task.OUTPUT_TYPE != "generate_until":
            raise EvaluationError(f"task {self.name!r}: output type {self.task.OUTPUT_TYPE!r} is not supported")
        self.documents = self.task.eval_docs
        self.bare = self.task.eval_docs_no_media
        self.protocol = protocol_of(self.name)
        self.image_ids = scores.image_ids(self.name, self.documents)
        self.question_ids = scores.question_ids(self.name, self.documents)
        self.counted = scores.counted(self.question_ids)
        self.known = _known(Path(source.dataset_path) / documents_file(self.name), len(self.documents))

    def instances(self) -> dict[int, Instance]:
        """Return fresh requests by document id.

        lmms-eval asks for every document's text here, and one that has none would end the evaluation; the text that is
        asked comes from `doc_to_messages`, later, where the document fails alone.
        """
        if self.task.config.num_fewshot is None:
            self.task.set_config(key="num_fewshot", value=0)
        context = self.task.fewshot_context

        def context_or_none(*args: Any, **kwargs: Any) -> Any:
            try:
                return context(*args, **kwargs)
            except DOCUMENT_ERRORS:
                return ""

        self.task.fewshot_context = context_or_none
        try:
            self.task.build_all_requests()
        finally:
            self.task.fewshot_context = context
        return {instance.doc_id: instance for instance in self.task.instances}

    def results(self, instances: Mapping[int, Instance], texts: Mapping[int, str]) -> dict[int, dict[str, Any] | str]:
        """Score answered documents with the task's own code.

        Returns:
            Per document what `process_results` returned, or one line of error.
        """
        answered = [instances[doc_id] for doc_id in sorted(texts)]
        for instance in answered:
            instance.resps = [texts[instance.doc_id]]
        self.task._instances = answered
        # A filter walks through `task_docs` beside the answers: the answered ones, and no picture decoded once more.
        self.task.task_docs = self.bare.select([instance.doc_id for instance in answered])
        if answered:
            self.task.apply_filters()
        return {instance.doc_id: self._score(instance) for instance in answered}

    def _score(self, instance: Instance) -> dict[str, Any] | str:
        filtered = next(iter(instance.filtered_resps.values()))
        # Without upstream's decorator, which tries a failing document five times, two seconds apart.
        process = type(self.task).process_results.__wrapped__
        document = self.bare[instance.doc_id]
        state = random.getstate()
        try:
            if self.protocol.prepare is not None:
                self.protocol.prepare(document)
            with self.protocol.scoring():
                result = process(self.task, document, [filtered])
        except DOCUMENT_ERRORS as error:
            return f"scoring failed: {one_line(error)}"
        if random.getstate() != state:
            random.setstate(state)
            return "scoring failed: the task draws the answer at random where it can't read one"
        return result

    def is_unparsed(self, result: Mapping[str, Any] | str) -> bool:
        """Tell whether upstream could read no answer; False where it does not show that."""
        metric, unparsed = self.protocol.metric, self.protocol.unparsed
        return unparsed is not None and isinstance(result, Mapping) and metric in result and unparsed(result[metric])

    def aggregate(self, results: list[dict[str, Any]], output: Path) -> dict[str, float]:
        """Return the task's own aggregates that are numbers, and the share of `unparsed` answers where it is known.

        Args:
            results: per document, in document order.
            output: where upstream code may write submission files.
        """
        metrics = {}
        for name, function in self.task.aggregation().items():
            items = [result[name] for result in results if name in result]
            if not items:
                continue
            if self.protocol.before_aggregate is not None:
                self.protocol.before_aggregate(function)
            with_args = "args" in inspect.signature(function).parameters
            value = function(items, args=SimpleNamespace(output_path=str(output))) if with_args else function(items)
            if hasattr(value, "__float__"):
                metrics[name] = float(value)
        if self.protocol.unparsed is not None and results:
            metrics["unparsed"] = sum(map(self.is_unparsed, results)) / len(results)
        return metrics


def evaluate_task(
    engine: Engine,
    loaded: LoadedTask,
    run: RunRequest,
    config: TaskConfig,
    request: EvaluationRequest,
    hashes: dict[str, str],
    send: Send,
) -> TaskRecord:
    """Answer and score one task for one run, and write its samples and its record.

    Answers that the log of these weights holds are taken from it; new ones are in it before the next batch starts.

    Raises:
        EvaluationError: more than `request.max_error_share` of the documents failed; no record is written, and the
            next call tries these documents again.
        StoreError: the answer log can't be read or written.
    """
    started = time.perf_counter()
    title = f"{run.name} {loaded.name}"
    instances = loaded.instances()
    with _open_log(engine, loaded, request, hashes) as log:
        if log is not None and log.damaged:
            lines = "line" if log.damaged == 1 else "lines"
            send({"say": f"{log.path}: {log.damaged} damaged or unfinished {lines} ignored and computed again"})
        answers = _answers(engine, loaded, instances, title, send, log)
    texts = {doc_id: answer.text for doc_id, answer in answers.items() if answer.text is not None}
    results = loaded.results(instances, texts)
    outcomes = {doc_id: results.get(doc_id, str(answers[doc_id].error)) for doc_id in sorted(instances)}
    scored = scores.document_scores(loaded.name, config.primary_metric, loaded.question_ids, outcomes)
    samples = [_sample(loaded, instances[d], answers[d], scored[d], outcomes[d]) for d in sorted(instances)]
    failed = [sample for sample in samples if sample.error is not None]
    if len(failed) > request.max_error_share * len(samples):
        raise EvaluationError(
            f"{title}: {len(failed)} of {len(samples)} documents failed, more than "
            f"{request.max_error_share:.1%} (document {failed[0].doc_id}: {failed[0].error})"
        )
    values = [sample.score for sample in samples if sample.score is not None and sample.counts]
    with tempfile.TemporaryDirectory(prefix="prebench-") as output:
        # What has no score enters no aggregate: upstream would judge a question by the rotations that are left.
        kept = [result for d, result in outcomes.items() if isinstance(result, dict) and not isinstance(scored[d], str)]
        metrics = loaded.aggregate(kept, Path(output))
    record = TaskRecord(
        task=loaded.name,
        label=config.label,
        variant=run.variant,
        seed=run.seed,
        primary_metric=config.primary_metric,
        score=sum(values) / len(values) if values else None,
        metrics=metrics,
        n=len(samples),
        n_errors=len(failed),
        data_source=config.data_source,
        references=request.references.get(loaded.name, {}),
        hashes=hashes,
        versions=versions(),
        seconds=round(time.perf_counter() - started, 2),
        sampled=any(answer.sampled for answer in answers.values()),
        step=run.step,
    )
    write_jsonl(run.run_dir / "eval" / f"{loaded.name}.samples.jsonl", samples)
    write_record(run.run_dir / "eval" / f"{loaded.name}.json", record)  # last: its presence says "complete"
    _say_totals(title, samples, 0 if log is None else log.taken, send)
    return record


def evaluate_probe(
    engine: Engine, loaded: LoadedTask, run: RunRequest, hashes: dict[str, str], send: Send
) -> list[ProbeRow]:
    """Extract features of all probe images, fit the probes in the task's aggregation, and write `probe.parquet`.

    Beside it some images' similarity maps are written (`probe_maps.json`).

    Raises:
        EvaluationError: an image can't be read.
        DataError: labels that no probe can be fitted on.
    """
    title = f"{run.name} {loaded.name}"
    instances = loaded.instances()
    send({"title": title, "done": 0, "total": len(instances)})
    run.run_dir.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".probe-", dir=run.run_dir) as folder:
        os.environ[PROBE_DIR_VARIABLE] = folder
        doc_ids = sorted(instances)
        texts = probe_answers(engine, loaded.documents, doc_ids, instances[doc_ids[0]].args[1])
        results = loaded.results(instances, dict(zip(doc_ids, texts, strict=True)))
        errors = [result for result in results.values() if isinstance(result, str)]
        if errors:
            raise EvaluationError(f"{title}: {errors[0]}")
        loaded.aggregate([results[d] for d in doc_ids], Path(folder))  # type: ignore[misc]
        rows = [ProbeRow(**row) for row in read_json(Path(folder) / LAYERS_FILE)]
    write_maps(run.run_dir / MAPS_FILE, probe_maps(engine.model, engine.processor, loaded.documents), hashes)
    write_rows(run.run_dir / PROBE_FILE, rows, hashes)  # last: its presence says "complete"
    send({"title": title, "done": len(doc_ids), "total": len(doc_ids)})
    return rows


def _open_log(
    engine: Engine, loaded: LoadedTask, request: EvaluationRequest, hashes: Mapping[str, str]
) -> AbstractContextManager[AnswerLog | None]:
    if request.answers is None:
        return nullcontext()
    weights = hashes["weights"]
    return AnswerLog(answer_file(request.answers, weights, loaded.name), decided_by(engine, weights))


def _answers(
    engine: Engine,
    loaded: LoadedTask,
    instances: Mapping[int, Instance],
    title: str,
    send: Send,
    log: AnswerLog | None,
) -> dict[int, Answer]:
    def requests() -> Iterator[GenerationRequest]:
        documents = DecodedOnce(loaded.documents)
        for doc_id in scores.grouped_by_image(loaded.image_ids):
            _, doc_to_messages, settings, *_ = instances[doc_id].args
            messages = late_messages(doc_to_messages, documents, doc_id)
            yield GenerationRequest(doc_id, messages, *generation_settings(settings, loaded.name))

    answers: dict[int, Answer] = {}
    total = len(instances)
    send({"title": title, "done": 0, "total": total})
    for answer in engine.generate(requests(), None if log is None else log.known):
        if log is not None:
            log.add(answer)
        answers[answer.key] = answer  # type: ignore[index]
        note = f"({log.taken} from the answer log)" if log is not None and log.taken else ""
        send({"title": title, "done": len(answers), "total": total, "note": note})
    return answers


def _say_totals(title: str, samples: Sequence[SampleRecord], taken: int, send: Send) -> None:
    """Report what is not plain: documents that failed, answers that were there before."""
    failed = [sample for sample in samples if sample.error is not None]
    parts = []
    if failed:
        first = f"document {failed[0].doc_id}: {failed[0].error}"
        parts.append(f"{len(samples) - len(failed)} documents scored, {len(failed)} failed ({first})")
    if cut := sum(sample.truncated for sample in samples):
        parts.append(f"{cut} answers were cut off at the end of the model's context, and scored as they are")
    if taken:
        parts.append(f"{taken} of {len(samples)} answers were in the answer log")
    if parts:
        send({"say": f"{title}: {'; '.join(parts)}"})


def _known(path: Path, num_documents: int) -> dict[int, DocumentRecord]:
    """Return what the mirror knows about a task's documents, by document id; nothing where it has no such file."""
    if not path.is_file():
        return {}
    try:
        found = [from_dict(DocumentRecord, values) for values in read_jsonl(path)]
    except KeyError as error:
        raise StoreError(f"{path.resolve()}: {error.args[0]}; delete the mirror to build it again") from error
    if [record.doc_id for record in found] != list(range(num_documents)):
        raise StoreError(
            f"{path.resolve()}: {len(found)} documents, but the task has {num_documents}; delete the mirror to build "
            "it again"
        )
    return {record.doc_id: record for record in found}


def _sample(
    loaded: LoadedTask, instance: Instance, answer: Answer, score: float | str, result: Mapping[str, Any] | str
) -> SampleRecord:
    document = loaded.bare[instance.doc_id]
    known = loaded.known.get(instance.doc_id)
    return SampleRecord(
        doc_id=instance.doc_id,
        image_id=loaded.image_ids[instance.doc_id],
        prompt_hash=answer.prompt_hash,
        image_hash=answer.image_hash,
        question=str(instance.args[0]),
        target=scores.target(loaded.name, document, loaded.task.doc_to_target),
        response=answer.text,
        score=None if isinstance(score, str) else score,
        error=score if isinstance(score, str) else None,
        category=scores.category(loaded.name, document),
        question_type=known.question_type if known else "",
        blind_score=known.blind_score if known else None,
        counts=instance.doc_id in loaded.counted,
        unparsed=loaded.is_unparsed(result),
        truncated=answer.truncated,
    )


def _cause(error: BaseException) -> BaseException:
    """Return what a tenacity RetryError or an error of datasets hides, such as a full disk."""
    attempt = getattr(error, "last_attempt", None)
    found = (attempt.exception() if attempt is not None else None) or error
    while isinstance(found, DatasetsError) and found.__cause__ is not None:
        found = found.__cause__
    return found
