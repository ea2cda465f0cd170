"""Scores that need no picture: what guessing from the text of a question reaches on a benchmark."""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from prebench.data.questions import OPTIONS_PROMPT, Question


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

    Of a question with options the text is what stands before them, and its answers are what the options say, not
    their letters: a guesser who prefers a letter fails in CircularEval's rotations, one who prefers a colour does not.

    Args:
        questions: training questions, without answer-format suffix; never questions of a test split.
    """

    def __init__(self, questions: Iterable[Question]) -> None:
        texts: defaultdict[str, Counter[str]] = defaultdict(Counter)
        types: defaultdict[str, Counter[str]] = defaultdict(Counter)
        self._by_stem: defaultdict[str, Counter[str]] = defaultdict(Counter)
        for question in questions:
            texts[question.text][question.answer] += 1
            types[question.type][question.answer] += 1
            stem, options = _options(question.text)
            if question.answer in options:
                self._by_stem[stem][options[question.answer]] += 1
        assert types, "a prior needs training questions"
        self.majority = _most_frequent(sum(types.values(), Counter()))
        self._by_text = {text: _most_frequent(counts) for text, counts in texts.items()}
        self._by_type = {name: _most_frequent(counts) for name, counts in types.items()}

    def guess(self, question: Question) -> str:
        """Return the most frequent training answer to the same text, else to the same type, else to any.

        Of options the letter of the one that is right most often after the same text, whatever the letters.
        """
        stem, options = _options(question.text)
        if options:
            counts = self._by_stem.get(stem, Counter())
            return min(options, key=lambda letter: (-counts[options[letter]], options[letter]))
        known = self._by_text.get(question.text) or self._by_type.get(question.type)
        return known or self.majority

    def references(self, documents: Sequence[Document]) -> dict[str, float]:
        """Return the fractions `majority` (one answer to everything) and `blind` (`guess`) of the full score."""
        return {
            "majority": _mean(documents, _scores(documents, [self.majority] * len(documents))),
            "blind": _mean(documents, self.blind_scores(documents)),
        }

    def blind_scores(self, documents: Sequence[Document]) -> list[float]:
        """Return what `guess` scores on each document, [N] fractions; every document of a group has the group's."""
        return _scores(documents, [self.guess(document.question) for document in documents])


def _options(text: str) -> tuple[str, dict[str, str]]:
    """Return what stands before a question's options, and the options by letter (none: an empty dict)."""
    stem, _, rest = text.partition(f" {OPTIONS_PROMPT}\n")
    lines = (line.partition(". ") for line in rest.splitlines())
    return stem, {letter: option for letter, _, option in lines}


def _most_frequent(counts: Counter[str]) -> str:
    return min(counts, key=lambda answer: (-counts[answer], answer))


def _scores(documents: Sequence[Document], answers: Sequence[str]) -> list[float]:
    names = _groups(documents)
    groups: dict[str, float] = {}
    for name, document, answer in zip(names, documents, answers, strict=True):
        groups[name] = min(groups.get(name, 1.0), document.credit.get(answer, 0.0))
    return [groups[name] for name in names]


def _mean(documents: Sequence[Document], scores: Sequence[float]) -> float:
    groups = dict(zip(_groups(documents), scores, strict=True))
    return math.fsum(groups.values()) / len(groups)


def _groups(documents: Sequence[Document]) -> list[str]:
    return [document.group or f"#{number}" for number, document in enumerate(documents)]
