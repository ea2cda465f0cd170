"""What the page's sample browser shows: some documents of every task with all runs' answers, flipped ones first.

A document is flipped where a variant and the baseline, with one seed, differ in being right (a score of at least one
half). The choice is deterministic: by the number of flips, then failed ones, then in the order of a hash.
"""

from __future__ import annotations

import hashlib
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from prebench.analysis import verdict
from prebench.analysis.join import Run, Study
from prebench.analysis.render import marked
from prebench.analysis.report.pictures import Album
from prebench.errors import StoreError
from prebench.records import SampleRecord, from_dict
from prebench.schema import TaskConfig
from prebench.store import read_jsonl

MAX_DOCUMENTS = 1_500
"""Of all tasks together."""
RIGHT = 0.5
"""A document with at least this score counts as right."""
MAX_TEXT = 2_000
"""Characters of a question or an answer that are shown."""


@dataclass(frozen=True)
class Shown:
    """What the page says about one task's documents."""

    label: str
    shown: int
    total: int
    flipped_shown: int
    flipped: int
    failed: int
    without_picture: int


@dataclass(frozen=True)
class Samples:
    """The browser's data, and what it holds of how much."""

    data: dict[str, Any]
    """JSON: runs, tasks, texts, images, documents; `docs` name task, texts and images by number."""
    tasks: tuple[Shown, ...]
    notes: tuple[str, ...]


@dataclass(frozen=True)
class _Choice:
    """The documents of one task."""

    documents: list[int]
    total: int
    flipped: set[int]
    failed: int
    turned: dict[str, list[int]]
    """By run: documents that its baseline answers right and it wrong, and the other way round."""


class _Texts:
    """Every text once: answers repeat."""

    def __init__(self) -> None:
        self.all: list[str] = []
        self._known: dict[str, int] = {}

    def __call__(self, text: str | None) -> int:
        short = text or ""
        short = short if len(short) <= MAX_TEXT else f"{short[:MAX_TEXT]} … ({len(short)} characters)"
        if short not in self._known:
            self._known[short] = len(self.all)
            self.all.append(short)
        return self._known[short]


def samples(study: Study, mirror: Path) -> Samples:
    """Choose documents of every task, and collect their pictures and all runs' answers.

    Args:
        study: the study.
        mirror: the folder with the data sets that were evaluated; where it is not there, pictures are missing.

    Raises:
        StoreError: a record or a file of the mirror is damaged.
    """
    runs = [run for variant in study.variants for run in study.of_variant(variant)]
    texts, album = _Texts(), Album(mirror)
    docs: list[dict[str, Any]] = []
    tasks, shown = [], []
    quota = MAX_DOCUMENTS // max(1, len(study.tasks))
    for number, task in enumerate(study.tasks):
        choice = _choose(study, task.task, quota)
        mine = _documents(number, task, runs, choice, texts)
        wanted: dict[str, list[int]] = {}
        for doc in mine:
            wanted.setdefault(doc["image"], []).append(doc["doc"])
        wanted.pop("", None)
        album.add(task.task, wanted)
        bare = sum(doc["image"] != "" and doc["image"] not in album.pictures for doc in mine)
        label = marked(task.label, task.data_source)
        flipped = sum(doc["doc"] in choice.flipped for doc in mine)
        shown.append(Shown(label, len(mine), choice.total, flipped, len(choice.flipped), choice.failed, bare))
        tasks.append({"id": task.task, "label": label, "total": choice.total, "turned": choice.turned})
        docs += mine
    data = {
        "runs": [{"name": run.folder.name, "variant": run.variant, "seed": run.seed} for run in runs],
        "tasks": tasks,
        "texts": texts.all,
        "images": album.pictures,
        "docs": docs,
        "choice": _first_choice(study),
        "baseline": study.baseline,
    }
    return Samples(data, tuple(shown), tuple(_notes(album, shown)))


def _first_choice(study: Study) -> dict[str, Any]:
    """Return the two variants that are shown first: the baseline and the first variant that is no control."""
    base = study.baseline or study.variants[0]
    others = [name for name in study.variants if name != base]
    treated = [name for name in others if not verdict.is_control(study, name)] or others or [base]
    seeds = study.common_seeds(base, treated[0])
    return {"a": base, "b": treated[0], "seed": seeds[0] if seeds else study.config.seeds[0]}


