"""The functions of the lmms-eval task `prebench_visual_probe`.

The model answers each image with the place of its features (adapter); the aggregation, which sees the answers of all
processes, loads them, fits the linear probes, writes one row per layer to `probe_layers.json` beside the features, and
returns three numbers on the reference attribute (docs/statistics.md):

    encoder_accuracy     R = a(-1), on the frozen vision encoder's output
    mid_depth_accuracy   mean of a(l) over l = ceil(L/4) .. floor(3L/4)
    degradation          R - mid_depth_accuracy

Which attributes, and which of them is the reference: the environment variable PREBENCH_PROBE_CONFIG (JSON with
`attributes` and `reference_attribute`, as in a suite), else DEFAULT_ATTRIBUTES.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import TypeAdapter, ValidationError

from prebench.errors import EvaluationError
from prebench.probe.features import ProbeFeatures
from prebench.probe.similarity_maps import shown_images, similarity_maps
from prebench.probe.summary import probe_rows
from prebench.records import ENCODER, ProbeRow, SimilarityMap, middle_layers, to_dict
from prebench.schema import AttributeConfig
from prebench.store import write_json

PROBE_DIR_VARIABLE = "PREBENCH_PROBE_DIR"
CONFIG_VARIABLE = "PREBENCH_PROBE_CONFIG"
LAYERS_FILE = "probe_layers.json"

DEFAULT_ATTRIBUTES = (
    AttributeConfig(name="background", kind="unasked"),
    AttributeConfig(name="fill", kind="unasked"),
    AttributeConfig(name="num_objects", kind="asked"),
    AttributeConfig(name="num_large", kind="rare"),
)
DEFAULT_REFERENCE = "background"
SIZE_COLUMN = "prebench_num_docs"
INDEX_COLUMN = "prebench_doc"

Item = Mapping[str, Any]


def attributes() -> tuple[tuple[AttributeConfig, ...], str]:
    """Return the attributes to decode and the reference attribute's name.

    Raises:
        EvaluationError: PREBENCH_PROBE_CONFIG is malformed.
    """
    text = os.environ.get(CONFIG_VARIABLE)
    if not text:
        return DEFAULT_ATTRIBUTES, DEFAULT_REFERENCE
    try:
        values = json.loads(text)
        chosen = TypeAdapter(tuple[AttributeConfig, ...]).validate_python(values["attributes"])
        reference = str(values["reference_attribute"])
    except (ValueError, KeyError, TypeError, ValidationError) as error:
        raise EvaluationError(f"{CONFIG_VARIABLE}: expected JSON of attributes and reference_attribute") from error
    if reference not in [attribute.name for attribute in chosen]:
        raise EvaluationError(f"{CONFIG_VARIABLE}: reference_attribute {reference!r} is none of the attributes")
    return chosen, reference


def process_docs(documents: Any) -> Any:
    """Note the place of every document and the size of the whole split, so that a part of it (`--limit`) is recognised.

    The place gives the images one order, whichever process answered which of them.
    """
    numbered = documents.add_column(INDEX_COLUMN, list(range(len(documents))))
    return numbered.add_column(SIZE_COLUMN, [len(documents)] * len(documents))


def process_results(document: Mapping[str, Any], results: Sequence[str]) -> dict[str, Item]:
    """Join the place of the features with the document's labels, once per metric (lmms-eval's contract).

    Raises:
        EvaluationError: the model gave no features, or the data set lacks an attribute.
    """
    try:
        place = json.loads(results[0])
        shard, row = str(place["shard"]), int(place["row"])
    except (ValueError, KeyError, TypeError, IndexError) as error:
        raise EvaluationError("prebench_visual_probe: the model gave no features; take --model prebench") from error
    labels = {}
    for attribute in attributes()[0]:
        if document.get(attribute.name) is None:
            raise EvaluationError(f"prebench_visual_probe: the data set has no column {attribute.name!r}")
        labels[attribute.name] = int(document[attribute.name])
    item = {"shard": shard, "row": row, "labels": labels, "subset": document["subset"]}
    # An object's name is colour and shape; its category is the shape.
    item["categories"] = [name.split()[-1] for name in document.get("object_names") or []]
    item |= {"num_docs": document[SIZE_COLUMN], "index": document.get(INDEX_COLUMN, 0)}
    return dict.fromkeys(("mid_depth_accuracy", "encoder_accuracy", "degradation"), item)


def probe_maps(model: Any, processor: Any, documents: Any) -> list[SimilarityMap]:
    """Return similarity maps of the first test images with two objects: the same images for every model.

    Args:
        model: in evaluation mode.
        processor: its processor.
        documents: the task's split.
    """
    masks = _Column(documents, "mask")
    tested = [number for number, subset in enumerate(documents["subset"]) if subset == "test"]
    return similarity_maps(model, processor, _Column(documents, "image"), masks, shown_images(masks, tested))


class _Column(Sequence[Any]):
    """A column of pictures or masks, decoded row by row; None throughout where there is none."""

    def __init__(self, documents: Any, name: str) -> None:
        self._documents, self._name = documents, name

    def __len__(self) -> int:
        return len(self._documents)

    def __getitem__(self, index: Any) -> Any:
        value = self._documents[index].get(self._name)
        return value if value is None or self._name == "image" else np.asarray(value)


def mid_depth_accuracy(items: Sequence[Item]) -> float:
    """Return the mean accuracy on the reference attribute over the middle layers, as a fraction."""
    accuracy, depth = _accuracies(_rows(items))
    layers = middle_layers(depth)
    return sum(accuracy[layer] for layer in layers) / len(layers)


def encoder_accuracy(items: Sequence[Item]) -> float:
    """Return the accuracy on the vision encoder's output, the reference R, as a fraction."""
    return _accuracies(_rows(items))[0][ENCODER]


