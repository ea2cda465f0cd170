"""From probe features and labels to the rows of `probe.parquet`."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Protocol

import numpy as np

from prebench.errors import DataError, did_you_mean
from prebench.probe.by_object import object_rows
from prebench.probe.diagnostics import decoded_rows, model_rows, similarity_rows, statistics_rows
from prebench.probe.features import ProbeFeatures
from prebench.probe.global_probe import fit_linear_probe, layers_at_once
from prebench.records import ENCODER, ProbeRow
from prebench.runtime import derive_seed

logger = logging.getLogger(__name__)

SUBSETS = ("train", "val", "test")
FEW_SHOT = (10, 100)
"""Training images per class of the few-shot probes."""
RANDOM_WEIGHTS = "random_weights_"
"""Starts the metrics of that control."""


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
    categories: Sequence[Sequence[str]] | None = None,
) -> list[ProbeRow]:
    """Return every probe value of a model.

    Level "global": linear probes per attribute. The metric "accuracy" stands at each layer, "accuracy_10_per_class"
    and "accuracy_100_per_class" where every class has as many training images; controls are "shuffled_label_accuracy"
    at the encoder and the middle layer and "raw_pixel_accuracy", which has no layer, at the encoder's. Level "patch":
    patch structure per layer, from the test images; a value that no image defines has no row. Levels "object" and
    "category": the same as means over the test images' objects, and over those of each category. The other levels need
    no labels (`prebench.probe.diagnostics`). Layer -1 is the vision encoder.

    Args:
        features: of n images.
        labels: per attribute name [n] integers (single-label attributes only).
        subsets: [n] of "train", "val" or "test".
        attributes: what to decode.
        categories: per image the category of each object, that of mask id 1 first; None: not known.

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
    extra: list[ProbeRow] = []
    for attribute in attributes:
        if attribute.name not in labels:
            hint = did_you_mean(attribute.name, labels)
            raise DataError(f"probe attribute {attribute.name!r}: the data set has no such labels{hint}")
        probe = _AttributeProbe(features, np.asarray(labels[attribute.name]), subsets, attribute)
        rows += probe.rows()
        extra += probe.few_shot_rows() + probe.raw_pixel_rows()
    structure = _structure_rows(features, subsets == "test")
    if not structure:
        logger.warning("probe: no test image has a mask with two patches of objects; there is no patch structure")
    rows += structure + object_rows(features, subsets == "test", categories)
    extra += statistics_rows(features) + similarity_rows(features) + decoded_rows(features) + model_rows(features)
    return rows + extra


def random_weights_rows(
    features: ProbeFeatures,
    labels: Mapping[str, np.ndarray],
    subsets: np.ndarray,
    attributes: Sequence[AttributeLike],
) -> list[ProbeRow]:
    """Return the control "random weights": accuracy and patch structure above layer 0, as metrics of their own.

    Args:
        features: of the model with a language model of random weights (`prebench.probe.random_weights`); at layers -1
            and 0 they are the model's.
        labels: as in `probe_rows`.
        subsets: as in `probe_rows`.
        attributes: as in `probe_rows`.
    """
    layers = list(range(1, features.num_layers + 1))
    rows = []
    for attribute in attributes:
        probe = _AttributeProbe(features, np.asarray(labels[attribute.name]), subsets, attribute)
        rows += probe.fit(f"{RANDOM_WEIGHTS}accuracy", layers, features.pooled[:, 1:])
    structure = _structure_rows(features, subsets == "test")
    return rows + [replace(row, metric=RANDOM_WEIGHTS + row.metric) for row in structure if row.layer > 0]


