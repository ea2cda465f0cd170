"""What a study shows, in words: printed at the end of a run and stored as tables/verdict.txt.

Wins and losses are told in the same words, no number stands for a gain without its interval, and fewer than three seeds
conclude nothing about the training procedure. Rules: docs/statistics.md, 10.
"""

from __future__ import annotations

import pandas as pd

from prebench.analysis import degradation, learning_curves
from prebench.analysis.compare import (
    EQUIVALENT,
    HIGHER,
    LOWER,
    MIN_SEEDS,
    NO_DIFFERENCE,
    TOO_FEW_SEEDS,
    Comparison,
    TaskComparison,
    compare,
)
from prebench.analysis.degradation import Estimate
from prebench.analysis.join import Study
from prebench.analysis.learning_curves import PLATEAU
from prebench.analysis.render import interval, marked, percent
from prebench.analysis.statistics import Interval
from prebench.errors import ComparisonError
from prebench.records import middle_layers
from prebench.schema import NormPenaltyConfig, PredictiveConfig, VariantConfig

CEILING = 0.99
"""A mean probe accuracy over the middle layers from which on a probe can't show what a variant preserves."""


def sentences(study: Study, curves: pd.DataFrame | None = None) -> list[str]:
    """Return the verdict, one paragraph per entry.

    Args:
        study: the study.
        curves: its learning curves, where they are read already.

    Raises:
        StoreError: a record is damaged.
    """
    base = study.baseline
    others = [variant for variant in study.variants if variant != base]
    if base is None or not others:
        return ["No baseline and variant to compare yet."]
    controls = [name for name in others if is_control(study, name)]
    treated = [name for name in others if name not in controls] or others
    frame = learning_curves.curves(study) if curves is None else curves
    found = [*_few_seeds(study, base, treated), *_degradation(study, base, treated)]
    for variant in treated:
        found += _benchmarks(study, base, variant)
        found += _against_controls(study, variant, [name for name in controls if name != variant])
        found += _matched(frame, base, variant)
    return [*found, *_plateau(frame, [base, *treated])]


def is_control(study: Study, variant: str) -> bool:
    """Tell whether a variant is a control: no anchor, another image's, a frozen one, or the baseline again."""
    block = _config(study, variant).regularizer
    if is_baseline_again(study, variant):
        return True
    if block is None or block.weight == 0:
        return False
    shuffled_or_frozen = isinstance(block, PredictiveConfig) and block.anchor in ("shuffled", "frozen_copy")
    return shuffled_or_frozen or isinstance(block, NormPenaltyConfig)


def is_baseline_again(study: Study, variant: str) -> bool:
    """Tell whether a variant is the baseline's objective with other randomness: the A/A comparison."""
    base = study.baseline
    if base in (None, variant):
        return False
    mine = _config(study, variant)
    return mine.seed_offset > 0 and mine.regularizer == _config(study, str(base)).regularizer


def _config(study: Study, variant: str) -> VariantConfig:
    return next(config for config in study.config.variants if config.name == variant)


def _seeds(number: int) -> str:
    return "1 seed" if number == 1 else f"{number} seeds"


def _few_seeds(study: Study, base: str, treated: list[str]) -> list[str]:
    number = min(len(study.common_seeds(base, variant)) for variant in treated)
    if number >= MIN_SEEDS:
        return []
    seeds = "one seed" if number == 1 else f"{number} seeds"
    return [
        f"With {seeds} per variant nothing can be concluded about the training procedure (at least {MIN_SEEDS} are "
        "needed): what follows is about these trained models."
    ]


# --- degradation ---------------------------------------------------------------------------------------------


def _points(value: float, bounds: Interval | None, signed: bool = False) -> str:
    """Return `12.3 [10.1, 14.5]`, or a number that says that it has no interval."""
    if bounds is None:
        return f"{percent(value, signed)} (no interval)"
    return f"{percent(value, signed)} [{percent(bounds.low, signed)}, {percent(bounds.high, signed)}]"


def _sign(found: Estimate) -> int:
    """Return 1 or -1 where the interval over at least three seeds lies on one side of 0, else 0."""
    if found.interval is None or found.n_seeds < MIN_SEEDS:
        return 0
    return 1 if found.interval.low > 0 else -1 if found.interval.high < 0 else 0


def _size(found: Estimate) -> str:
    """Return the absolute value with its interval, for a sentence whose verb tells the direction."""
    if found.mean >= 0 or found.interval is None:
        return _points(abs(found.mean), found.interval)
    return _points(-found.mean, Interval(-found.interval.high, -found.interval.low))


