"""Patch structure by object and by category of object: rows beside those by image."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from prebench.errors import DataError
from prebench.probe.features import ProbeFeatures
from prebench.records import ENCODER, ProbeRow


def object_rows(
    features: ProbeFeatures, chosen: np.ndarray, categories: Sequence[Sequence[str]] | None
) -> list[ProbeRow]:
    """Return cohesion, coupling, ratio and centred difference as means over objects, per layer.

    Every object counts once, whatever its size: level "object" over all of them, level "category" over those of one
    category, which stands as the row's attribute. A value that no object defines has no row.

    Args:
        features: of n images; those of an older version give no rows.
        chosen: [n] which images count.
        categories: per image the category of each object, that of mask id 1 first; None: not known.

    Raises:
        DataError: other numbers of images, or a mask with an object that has no category.
    """
    if features.objects is None or features.object_ids is None or not len(features.object_ids):
        return []
    own = np.flatnonzero(chosen[features.object_ids[:, 0]])
    ids = features.object_ids[own]
    groups = {("object", ""): np.full(len(own), True)}
    if categories is not None and any(map(len, categories)):
        names = np.array([_category(categories, int(image), int(number)) for image, number in ids])
        groups |= {("category", str(name)): names == name for name in np.unique(names)}
    rows = []
    for place, layer in enumerate((ENCODER, *range(features.num_layers + 1))):
        values = features.objects[own, place].astype(np.float64)  # one layer at a time: the rest stays on disk
        for (level, name), mine in groups.items():
            for metric, (value, count) in _values(values[mine]).items():
                if count:
                    rows.append(ProbeRow(layer, features.num_layers, level, name, "", metric, value, count))
    return rows


def _category(categories: Sequence[Sequence[str]], image: int, number: int) -> str:
    if image >= len(categories) or not 1 <= number <= len(categories[image]):
        known = len(categories[image]) if image < len(categories) else 0
        raise DataError(
            f"probe: the mask of image {image} has object {number}, but {known} categories are given for it"
        )
    return categories[image][number - 1]


def _values(values_O4: np.ndarray) -> dict[str, tuple[float, int]]:
    """Return each metric's value over some objects, and how many define it; the ratio is one of means."""
    cohesion, coupling, centred_cohesion, centred_coupling = values_O4.T
    found = {"cohesion": _mean(cohesion), "coupling": _mean(coupling)}
    both = np.isfinite(cohesion) & np.isfinite(coupling)
    above, n = _mean(cohesion[both])
    below, _ = _mean(coupling[both])
    found["contrast_ratio"] = (above / below if below else np.nan, n if below else 0)
    found["centred_difference"] = _mean(centred_cohesion - centred_coupling)
    return found


def _mean(column: np.ndarray) -> tuple[float, int]:
    known = column[np.isfinite(column)]
    return (float(known.mean()), len(known)) if len(known) else (np.nan, 0)
