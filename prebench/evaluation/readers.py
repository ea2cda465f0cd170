"""What upstream's results say about a document, and upstream's defects, worked around without a change to its files.

Every function here belongs to a task's `Protocol`, which names it. lmms-eval is imported when a function runs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

Values = Sequence[Any]
"""The primary metric's entry of `process_results`, for every document of one question: one, except in MMBench, MMVP."""

UNPARSED = ""
"""What stands in place of the letter that upstream would draw."""


def number(values: Values) -> float:
    """Return the score of a document: the entry itself, or its `score` where it is a mapping.

    Raises:
        ValueError: it holds no number.
    """
    (value,) = values
    if isinstance(value, Mapping):
        value = value.get("score")
    if isinstance(value, bool | int | float) or hasattr(value, "__float__"):
        return float(value)
    raise ValueError(f"{type(value).__name__}, no score per document")


def circular(values: Values) -> float:
    """Return 1 where upstream's rules, without a judge, find every rotation of an MMBench question right, else 0.

    Raises:
        ValueError: the entries name no options and answers.
    """
    import pandas as pd
    from lmms_eval.tasks.mmbench.mmbench_evals import MMBench_Evaluator

    if not all(isinstance(row, Mapping) and {"index", "answer", "prediction"} <= row.keys() for row in values):
        raise ValueError("no option letters")
    answers = {row["index"]: row["answer"] for row in values}
    return float(MMBench_Evaluator().eval_sub_data(pd.DataFrame(list(values)), answers, static_only=True))


def both(values: Values) -> float:
    """Return 1 where all documents of an MMVP pair are right, else 0."""
    return float(all(value["is_correct"] for value in values))


def mmmu(values: Values) -> float:
    """Return 1 where upstream's own judgement of one MMMU document is "right", else 0."""
    from lmms_eval.tasks.mmmu.utils import evaluate_mmmu

    _, found = evaluate_mmmu(list(values))
    return float(found["acc"])


def mmmu_unparsed(value: Mapping[str, Any]) -> bool:
    """Tell whether no letter was found in the answer to an MMMU question."""
    return value["parsed_pred"] == [UNPARSED]


def mmvp_unparsed(value: Mapping[str, Any]) -> bool:
    """Tell whether no letter was found in the answer to an MMVP question."""
    return not value["pred_letter"]


def pope_unparsed(value: Mapping[str, Any]) -> bool:
    """Tell whether the answer to a POPE question is neither "yes" nor "no"."""
    return value["prediction"] not in ("yes", "no")


def require_answers(document: dict[str, Any]) -> None:
    """Refuse a document without reference answers, to which upstream gives the score 0 whatever the model said.

    Raises:
        ValueError: it has none.
    """
    if not document.get("answers"):
        raise ValueError("the data set holds no reference answers for this document")


def number_annotators(document: dict[str, Any]) -> None:
    """Give the annotators of a VQAv2 document an `answer_id` each.

    Upstream leaves an annotator out by comparing whole records, so that ten equal ones without an id leave nobody to
    agree with, and the score is 0. Where the ids differ already, the score stays as it is.

    Raises:
        ValueError: the document has no reference answers.
    """
    require_answers(document)
    for position, annotator in enumerate(document["answers"]):
        annotator["answer_id"] = position


@contextmanager
def no_random_letter() -> Iterator[None]:
    """Make MMMU's parser answer `UNPARSED` (which is never right) where it would draw a letter at random."""
    from lmms_eval.tasks._task_utils import mmmu_mcq_utils

    original = mmmu_mcq_utils.random
    mmmu_mcq_utils.random = _NoDraw()
    try:
        yield
    finally:
        mmmu_mcq_utils.random = original


class _NoDraw:
    @staticmethod
    def choice(_letters: Sequence[str]) -> str:
        return UNPARSED


def reset_ocrbench(aggregate: Callable[..., Any]) -> None:
    """Set OCRBench's counter to zero: upstream keeps it in the module, where the next model would add to it."""
    counter = aggregate.__globals__["OCRBench_score"]
    counter.update(dict.fromkeys(counter, 0))