def _degradation(study: Study, base: str, treated: list[str]) -> list[str]:
    found = degradation.over_seeds(study, base)
    if found is None:
        return []
    known = degradation.of_study(study)
    first = next(iter(known.values()))
    layers = middle_layers(first.num_layers)
    start = f"Degradation of {first.attribute} over layers {layers.start}-{layers.stop - 1}: "
    start += _baseline(base, found)
    changes = [text for variant in treated if (text := _change(study, base, variant))]
    end = "" if found.interval is None else " (t intervals over seeds)"
    lines = [f"{'; '.join([start, *changes])}{end}."]
    return lines + _ceiling(study, base, treated)


def _baseline(base: str, found: Estimate) -> str:
    shown = f"{_points(found.mean, found.interval)} over {_seeds(found.n_seeds)}"
    if found.n_seeds < MIN_SEEDS or found.interval is None:
        return f"{base} {shown}"
    sign = _sign(found)
    if sign > 0:
        return f"{base} {_points(found.mean, found.interval)} points over {_seeds(found.n_seeds)}"
    if sign < 0:
        return f"{base} does not degrade, its layers know more than the vision encoder: {shown}"
    return f"no degradation of {base} is shown: {shown}"


def _change(study: Study, base: str, variant: str) -> str:
    found = degradation.reduction(study, base, variant)
    if found is None:
        return ""
    text = _direction(variant, found)
    frame = degradation.reductions(study, base, variant)
    without = degradation.estimate(frame["reduction_excluded"])
    if without is None:
        return text
    layers = " and ".join(map(str, frame["excluded_layers"].iloc[0]))
    return f"{text}; without layer {layers}, which is regularised: {_points(without.mean, without.interval, True)}"


def _direction(variant: str, found: Estimate) -> str:
    sign = _sign(found)
    if sign:
        return f"{variant} {'reduces' if sign > 0 else 'increases'} it by {_size(found)} over {_seeds(found.n_seeds)}"
    shown = f"{_points(found.mean, found.interval, True)} over {_seeds(found.n_seeds)}"
    if found.n_seeds < MIN_SEEDS or found.interval is None:
        return f"{variant}: reduction {shown}"
    return f"{variant}: no change shown, reduction {shown}"


def _ceiling(study: Study, base: str, treated: list[str]) -> list[str]:
    at: dict[str, float] = {}
    for variant in (base, *treated):
        mine = [value for (name, _), value in degradation.of_study(study).items() if name == variant]
        accuracy = degradation.estimate(_middle_accuracy(value) for value in mine)
        if accuracy is not None and accuracy.mean >= CEILING:
            at[variant] = accuracy.mean
    if not at:
        return []
    shown = ", ".join(f"{name} {percent(value)}%" for name, value in at.items())
    end = "there is nothing to preserve" if base in at else "a larger reduction could not show"
    return [f"The probe stands at its ceiling over these layers ({shown}): {end}."]


def _middle_accuracy(found: degradation.Degradation) -> float | None:
    lost = found.over_middle()
    return None if lost is None else found.reference - lost


# --- benchmarks ----------------------------------------------------------------------------------------------


def _benchmarks(study: Study, base: str, variant: str) -> list[str]:
    try:
        found = compare(study, base, variant)
    except ComparisonError as error:
        # The runs stand for themselves; what can't be paired is said, not hidden.
        return [f"{variant}: not compared with {base}: {error}"]
    if not found.tasks:
        return [f"Benchmarks, {variant} against {base}: no task was evaluated for both."]
    return [f"Benchmarks, {variant} against {base}: {_conclusion(found)}."]


def _conclusion(found: Comparison) -> str:
    parts = [
        f"{verdict} on {', '.join(_difference(row) for row in rows)}"
        for verdict in (HIGHER, LOWER)
        if (rows := [row for row in found.tasks if row.verdict == verdict])
    ]
    total = len(found.tasks)
    undecided = [row for row in found.tasks if row.verdict == NO_DIFFERENCE]
    if undecided:
        parts.append(f"no difference shown on {len(undecided)} of {total} tasks{_detectable(undecided)}")
    same = [row for row in found.tasks if row.verdict.startswith(EQUIVALENT)]
    if same:
        parts.append(f"{same[0].verdict} on {', '.join(_difference(row) for row in same)}")
    open_rows = [row for row in found.tasks if row.verdict == TOO_FEW_SEEDS]
    if open_rows:
        shown = ", ".join(_difference(row) for row in open_rows)
        parts.append(f"too few seeds to conclude on {len(open_rows)} of {total} tasks (in points: {shown})")
    seeds = sorted({row.n_seeds for row in found.tasks})
    end = f"{seeds[0]} to {_seeds(seeds[-1])}" if len(seeds) > 1 else _seeds(seeds[0])
    holm = "" if len(open_rows) == total else f", Holm's correction over {total} tasks at 5%"
    return f"{'; '.join(parts)} ({end}{holm})"