def degradation(items: Sequence[Item]) -> float:
    """Return R minus the mean over the middle layers."""
    return encoder_accuracy(items) - mid_depth_accuracy(items)


def _rows(items: Sequence[Item]) -> tuple[ProbeRow, ...]:
    expected = int(items[0]["num_docs"])
    if len(items) != expected:
        raise EvaluationError(
            f"prebench_visual_probe: {len(items)} of {expected} images; probes need all of them (no --limit)"
        )
    return _fit(json.dumps(list(items), sort_keys=True), os.environ.get(CONFIG_VARIABLE, ""))


@lru_cache(maxsize=2)
def _fit(items_json: str, _config: str) -> tuple[ProbeRow, ...]:
    """Fit all probes once for the three metrics; keyed on the content of items and configuration."""
    items = sorted(json.loads(items_json), key=lambda item: int(item["index"]))
    shards = sorted({item["shard"] for item in items})
    parts = [ProbeFeatures.load(Path(shard)) for shard in shards]
    offsets = dict(zip(shards, np.cumsum([0, *(len(part) for part in parts[:-1])]), strict=True))
    order = np.array([offsets[item["shard"]] + item["row"] for item in items])
    features = ProbeFeatures.concatenate(parts).take(order)
    chosen, _ = attributes()
    labels = {a.name: np.array([item["labels"][a.name] for item in items]) for a in chosen}
    categories = [item["categories"] for item in items]
    rows = probe_rows(features, labels, np.array([item["subset"] for item in items]), chosen, categories)
    write_json(Path(shards[0]).with_name(LAYERS_FILE), [to_dict(row) for row in rows])
    return tuple(rows)


def _accuracies(rows: Sequence[ProbeRow]) -> tuple[dict[int, float], int]:
    reference = attributes()[1]
    chosen = [r for r in rows if r.level == "global" and r.attribute == reference and r.metric == "accuracy"]
    return {row.layer: row.value for row in chosen}, chosen[0].num_layers
