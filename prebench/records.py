"""The records that stages exchange: frozen, versioned, JSON-serialisable.

Written by training, probing and evaluation, read by analysis. A field is added with a default and a raised
`SCHEMA_VERSION`; a field never changes its meaning.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, TypeVar

SCHEMA_VERSION = 4

PROBE_FILE = "probe.parquet"
"""A run's probe values, `ProbeRow` by row."""
MAPS_FILE = "probe_maps.json"
"""Beside it: some images' `SimilarityMap`s, and the hashes under "hashes"."""
PROBE_HASHES = b"prebench_hashes"
"""Key of the hashes (JSON) in that file's metadata."""

RecordT = TypeVar("RecordT")


def documents_file(task: str) -> str:
    """Return the file in a mirrored data set's folder that holds a `DocumentRecord` per document of a task."""
    return f"{task}.documents.jsonl"


def to_dict(record: Any) -> dict[str, Any]:
    """Return a dataclass record as plain JSON types."""
    return dataclasses.asdict(record)


def from_dict(record_type: type[RecordT], values: Mapping[str, Any]) -> RecordT:
    """Build a record from JSON, ignoring fields that a newer version may have added.

    Raises:
        KeyError: a required field is missing.
    """
    if not isinstance(values, Mapping):
        raise KeyError(f"{record_type.__name__}: a JSON object is expected, not {values!r:.40}")
    fields = {f.name: f for f in dataclasses.fields(record_type)}  # type: ignore[arg-type]
    required = [
        n for n, f in fields.items() if f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING
    ]
    for name in required:
        if name not in values:
            raise KeyError(f"{record_type.__name__}: the field {name!r} is missing")
    return record_type(**{n: v for n, v in values.items() if n in fields})


def content_hash(value: Any) -> str:
    """Return the first 16 hex digits of the SHA-256 of a JSON value, independent of key order."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


@dataclass(frozen=True)
class SampleRecord:
    """One document of one task, as answered by one run. `score` is None exactly where `error` is not."""

    doc_id: int
    """Index of the document in the task's test split."""
    image_id: str
    """Cluster for the bootstrap: questions about one image share it."""
    prompt_hash: str
    """content_hash of the rendered chat prompt."""
    image_hash: str
    """Content hash of the decoded pixels; empty for text-only documents."""
    question: str
    """The prompt's text as the task gave it."""
    target: str
    """The reference answer (JSON where it is no string)."""
    response: str | None
    """The model's answer; None where generation failed."""
    score: float | None
    """The per-document score of the task's primary metric; None where the document failed."""
    error: str | None = None
    """The reason of a failure, one line."""
    category: str = ""
    """Question type, where the data set declares one (for break-downs)."""
    question_type: str = ""
    """What the generator of the questions calls it (`DocumentRecord`); "" where the mirror does not say."""
    blind_score: float | None = None
    """What guessing from the question's text scores on this document; None where the mirror does not say."""
    counts: bool = True
    """False: the score is that of a question that an earlier document stands for, in every mean (MMBench, MMVP)."""
    unparsed: bool = False
    """No answer could be read from the response, which is scored as wrong; only some tasks tell."""
    truncated: bool = False
    """The model's context ended before the response did; what fitted is scored."""


@dataclass(frozen=True)
class DocumentRecord:
    """What a mirror knows about one document beyond its data set's schema."""

    doc_id: int
    """Index of the document in the task's test split."""
    question_type: str
    blind_score: float
    """The primary metric's score of the most frequent training answer to the same question text."""


@dataclass(frozen=True)
class TaskRecord:
    """The result of one task for one run: `eval/<task>.json`, next to `<task>.samples.jsonl`."""

    task: str
    label: str
    """Column title; marks generated data ("gqa on scenes")."""
    variant: str
    seed: int
    primary_metric: str
    score: float | None
    """The primary metric's value over the scored documents; None where none was scored."""
    metrics: dict[str, float]
    """Every metric that the task's own aggregation returned (fractions or the task's unit); `unparsed` is ours: the
    share of answers that could not be read."""
    n: int
    n_errors: int
    data_source: str
    """"generated" or "real"."""
    references: dict[str, float] = field(default_factory=dict)
    """Scores that need no image: `majority`, `blind` (most frequent training answer per question text)."""
    hashes: dict[str, str] = field(default_factory=dict)
    """What produced it: weights, data, prompts, config."""
    versions: dict[str, str] = field(default_factory=dict)
    seconds: float = 0.0
    sampled: bool = False
    """Answers were drawn at random, as the task asks, from seeds that follow from document and settings."""
    step: int | None = None
    """Instruct steps done, where the model is a snapshot; None: the finished model."""
    schema_version: int = SCHEMA_VERSION


ENCODER = -1
"""The layer number of the vision encoder's output (the reference R) in a row."""


def middle_layers(num_layers: int) -> range:
    """Return the layers ceil(L/4) .. floor(3L/4) over which degradation is averaged."""
    return range(math.ceil(num_layers / 4), math.floor(3 * num_layers / 4) + 1)


@dataclass(frozen=True)
class ProbeRow:
    """One probe value: `probe.parquet` holds one row per (layer, level, attribute, metric)."""

    layer: int
    """0 is the input of decoder layer 0; -1 is the vision encoder's output (the reference R)."""
    num_layers: int
    """Decoder layers L of the model, so that depth = layer / L."""
    level: str
    """"global" (pooled tokens), "patch" (token structure by image), "object" (by object), "category" (by objects of
    one category), "statistics", "similarity", "lm_head" or "model"."""
    attribute: str
    """What is decoded ("background", "shape", ...), a category, at level "lm_head" a token's text; "" elsewhere."""
    kind: str
    """"asked", "unasked", "rare" or "" (which texts mention the attribute)."""
    metric: str
    """"accuracy", "cohesion", "coupling", "contrast_ratio", "centred_difference", "auc", ... (docs/probes.md)."""
    value: float
    n: int
    """Test images (global), images with a defined value (patch), objects with one (object, category), decoded tokens
    (lm_head), or all images."""
    low: float | None = None
    """Ends of the 95% Wilson interval of a level "global" accuracy over images like the test images; None elsewhere."""
    high: float | None = None


@dataclass(frozen=True)
class SimilarityMap:
    """How alike the visual tokens of an image are to one of them, at one layer: `probe_maps.json` holds a list."""

    image_id: int
    """The image's place among the probe's images."""
    image_hash: str
    """Content hash of its pixels (`prebench.images.pixel_hash`)."""
    layer: int
    """0 is the input of decoder layer 0."""
    num_layers: int
    rows: int
    cols: int
    query: int
    """Which patch is asked about, in reading order."""
    object_id: int
    """The object that owns it, by the image's mask; 0: none does, or there is no mask."""
    objects: list[int]
    """[rows * cols] the owner of each patch, 0 = background."""
    cosine: list[float]
    """[rows * cols] cosine of each patch with the query, in reading order."""
    centred: list[float]
    """The same after the image's mean token is subtracted."""