def _notes(album: Album, shown: list[Shown]) -> list[str]:
    bare = sum(found.without_picture for found in shown)
    if not bare:
        return []
    if not album.found:
        return [f"Pictures are missing: there is no mirror at {album.mirror.name}/ beside the study's records."]
    why = "left out to keep this page small" if album.full else "not found in the mirror by the hash in the record"
    return [f"Pictures of {bare} documents are missing: {why}."]


def _choose(study: Study, task: str, quota: int) -> _Choice:
    """Choose documents by the records' scores alone."""
    runs = {key: run for key, run in sorted(study.runs.items()) if task in run.tasks}
    scores = pd.DataFrame({f"{name}-s{seed}": run.samples(task)["score"] for (name, seed), run in runs.items()})
    failed = scores.isna().any(axis=1)
    flips = np.zeros(len(scores), dtype=int)
    turned: dict[str, list[int]] = {}
    for (name, seed), run in runs.items():
        base = runs.get((str(study.baseline), seed))
        if base is None or base is run:
            continue
        theirs, mine = (scores[run_name] for run_name in (f"{base.variant}-s{seed}", f"{name}-s{seed}"))
        known = theirs.notna() & mine.notna()
        lost, won = (known & (theirs >= RIGHT) & (mine < RIGHT), known & (theirs < RIGHT) & (mine >= RIGHT))
        turned[f"{name}-s{seed}"] = [int(lost.sum()), int(won.sum())]
        flips += (lost | won).to_numpy()
    order = sorted(
        range(len(scores)), key=lambda i: (-flips[i], not failed.iloc[i], _shuffled(task, int(scores.index[i])))
    )
    chosen = sorted(int(scores.index[i]) for i in order[:quota])
    flipped = {int(doc) for doc, count in zip(scores.index, flips, strict=True) if count}
    return _Choice(chosen, len(scores), flipped, int(failed.sum()), turned)


def _shuffled(task: str, doc_id: int) -> str:
    return hashlib.sha256(f"{task}/{doc_id}".encode()).hexdigest()


def _documents(number: int, task: TaskConfig, runs: list[Run], choice: _Choice, texts: _Texts) -> list[dict[str, Any]]:
    """Return the chosen documents with the answers of all runs, in the order of `runs`."""
    wanted = set(choice.documents)
    docs: dict[int, dict[str, Any]] = {}
    for place, run in enumerate(runs):
        if task.task not in run.tasks:
            continue
        for record in _records(run, task.task, wanted):
            doc = docs.setdefault(record.doc_id, _document(number, record, len(runs), texts))
            # A failed document may lack hashes; one of other data has no place beside the others.
            same = (record.prompt_hash, record.image_hash) == (doc["prompt"], doc["image"])
            if same or record.score is None:
                doc["answers"][place] = _answer(record, texts)
    return [docs[doc_id] for doc_id in sorted(docs)]


def _records(run: Run, task: str, wanted: Collection[int]) -> list[SampleRecord]:
    path = run.folder / "eval" / f"{task}.samples.jsonl"
    try:
        return [from_dict(SampleRecord, values) for values in read_jsonl(path) if values.get("doc_id") in wanted]
    except KeyError as error:
        raise StoreError(f"{path}: {error.args[0]}") from error


def _document(number: int, record: SampleRecord, runs: int, texts: _Texts) -> dict[str, Any]:
    kind = record.question_type or record.category
    return {
        "task": number,
        "doc": record.doc_id,
        "kind": texts(str(kind).replace("_", " ")),
        "question": texts(record.question),
        "target": texts(record.target),
        "image": record.image_hash,
        "prompt": record.prompt_hash,
        "answers": [None] * runs,
    }


def _answer(record: SampleRecord, texts: _Texts) -> list[Any]:
    """Return text, score and whether it is an error."""
    if record.score is None:
        return [texts(record.error), None, 1]
    return [texts(record.response), round(record.score, 4), 0]
