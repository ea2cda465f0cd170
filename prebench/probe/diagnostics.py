"""Rows of `probe.parquet` that need no labels: token statistics, similarity, decoded tokens, the model itself."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np

from prebench.probe.features import ProbeFeatures
from prebench.probe.similarity import CKNNA_IMAGES, Representation, cknna, linear_cka
from prebench.probe.spectrum import Moments, statistics
from prebench.records import ENCODER, ProbeRow


def statistics_rows(features: ProbeFeatures) -> list[ProbeRow]:
    """Return the token statistics of every layer (level "statistics"), over all images; none where they are unknown."""
    if features.moments is None or features.encoder_moments is None:
        return []
    sources: list[tuple[int, Moments, int]] = [(ENCODER, features.encoder_moments, 0)]
    sources += [(layer, features.moments, layer) for layer in range(features.num_layers + 1)]
    return [
        _row(features, layer, "statistics", metric, value, int(moments.images[index]))
        for layer, moments, index in sources
        for metric, value in statistics(moments, index).items()
        if math.isfinite(value)
    ]


def similarity_rows(features: ProbeFeatures) -> list[ProbeRow]:
    """Return how alike every layer's pooled tokens are to layer 0 and to the encoder (level "similarity").

    Linear CKA over all images, CKNNA over the first ones.
    """
    layers = [ENCODER, *range(features.num_layers + 1)]
    readers = {layer: _reader(features, layer) for layer in layers}
    count, few = len(features), slice(0, min(CKNNA_IMAGES, len(features)))
    whole = {layer: Representation(read, count) for layer, read in readers.items()}
    targets = {"layer_0": 0, "encoder": ENCODER}
    rows = []
    for layer in layers:
        own = readers[layer](few)
        for name, target in targets.items():
            values = {
                f"cka_{name}": (linear_cka(whole[layer], whole[target]), count),
                f"cknna_{name}": (cknna(own, readers[target](few)), few.stop),
            }
            rows += [
                _row(features, layer, "similarity", metric, value, n)
                for metric, (value, n) in values.items()
                if math.isfinite(value)
            ]
    return rows


def _reader(features: ProbeFeatures, layer: int) -> Callable[[slice], np.ndarray]:
    if layer == ENCODER:
        return lambda part: features.encoder_pooled[part]
    return lambda part: features.pooled[part, layer]


def decoded_rows(features: ProbeFeatures) -> list[ProbeRow]:
    """Return what the last layer's visual tokens decode to (level "lm_head"): `n` counts tokens.

    Rows with the metric "share" name a token in `attribute`; there are ten at most.
    """
    decoded = features.decoded
    if decoded is None:
        return []
    last, n = features.num_layers, decoded.total
    top = decoded.most_frequent()
    rows = [
        _row(features, last, "lm_head", "token_entropy", decoded.entropy(), n),
        _row(features, last, "lm_head", "top10_share", sum(share for _, share in top), n),
    ]
    return rows + [ProbeRow(last, features.num_layers, "lm_head", text, "", "share", share, n) for text, share in top]


def model_rows(features: ProbeFeatures) -> list[ProbeRow]:
    """Return what a reader of the layers has to know about the model (level "model"): 1 for yes, 0 for no."""
    n = len(features)
    sees = {"image_tokens_see_each_other": features.attention != "causal"}
    sees["image_tokens_see_the_question"] = features.attention == "prompt"
    rows = [_row(features, 0, "model", name, float(value), n) for name, value in sees.items()]
    return rows + [_row(features, layer, "model", "encoder_features_added", 1.0, n) for layer in features.injected]


def _row(features: ProbeFeatures, layer: int, level: str, metric: str, value: float, n: int) -> ProbeRow:
    return ProbeRow(layer, features.num_layers, level, "", "", metric, value, n)
