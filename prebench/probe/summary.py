"""From probe features and labels to the rows of `probe.parquet`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol

import numpy as np

from prebench.errors import DataError, did_you_mean
from prebench.probe.extract import ProbeFeatures
from prebench.probe.global_probe import fit_linear_probe
from prebench.records import ProbeRow
from prebench.runtime import derive_seed

ENCODER = -1
"""The layer number of the vision encoder's output (the reference R) in a row."""
SUBSETS = ("train", "val", "test")


class AttributeLike(Protocol):
    """An attribute to decode, such as a suite's `AttributeConfig`."""

    @property
    def name(self) -> str:
        """Key of the labels."""
        ...

    @property
    def kind(self) -> str:
        """Which texts mention it: "asked", "unasked" or "rare"."""
        ...


def probe_rows(
    features: ProbeFeatures,
    labels: Mapping[str, np.ndarray],
    subsets: np.ndarray,
    attributes: Sequence[AttributeLike],
) -> list[ProbeRow]:
    """Return every probe value of a model: linear probes per attribute and layer, and patch structure per layer.

    Rows of level "global" have the metric "accuracy" at each layer, and as a control "shuffled_label_accuracy" at the
    encoder and the middle layer. Rows of level "patch" come from the test images; a value that no image defines has no
    row. Layer -1 is the vision encoder.

    Args:
        features: of n images.
        labels: per attribute name [n] integers (single-label attributes only).
        subsets: [n] of "train", "val" or "test".
        attributes: what to decode.

    Raises:
        DataError: labels or subsets that do not fit the features, an attribute without labels, or what
            `fit_linear_probe` refuses (one class only, too few images, NaN).
    """
    subsets = np.asarray(subsets)
    if subsets.shape != (len(features),) or not np.isin(subsets, SUBSETS).all():
        raise DataError(
            f"probe subsets: expected {len(features)} values of {', '.join(SUBSETS)}, one per image; got shape "
            f"{subsets.shape} with {', '.join(sorted({str(s) for s in subsets.reshape(-1)}))}"
        )
    rows: list[ProbeRow] = []
    for attribute in attributes:
        if attribute.name not in labels:
            hint = did_you_mean(attribute.name, labels)
            raise DataError(f"probe attribute {attribute.name!r}: the data set has no such labels{hint}")
        rows += _global_rows(features, np.asarray(labels[attribute.name]), subsets, attribute)
    return rows + _structure_rows(features, subsets == "test")


def _global_rows(
    features: ProbeFeatures, labels: np.ndarray, subsets: np.ndarray, attribute: AttributeLike
) -> list[ProbeRow]:
    if labels.shape != (len(features),):
        raise DataError(
            f"probe attribute {attribute.name!r}: labels of shape {labels.shape} for {len(features)} images; "
            "expected one integer per image"
        )
    depth = features.num_layers
    middle = depth // 2
    encoder = features.encoder_pooled[:, None]
    seed = derive_seed("shuffled labels", attribute.name)
    fits: list[tuple[str, list[int], np.ndarray, int | None]] = [
        ("accuracy", [ENCODER], encoder, None),
        ("accuracy", list(range(depth + 1)), features.pooled, None),
        ("shuffled_label_accuracy", [ENCODER], encoder, seed),
        ("shuffled_label_accuracy", [middle], features.pooled[:, middle : middle + 1], seed),
    ]
    rows = []
    for metric, layers, values, shuffle_seed in fits:
        data = [part[subsets == subset] for subset in SUBSETS for part in (values, labels)]
        result = fit_linear_probe(*data, shuffle_seed=shuffle_seed, name=f"probe attribute {attribute.name!r}")
        rows += [
            ProbeRow(layer, depth, "global", attribute.name, attribute.kind, metric, float(accuracy), result.n)
            for layer, accuracy in zip(layers, result.accuracy, strict=True)
        ]
    return rows


def _structure_rows(features: ProbeFeatures, test: np.ndarray) -> list[ProbeRow]:
    layers = {ENCODER: features.encoder_structure[test]}
    layers |= {layer: features.structure[test, layer] for layer in range(features.num_layers + 1)}
    return [
        ProbeRow(layer, features.num_layers, "patch", "", "", metric, value, n)
        for layer, values in layers.items()
        for metric, (value, n) in _structure_values(values, features.structure_metrics).items()
        if n > 0
    ]


def _structure_values(values_NK: np.ndarray, metrics: Sequence[str]) -> dict[str, tuple[float, int]]:
    """Return each metric's mean over the images that define it, and their number.

    Ratio and difference are formed from means over the images that define both terms: a single image's coupling may be
    anywhere near zero, and a mean of such ratios has no meaning.
    """
    columns = dict(zip(metrics, values_NK.astype(np.float64).T, strict=True))

    def means(*names: str) -> tuple[list[float], int]:
        defined = np.logical_and.reduce([np.isfinite(columns[name]) for name in names])
        n = int(defined.sum())
        return [float(columns[name][defined].mean()) if n else np.nan for name in names], n

    values = {}
    for name in ("cohesion", "coupling", "auc"):
        (value,), n = means(name)
        values[name] = (value, n)
    (cohesion, coupling), n = means("cohesion", "coupling")
    values["contrast_ratio"] = (cohesion / coupling if coupling else np.nan, n if coupling else 0)
    (cohesion, coupling), n = means("centred_cohesion", "centred_coupling")
    values["centred_difference"] = (cohesion - coupling, n)
    return values
