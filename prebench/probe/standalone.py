"""Probes of one model on one data set, without a study: passes, rows, maps."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from prebench.probe.data import ProbeData
from prebench.probe.extract import extract_features
from prebench.probe.features import ProbeFeatures
from prebench.probe.random_weights import randomise_language_model
from prebench.probe.similarity_maps import shown_images, similarity_maps
from prebench.probe.summary import probe_rows, random_weights_rows
from prebench.progress import ProgressLine
from prebench.records import ProbeRow, SimilarityMap


@dataclass(frozen=True)
class Settings:
    """What a user may choose."""

    batch_size: int = 16
    random_weights: bool = True
    """Add the control of a language model with random weights: a second pass."""
    seed: int = 0
    """Of these weights."""


def probe_model(
    model: Any, processor: Any, data: ProbeData, settings: Settings
) -> tuple[list[ProbeRow], list[SimilarityMap]]:
    """Return the rows and the similarity maps of a model.

    Args:
        model: from `prebench.probe.models.load`; where the control is asked for, its language model is lost.
        processor: its processor.
        data: what to probe on.
        settings: the user's.

    Raises:
        DataError: an image, mask or label that can't be used.
        ModelError: an architecture that prebench can't read, or states that are not finite.
        StoreError: no room for temporary files.
    """
    features = _extract("probe", model, processor, data, settings)
    rows = probe_rows(features, data.labels, data.subsets, data.attributes, data.categories)
    tested = [number for number, subset in enumerate(data.subsets) if subset == "test"]
    maps = similarity_maps(model, processor, data.images, data.masks, shown_images(data.masks, tested))
    if settings.random_weights:
        del features  # gives its disk space back
        randomise_language_model(model, settings.seed)
        control = _extract("probe, random weights", model, processor, data, settings)
        rows += random_weights_rows(control, data.labels, data.subsets, data.attributes)
    return rows, maps


def _extract(title: str, model: Any, processor: Any, data: ProbeData, settings: Settings) -> ProbeFeatures:
    with ProgressLine(title, len(data), "image") as line:
        return extract_features(model, processor, data.images, data.masks, settings.batch_size, line.update)
