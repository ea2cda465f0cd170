"""How prebench reads each task's documents: cluster, category, question, target, and a score per document.

Upstream aggregates differ in shape; a comparison needs one number per document, with a mean that is upstream's
aggregate. Where documents count only together (CircularEval), each of them has the score of its question.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from prebench.errors import EvaluationError

MMBENCH = "mmbench_en_dev_static"
CIRCULAR_STRIDE = 1_000_000
"""MMBench's CircularEval: rows whose index agrees modulo this number are one question with rotated options."""


@dataclass(frozen=True)
class DocumentFields:
    """Where a task's documents hold what a SampleRecord needs; paths into nested columns are dotted."""

    image_id: str
    """Column of the bootstrap's cluster: questions about one image share it."""
    category: str = ""
    target: str = ""
    """Column of the reference answer; where empty, the task's own doc_to_target."""


FIELDS = {
    "gqa": DocumentFields("imageId", "types.structural"),
    "prebench_easy_vqa": DocumentFields("image_id", "type"),
    "vqav2_val": DocumentFields("image_id", "answer_type", "multiple_choice_answer"),
    "pope": DocumentFields("image_source", "category"),
    MMBENCH: DocumentFields("index", "category"),
    "prebench_visual_probe": DocumentFields("image_id"),
}
"""Tasks without an entry have one cluster per document and no categories."""

NEEDS_JUDGE = {"mmbench_en_dev": MMBENCH}
"""Tasks that ask a paid API, or draw answers at random without one, and what to take instead."""


def require_judge_free(task: str) -> None:
    """Refuse a task that would call a judge.

    Raises:
        EvaluationError: the task needs one; the alternative is named.
    """
    if task in NEEDS_JUDGE:
        raise EvaluationError(f"task {task!r} asks a paid API to judge answers; take {NEEDS_JUDGE[task]!r} instead")


def image_ids(task: str, documents: Any) -> list[str]:
    """Return the cluster of every document, reading one column of a `datasets.Dataset` and no image."""
    fields = FIELDS.get(task)
    if fields is None or fields.image_id not in documents.column_names:
        return [str(index) for index in range(len(documents))]
    values = documents[fields.image_id]
    if task == MMBENCH:
        return [str(int(value) % CIRCULAR_STRIDE) for value in values]
    return [str(value) for value in values]


def by_image(task: str, documents: Any) -> list[int]:
    """Return the document ids with those of one image side by side, images in order of first appearance.

    The engine shares what documents of one image have in common only where they come close to each other.
    """
    first: dict[str, int] = {}
    ids = image_ids(task, documents)
    for index, image_id in enumerate(ids):
        first.setdefault(image_id, index)
    return sorted(range(len(ids)), key=lambda index: (first[ids[index]], index))


def category(task: str, document: Mapping[str, Any]) -> str:
    """Return the document's question type, or "" where the data set declares none."""
    fields = FIELDS.get(task)
    return _text(_column(document, fields.category)) if fields and fields.category else ""


def target(task: str, document: Mapping[str, Any], doc_to_target: Callable[[Any], Any]) -> str:
    """Return the reference answer as text (JSON where it is no string)."""
    fields = FIELDS.get(task)
    column = fields.target if fields else ""
    return _text(_column(document, column) if column else doc_to_target(document))


def questions(task: str, image_ids: Sequence[str]) -> list[list[int]]:
    """Return the document ids of each question: the rotations of one in MMBench, one document everywhere else.

    Args:
        task: lmms-eval's task id.
        image_ids: as `image_ids` returns them, by document id; in MMBench they name the question.
    """
    if task != MMBENCH:
        return [[doc_id] for doc_id in range(len(image_ids))]
    found: dict[str, list[int]] = {}
    for doc_id, name in enumerate(image_ids):
        found.setdefault(name, []).append(doc_id)
    return list(found.values())


def document_scores(
    task: str, metric: str, image_ids: Sequence[str], results: Mapping[int, Mapping[str, Any] | str]
) -> dict[int, float | str]:
    """Return the primary metric's score of every document, or one line of error.

    - A number (gqa, easy-VQA, VQAv2: exact match or its ten-annotator form): itself; the mean is upstream's aggregate.
    - A mapping with `score` (POPE's accuracy): that score; the mean is upstream's aggregate.
    - MMBench: 1 for all rows of a question where upstream's rules, without a judge, find every rotation right, else 0
      for all of them. Where questions have equally many rows, as in the embedded mirror, the mean is upstream's
      aggregate (a fraction, where upstream gives per cent); otherwise it weights questions by their rows. One failed
      row leaves the whole question without a score: it can't be known whether all rotations are right.

    Args:
        task: lmms-eval's task id.
        metric: the primary metric's name.
        image_ids: as `image_ids` returns them, of all documents by document id.
        results: per document what the task's `process_results` returned, or one line of error.

    Raises:
        EvaluationError: the task returns no such metric, or no number in it.
    """
    found: dict[int, float | str] = {}
    for doc_ids in questions(task, image_ids):
        failed = next((doc_id for doc_id in doc_ids if isinstance(results[doc_id], str)), None)
        if failed is None:
            score = _question_score(task, metric, [results[doc_id] for doc_id in doc_ids])  # type: ignore[misc]
            found.update(dict.fromkeys(doc_ids, score))
            continue
        for doc_id in doc_ids:
            own = results[doc_id]
            found[doc_id] = own if isinstance(own, str) else f"a rotation of this question failed (document {failed})"
    return found


def _question_score(task: str, metric: str, results: Sequence[Mapping[str, Any]]) -> float:
    for result in results:
        if metric not in result:
            raise EvaluationError(f"task {task!r} has no metric {metric!r}; it returned {', '.join(sorted(result))}")
    values = [result[metric] for result in results]
    if task == MMBENCH:
        return _circular_score(values)
    (value,) = values
    if isinstance(value, Mapping):
        value = value.get("score")
    if isinstance(value, bool | int | float) or hasattr(value, "__float__"):
        return float(value)
    raise EvaluationError(f"task {task!r}: metric {metric!r} gives {type(value).__name__}, no score per document")


def _circular_score(rows: Sequence[Any]) -> float:
    import pandas as pd
    from lmms_eval.tasks.mmbench.mmbench_evals import MMBench_Evaluator

    if not all(isinstance(row, Mapping) and {"index", "answer", "prediction"} <= row.keys() for row in rows):
        raise EvaluationError(f"task {MMBENCH!r}: take primary_metric: gpt_eval_score; no other names option letters")
    answers = {row["index"]: row["answer"] for row in rows}
    return float(MMBench_Evaluator().eval_sub_data(pd.DataFrame(list(rows)), answers, static_only=True))


def _column(document: Mapping[str, Any], path: str) -> Any:
    value: Any = document
    for part in path.split("."):
        value = value.get(part) if isinstance(value, Mapping) else None
    return value


def _text(value: Any) -> str:
    if value is None:
        return ""
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)
