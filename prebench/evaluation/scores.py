"""How prebench reads each task's documents: cluster, category, question, target, and a score per document.

Upstream aggregates differ in shape; a comparison needs one number per document. Where their mean is not upstream's
aggregate, the reason stands at the function.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from prebench.errors import EvaluationError

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
    "mmbench_en_dev_static": DocumentFields("index", "category"),
    "prebench_visual_probe": DocumentFields("image_id"),
}
"""Tasks without an entry have one cluster per document and no categories."""

NEEDS_JUDGE = {"mmbench_en_dev": "mmbench_en_dev_static"}
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
    if task == "mmbench_en_dev_static":
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


def document_score(task: str, metric: str, results: Mapping[str, Any]) -> float:
    """Return one document's score of the primary metric.

    - A number (gqa, easy-VQA, VQAv2: exact match or its ten-annotator form): itself; the mean is upstream's aggregate.
    - A mapping with `score` (POPE's accuracy): that score; the mean is upstream's aggregate.
    - MMBench: is this row right by upstream's rules without a judge? The mean is the plain accuracy over all rows;
      upstream's aggregate counts a question only if all its rotations are right, so it is never higher.

    Args:
        task: lmms-eval's task id.
        metric: the primary metric's name.
        results: what the task's `process_results` returned.

    Raises:
        EvaluationError: the task returns no such metric, or no number in it.
    """
    if metric not in results:
        raise EvaluationError(f"task {task!r} has no metric {metric!r}; it returned {', '.join(sorted(results))}")
    value = results[metric]
    if task == "mmbench_en_dev_static":
        return _mmbench_row(value)
    if isinstance(value, Mapping):
        value = value.get("score")
    if isinstance(value, bool | int | float) or hasattr(value, "__float__"):
        return float(value)
    raise EvaluationError(f"task {task!r}: metric {metric!r} gives {type(value).__name__}, no score per document")


def _mmbench_row(item: Mapping[str, Any]) -> float:
    import pandas as pd
    from lmms_eval.tasks.mmbench.mmbench_evals import MMBench_Evaluator

    frame = pd.DataFrame([item])
    return float(MMBench_Evaluator().eval_sub_data(frame, {item["index"]: item["answer"]}, static_only=True))


def _column(document: Mapping[str, Any], path: str) -> Any:
    value: Any = document
    for part in path.split("."):
        value = value.get(part) if isinstance(value, Mapping) else None
    return value


def _text(value: Any) -> str:
    if value is None:
        return ""
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)
