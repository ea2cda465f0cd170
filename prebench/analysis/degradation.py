"""Visual representation degradation as one number per run (docs/statistics.md; the diagnosis of arXiv 2603.20808).

Let a(l) be the test accuracy of a linear probe on the pooled visual tokens of layer l for one attribute of the suite,
and L the number of decoder layers. The claim is about the suite's reference attribute; the others stand beside it.

    reference          R   = a(-1), the frozen vision encoder's output, identical for all variants of a study
    per layer          D_l = R - a(l)
    degradation        D   = R - mean of a(l) over l = ceil(L/4) .. floor(3L/4)
    without layers r   D over the same layers but those that a regularizer of either variant predicts from
    reduction              = D(baseline, seed) - D(variant, seed)

Referring to layer 0 instead would be wrong: the projector is trained, so a variant could lower layer 0 itself.
A regularizer of weight 0 only logs its loss: its layer is none of r. Where a reduction leaves out layers, both
variants' means leave out the same ones.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from typing import Any

import pandas as pd

from prebench.analysis import statistics
from prebench.analysis.join import Run, Study, same_origin
from prebench.analysis.statistics import Interval
from prebench.errors import StoreError
from prebench.records import ENCODER, middle_layers


@dataclass(frozen=True)
class Degradation:
    """The degradation of one run; accuracies are fractions, so differences of them are too."""

    attribute: str
    reference: float
    """R."""
    accuracy: dict[int, float]
    """a(l) for every decoder layer, 0 .. L."""
    num_layers: int

    @property
    def per_layer(self) -> dict[int, float]:
        """Return D_l for every layer."""
        return {layer: self.reference - value for layer, value in self.accuracy.items()}

    def over_middle(self, excluded: Collection[int] = ()) -> float | None:
        """Return D over the middle layers, leaving out some of them; None where no layer is left."""
        layers = [layer for layer in middle_layers(self.num_layers) if layer not in excluded]
        if not layers:
            return None
        return self.reference - sum(self.accuracy[layer] for layer in layers) / len(layers)


def degradation(run: Run, attribute: str) -> Degradation | None:
    """Compute one run's degradation from its probe.parquet; None where the run was not probed.

    Raises:
        StoreError: the probe lacks the attribute, the encoder's reference or a middle layer.
    """
    probe = run.probe()
    if probe.empty:
        return None
    # Every table asks for this anew: plain lists are several times faster than masks over columns of strings.
    columns = (probe[name].to_list() for name in ("level", "attribute", "metric", "layer", "value"))
    wanted = ("global", attribute, "accuracy")
    values = {int(layer): float(value) for *what, layer, value in zip(*columns, strict=True) if tuple(what) == wanted}
    num_layers = int(probe["num_layers"].max())
    needed = {ENCODER, *middle_layers(num_layers)}
    if not needed <= values.keys():
        missing = min(needed - values.keys())
        raise StoreError(
            f"{run.folder / 'probe.parquet'}: no accuracy of {attribute!r} at layer {missing}; "
            "delete it to probe the run again"
        )
    reference = values.pop(ENCODER)
    return Degradation(attribute, reference, dict(sorted(values.items())), num_layers)


def of_study(study: Study, attribute: str | None = None) -> dict[tuple[str, int], Degradation]:
    """Return the degradation of every probed run, by variant and seed.

    Args:
        study: the study.
        attribute: one of the suite's; the reference attribute where None.
    """
    if study.config.suite.probe is None:
        return {}
    chosen = attribute or study.config.suite.probe.reference_attribute
    found = {key: degradation(run, chosen) for key, run in sorted(study.runs.items())}
    return {key: value for key, value in found.items() if value is not None}


def attributes(study: Study) -> list[str]:
    """Return the suite's probed attributes, the reference attribute first."""
    probe = study.config.suite.probe
    if probe is None:
        return []
    others = (a.name for a in probe.attributes if a.name != probe.reference_attribute)
    return [probe.reference_attribute, *others]


@dataclass(frozen=True)
class Estimate:
    """A mean over seeds, as a fraction, with its t interval."""

    mean: float
    interval: Interval | None
    """95% over seeds; None with one seed, or where all seeds give one and the same value."""
    n_seeds: int


def estimate(values: Iterable[float | None]) -> Estimate | None:
    """Return the mean of per-seed values with its t interval; None where no seed has one."""
    known = [float(value) for value in values if value is not None and not math.isnan(value)]
    if not known:
        return None
    return Estimate(math.fsum(known) / len(known), statistics.t_interval(known), len(known))


def over_seeds(study: Study, variant: str, attribute: str | None = None) -> Estimate | None:
    """Return a variant's degradation D over the middle layers, over its probed seeds; None where there is none."""
    found = of_study(study, attribute)
    return estimate(value.over_middle() for (name, _), value in found.items() if name == variant)


def reduction(study: Study, baseline: str, variant: str, attribute: str | None = None) -> Estimate | None:
    """Return D(baseline) - D(variant), paired by seed; None where no seed has both.

    With a control in place of the baseline this is by how much the variant's reduction exceeds the control's: the
    baseline's D cancels.
    """
    return estimate(reductions(study, baseline, variant, attribute)["reduction"])


def reductions(study: Study, baseline: str, variant: str, attribute: str | None = None) -> pd.DataFrame:
    """Return the degradation reduction of every common probed seed.

    Args:
        study: the study.
        baseline: the variant whose degradation is reduced.
        variant: the other one.
        attribute: one of the suite's; the reference attribute where None.

    Returns:
        Columns seed, reference, first_layer, last_layer (the middle layers), excluded_layers (a tuple: the middle
        layers that either variant regularises), d_baseline, d_variant, reduction, and the last three without the
        excluded layers, with the suffix `_excluded` (NA where there are none, or no other middle layer).
    """
    known = of_study(study, attribute)
    rows = []
    for seed in study.common_seeds(baseline, variant):
        if (baseline, seed) not in known or (variant, seed) not in known:
            continue
        if not same_origin(*(study.runs[name, seed].probe_hashes for name in (baseline, variant))):
            continue  # probed on other pictures or settings: no difference of the two means anything
        left, right = known[baseline, seed], known[variant, seed]
        middle = middle_layers(right.num_layers)
        regularised = {layer for name in (baseline, variant) for layer in study.runs[name, seed].regularised_layers}
        excluded = tuple(layer for layer in middle if layer in regularised)
        row: dict[str, Any] = {"seed": seed, "reference": right.reference, "excluded_layers": excluded}
        row |= {"first_layer": middle.start, "last_layer": middle.stop - 1}
        row |= _difference(left.over_middle(), right.over_middle(), "")
        without = (left.over_middle(excluded), right.over_middle(excluded)) if excluded else (None, None)
        row |= _difference(*without, "_excluded")
        rows.append(row)
    whole = ["seed", "first_layer", "last_layer"]
    real = ["reference"]
    real += [name + end for end in ("", "_excluded") for name in ("d_baseline", "d_variant", "reduction")]
    frame = pd.DataFrame(rows, columns=[*whole, "excluded_layers", *real])
    return frame.astype(dict.fromkeys(whole, "Int64") | dict.fromkeys(real, float))


def _difference(left: float | None, right: float | None, suffix: str) -> dict[str, float | None]:
    reduction = None if left is None or right is None else left - right
    return {f"d_baseline{suffix}": left, f"d_variant{suffix}": right, f"reduction{suffix}": reduction}
