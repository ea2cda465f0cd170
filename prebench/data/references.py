"""Scores that need no picture: what guessing from the text of a question reaches on a benchmark."""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from prebench.data.questions import Question


@dataclass(frozen=True)
class Document:
    """One document of a benchmark, as far as guessing needs it."""

    question: Question
    credit: Mapping[str, float]
    """Score of each answer that has one, e.g. {"red": 1.0}."""
    group: str = ""
    """Documents of one group count only together (MMBench's CircularEval); empty: the document stands alone."""


class TextPrior:
    """The most frequent training answers: to a question's text, to its type, and to all questions.

    Args:
        questions: training questions, without answer-format suffix; never questions of a test split.
    """

    def __init__(self, questions: Iterable[Question]) -> None:
        texts: defaultdict[str, Counter[str]] = defaultdict(Counter)
        types: defaultdict[str, Counter[str]] = defaultdict(Counter)
        for question in questions:
            texts[question.text][question.answer] += 1
            types[question.type][question.answer] += 1
        assert types, "a prior needs training questions"
        self.majority = _most_frequent(sum(types.values(), Counter()))
        self._by_text = {text: _most_frequent(counts) for text, counts in texts.items()}
        self._by_type = {name: _most_frequent(counts) for name, counts in types.items()}

    def guess(self, question: Question) -> str:
        """Return the most frequent training answer to the same text, else to the same type, else to any."""
        known = self._by_text.get(question.text) or self._by_type.get(question.type)
        return known or self.majority

    def references(self, documents: Sequence[Document]) -> dict[str, float]:
        """Return the fractions `majority` (one answer to everything) and `blind` (`guess`) of the full score."""
        return {
            "majority": _score(documents, [self.majority] * len(documents)),
            "blind": _score(documents, [self.guess(document.question) for document in documents]),
        }


def _most_frequent(counts: Counter[str]) -> str:
    return min(counts, key=lambda answer: (-counts[answer], answer))


def _score(documents: Sequence[Document], answers: Sequence[str]) -> float:
    groups: dict[str, float] = {}
    for number, (document, answer) in enumerate(zip(documents, answers, strict=True)):
        group = document.group or f"#{number}"
        groups[group] = min(groups.get(group, 1.0), document.credit.get(answer, 0.0))
    return math.fsum(groups.values()) / len(groups)