class _AttributeProbe:
    """The linear probes of one attribute."""

    def __init__(
        self, features: ProbeFeatures, labels: np.ndarray, subsets: np.ndarray, attribute: AttributeLike
    ) -> None:
        if labels.shape != (len(features),):
            raise DataError(
                f"probe attribute {attribute.name!r}: labels of shape {labels.shape} for {len(features)} images; "
                "expected one integer per image"
            )
        self._features, self._labels, self._attribute = features, labels, attribute
        self._subsets = [np.flatnonzero(subsets == subset) for subset in SUBSETS]

    def rows(self) -> list[ProbeRow]:
        """Return accuracies on all training images and the control of shuffled labels."""
        features, middle = self._features, self._features.num_layers // 2
        if 0 < len(self._subsets[0]) < features.pooled.shape[2]:
            logger.warning(
                "probe attribute %r: %d training images for %d features; what the probe finds depends on its penalty",
                self._attribute.name,
                len(self._subsets[0]),
                features.pooled.shape[2],
            )
        encoder = features.encoder_pooled[:, None]
        seed = derive_seed("shuffled labels", self._attribute.name)
        return [
            *self.fit("accuracy", [ENCODER], encoder),
            *self.fit("accuracy", list(range(features.num_layers + 1)), features.pooled),
            *self.fit("shuffled_label_accuracy", [ENCODER], encoder, shuffle_seed=seed),
            *self.fit("shuffled_label_accuracy", [middle], features.pooled[:, middle : middle + 1], shuffle_seed=seed),
        ]

    def few_shot_rows(self) -> list[ProbeRow]:
        """Return accuracies on few training images per class, the same at every layer; C is chosen on all of "val"."""
        rows: list[ProbeRow] = []
        for count in FEW_SHOT:
            train = self._few(count)
            if train is not None:
                metric = f"accuracy_{count}_per_class"
                rows += self.fit(metric, [ENCODER], self._features.encoder_pooled[:, None], train=train)
                layers = list(range(self._features.num_layers + 1))
                rows += self.fit(metric, layers, self._features.pooled, train=train)
        return rows

    def raw_pixel_rows(self) -> list[ProbeRow]:
        """Return the accuracy on the scaled-down image itself."""
        if self._features.pixels is None:
            return []
        return self.fit("raw_pixel_accuracy", [ENCODER], self._features.pixels[:, None])

    def _few(self, count: int) -> np.ndarray | None:
        """Draw `count` training images of each class; return None where a class has fewer, or none has more."""
        train = self._subsets[0]
        shuffled = np.random.default_rng(derive_seed("few shot", self._attribute.name, count)).permutation(train)
        own = [shuffled[self._labels[shuffled] == value] for value in np.unique(self._labels[train])]
        sizes = [len(images) for images in own]
        if min(sizes) < count or max(sizes) == count:
            return None
        return np.sort(np.concatenate([images[:count] for images in own]))

    def fit(
        self,
        metric: str,
        layers: Sequence[int],
        values: np.ndarray,
        *,
        train: np.ndarray | None = None,
        shuffle_seed: int | None = None,
    ) -> list[ProbeRow]:
        """Fit and score one probe per layer, some layers at a time: `values`, [n, S, D], may lie on disk."""
        attribute, depth = self._attribute, self._features.num_layers
        parts = [self._subsets[0] if train is None else train, *self._subsets[1:]]
        rows = []
        for some in _groups(len(layers), layers_at_once(len(parts[0]), values.shape[2])):
            data = [array for part in parts for array in (values[:, some][part], self._labels[part])]
            result = fit_linear_probe(*data, shuffle_seed=shuffle_seed, name=f"probe attribute {attribute.name!r}")
            for layer, accuracy in zip(layers[some], result.accuracy, strict=True):
                about = (layer, depth, "global", attribute.name, attribute.kind, metric)
                rows.append(ProbeRow(*about, float(accuracy), result.n, *accuracy_interval(float(accuracy), result.n)))
        return rows


def _groups(count: int, size: int) -> Iterator[slice]:
    return (slice(start, start + size) for start in range(0, count, size))


def accuracy_interval(accuracy: float, n: int, level: float = 0.95) -> tuple[float, float]:
    """Return the Wilson interval of an accuracy, for this classifier over the population of test images.

    Args:
        accuracy: share of test images.
        n: test images.
        level: of confidence.
    """
    from scipy.stats import binomtest

    interval = binomtest(round(accuracy * n), n).proportion_ci(level, method="wilson")
    return float(interval.low), float(interval.high)


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