def _difference(row: TaskComparison) -> str:
    return f"{marked(row.label, row.data_source)} {percent(row.difference, signed=True)} {interval(row.low, row.high)}"


def _detectable(rows: list[TaskComparison]) -> str:
    """Return how large a difference would have been found: "no difference shown" is not "equal"."""
    values = sorted(row.mdd for row in rows if row.mdd)
    if not values:
        return ""
    low, high = percent(values[0]), percent(values[-1])
    return f", where {low if low == high else f'{low} to {high}'} points would be found with 80% power"


# --- controls, matched loss ----------------------------------------------------------------------------------


def _against_controls(study: Study, variant: str, controls: list[str]) -> list[str]:
    if not controls:
        return []
    if len(study.common_seeds(str(study.baseline), variant)) < MIN_SEEDS:
        return _reductions_alone(study, controls)
    again = [name for name in controls if is_baseline_again(study, name)]
    lines = [line for name in again if (line := _calibration(study, variant, name))]
    parts = []
    for name in (name for name in controls if name not in again):
        found = degradation.reduction(study, name, variant)
        if found is not None:
            parts.append(_exceeds(name, found))
    if parts:
        lines.append(f"Controls: the reduction of {variant} is {'; '.join(parts)}.")
    return lines


def _reductions_alone(study: Study, controls: list[str]) -> list[str]:
    found = {name: degradation.reduction(study, str(study.baseline), name) for name in controls}
    parts = [f"{name} {_points(value.mean, value.interval, True)}" for name, value in found.items() if value]
    return [f"Reductions of the controls, which allow no conclusion: {', '.join(parts)}."] if parts else []


def _exceeds(control: str, found: Estimate) -> str:
    """Say whether a reduction exceeds a control's; the difference of the two is `found`."""
    sign = _sign(found)
    if sign:
        return f"{'larger' if sign > 0 else 'smaller'} than that of {control} by {_size(found)}"
    return f"not shown to differ from that of {control}: {_points(found.mean, found.interval, True)}"


def _calibration(study: Study, variant: str, again: str) -> str:
    chance = degradation.reduction(study, str(study.baseline), again)
    found = degradation.reduction(study, again, variant)
    if chance is None or found is None:
        return ""
    start = f"A/A: {again}, the baseline with other randomness, has the reduction "
    start += f"{_points(chance.mean, chance.interval, True)}{_false_alarms(study, again)}"
    sign = _sign(found)
    if sign:
        word = "larger" if sign > 0 else "smaller"
        return f"{start}; that of {variant} is {word} by {_size(found)}: more than the noise between trainings."
    shown = _points(found.mean, found.interval, True)
    return f"{start}; that of {variant} is not shown to differ by more than the noise between trainings: {shown}."


def _false_alarms(study: Study, again: str) -> str:
    """Count the benchmarks on which the baseline seems to differ from itself."""
    try:
        tasks = compare(study, str(study.baseline), again).tasks
    except ComparisonError:
        return ""
    alarms = sum(row.verdict in (HIGHER, LOWER) for row in tasks)
    return f" and seems to differ on {alarms} of {len(tasks)} tasks" if tasks else ""


def _matched(frame: pd.DataFrame, base: str, variant: str) -> list[str]:
    found = None if frame.empty else learning_curves.matched(frame, base, variant)
    if found is None:
        return []
    sign = _sign(found.difference)
    number = found.difference.n_seeds
    word = {1: HIGHER, -1: LOWER, 0: NO_DIFFERENCE}[sign] if number >= MIN_SEEDS else "too few seeds to conclude"
    return [
        f"At equal validation lm_loss ({found.level:.3f}), mean accuracy over question types: {word}; {variant} "
        f"{percent(found.accuracy_b)}%, {base} {percent(found.accuracy_a)}%, difference "
        f"{_points(found.difference.mean, found.difference.interval, True)} ({_seeds(number)})."
    ]


def _plateau(frame: pd.DataFrame, variants: list[str]) -> list[str]:
    found = {name: learning_curves.plateau(frame, name) for name in variants} if not frame.empty else {}
    changes = {name: value.mean for name, value in found.items() if value is not None}
    if not changes:
        return []
    shown = ", ".join(f"{name} {percent(value, signed=True)}%" for name, value in changes.items())
    still = [name for name, value in changes.items() if abs(value) >= PLATEAU]
    end = f"no plateau yet in {', '.join(still)}" if still else "a plateau"
    return [f"Validation lm_loss over the last quarter of training: {shown} ({end})."]
