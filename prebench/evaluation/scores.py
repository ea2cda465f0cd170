"""How prebench reads each task's documents: cluster, category, question, target, and a score per document.

Upstream aggregates differ in shape; a comparison needs one number per document whose mean can be held against
upstream's aggregate (`Protocol.aggregate`). Where documents count only together (MMBench's rotations, MMVP's pairs),
each of them has the score of its question, and the first one counts.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from prebench.errors import EvaluationError
from prebench.evaluation.protocols import NEEDS_JUDGE, Protocol, protocol_of


def require_judge_free(task: str) -> None:
    """Refuse a task that would call a judge.

    Raises:
        EvaluationError: the task needs one; the alternative is named.
    """
    if task in NEEDS_JUDGE:
        raise EvaluationError(f"task {task!r} asks a paid API to judge answers; take {NEEDS_JUDGE[task]!r} instead")


def image_ids(task: str, documents: Any) -> list[str]:
    """Return the cluster of every document: the picture's id, or its content; no picture is decoded.

    Documents of one question (MMVP's two pictures) have the cluster of the first.

    Args:
        task: lmms-eval's task id.
        documents: the task's `datasets.Dataset`.
    """
    protocol = protocol_of(task)
    ids = _pictures(protocol, documents)
    if not protocol.question_column:
        return ids
    first: dict[str, str] = {}
    return [first.setdefault(question, own) for question, own in zip(question_ids(task, documents), ids, strict=True)]


def question_ids(task: str, documents: Any) -> list[str]:
    """Return the question that every document belongs to: its own, but for MMBench's rotations and MMVP's pairs.

    Raises:
        EvaluationError: the data set lacks the column that tells.
    """
    protocol = protocol_of(task)
    if not protocol.question_column:
        return [str(index) for index in range(len(documents))]
    if protocol.question_column not in documents.column_names:
        raise EvaluationError(
            f"task {task!r}: the data set {protocol.data_set} has no column {protocol.question_column!r}, which tells "
            f"what belongs together; it has {', '.join(documents.column_names)}"
        )
    return [str(protocol.question_of(int(value))) for value in documents[protocol.question_column]]


def by_image(task: str, documents: Any) -> list[int]:
    """Return the document ids with those of one image side by side, images in order of first appearance.

    The engine shares what documents of one image have in common only where they come close to each other.
    """
    return grouped_by_image(image_ids(task, documents))


def grouped_by_image(image_ids: Sequence[str]) -> list[int]:
    """Return the document ids sorted by the first appearance of their image."""
    first: dict[str, int] = {}
    for index, image_id in enumerate(image_ids):
        first.setdefault(image_id, index)
    return sorted(range(len(image_ids)), key=lambda index: (first[image_ids[index]], index))


def counted(question_ids: Sequence[str]) -> frozenset[int]:
    """Return the documents that enter means: the first of each question."""
    first: dict[str, int] = {}
    for index, question in enumerate(question_ids):
        first.setdefault(question, index)
    return frozenset(first.values())


def category(task: str, document: Mapping[str, Any]) -> str:
    """Return the document's question type, or "" where the data set declares none."""
    column = protocol_of(task).category
    return _text(_column(document, column)) if column else ""


def target(task: str, document: Mapping[str, Any], doc_to_target: Callable[[Any], Any]) -> str:
    """Return the reference answer as text (JSON where it is no string)."""
    column = protocol_of(task).target
    return _text(_column(document, column) if column else doc_to_target(document))


def document_scores(
    task: str, metric: str, question_ids: Sequence[str], results: Mapping[int, Mapping[str, Any] | str]
) -> dict[int, float | str]:
    """Return the primary metric's score of every document, or one line of error.

    One failed document leaves its whole question without a score: it can't be known whether all of it is right.

    Args:
        task: lmms-eval's task id.
        metric: the primary metric's name.
        question_ids: as `question_ids` returns them, of all documents by document id.
        results: per document what the task's `process_results` returned, or one line of error.

    Raises:
        EvaluationError: the task returns no such metric, or no number in it.
    """
    protocol = protocol_of(task)
    found: dict[int, float | str] = {}
    for doc_ids in _questions(protocol, question_ids):
        failed = next((doc_id for doc_id in doc_ids if isinstance(results[doc_id], str)), None)
        if failed is None and len(doc_ids) >= protocol.question_size:
            score = _question_score(protocol, metric, [results[doc_id] for doc_id in doc_ids])  # type: ignore[misc]
            found.update(dict.fromkeys(doc_ids, score))
            continue
        why = "the question is incomplete in the data set"
        if failed is not None:
            why = f"another document of this question failed (document {failed})"
        for doc_id in doc_ids:
            own = results[doc_id]
            found[doc_id] = own if isinstance(own, str) else why
    return found


def _questions(protocol: Protocol, question_ids: Sequence[str]) -> list[list[int]]:
    if not protocol.question_column:
        return [[doc_id] for doc_id in range(len(question_ids))]
    found: dict[str, list[int]] = {}
    for doc_id, question in enumerate(question_ids):
        found.setdefault(question, []).append(doc_id)
    return list(found.values())


def _question_score(protocol: Protocol, metric: str, results: Sequence[Mapping[str, Any]]) -> float:
    for result in results:
        if metric not in result:
            returned = ", ".join(sorted(result))
            raise EvaluationError(f"task {protocol.task!r} has no metric {metric!r}; it returned {returned}")
    if protocol.question_column and metric != protocol.metric:
        raise EvaluationError(
            f"task {protocol.task!r}: take primary_metric: {protocol.metric}; {metric!r} does not score documents that "
            "count only together"
        )
    try:
        return protocol.read([result[metric] for result in results])
    except ValueError as error:
        hint = f"; take primary_metric: {protocol.metric}" if protocol.metric not in ("", metric) else ""
        raise EvaluationError(f"task {protocol.task!r}: metric {metric!r} gives {error}{hint}") from error


def _pictures(protocol: Protocol, documents: Any) -> list[str]:
    if protocol.image_id in documents.column_names:
        return [str(value) for value in documents[protocol.image_id]]
    if protocol.image_id:
        raise EvaluationError(
            f"task {protocol.task!r}: the data set {protocol.data_set} has no column {protocol.image_id!r}, which "
            f"names the picture; it has {', '.join(documents.column_names)}"
        )
    from datasets import Image

    if protocol.picture not in documents.column_names or not isinstance(documents.features[protocol.picture], Image):
        return [str(index) for index in range(len(documents))]
    stored = documents.select_columns([protocol.picture]).cast_column(protocol.picture, Image(decode=False))
    return [_content(row[protocol.picture]) or f"document {index}" for index, row in enumerate(stored)]


def _content(picture: Mapping[str, Any] | None) -> str:
    """Return the hash of a picture's file, or its path where the data set holds no bytes; "" where there is none."""
    if picture is None:
        return ""
    content = picture.get("bytes")
    return hashlib.sha256(content).hexdigest()[:16] if content else str(picture.get("path") or "")


def _column(document: Mapping[str, Any], path: str) -> Any:
    value: Any = document
    for part in path.split("."):
        value = value.get(part) if isinstance(value, Mapping) else None
    return value


def _text(value: Any) -> str:
    if value is None:
        return ""
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)
