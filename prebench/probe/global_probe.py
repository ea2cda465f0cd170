"""Global function: multinomial logistic regression on frozen features, all layers solved together.

The objective is scikit-learn's `LogisticRegression(C=C)` on standardised features. Here a batched L-BFGS (Nocedal and
Wright, Numerical Optimization, algorithm 7.4) solves it in float64, preconditioned by Böhning's (1992) bound on the
curvature of the multinomial likelihood. In the eigenbasis of each layer's covariance that bound is diagonal, so
correlated features, on which plain L-BFGS crawls, cost some tens of steps. docs/probes.md has the formulas.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from prebench.errors import DataError

PENALTIES = (1e-3, 1e-2, 1e-1, 1.0, 10.0)
"""Candidates for C, the inverse strength of the L2 penalty (scikit-learn's C), weakest last."""
TOLERANCE = 3e-5
"""Largest entry of the gradient at which a solution counts as converged (scikit-learn's default is 1e-4)."""
MAX_STEPS = 500
MAX_HALVINGS = 30
MEMORY = 5
"""Pairs of steps that L-BFGS remembers; more save few steps and make each dearer."""
CHUNK_BYTES = 1 << 29
"""Layers are solved together in groups whose float64 features stay below this size."""

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class ProbeResult:
    """Test accuracy of one attribute's linear probes on S feature sets (layers)."""

    accuracy: np.ndarray
    """[S] float64: share of right predictions on the test images."""
    penalty: np.ndarray
    """[S] float64: the C that the validation images chose."""
    n: int
    """Test images."""
    correct: np.ndarray
    """[n, S] bool: which test images each probe got right."""


def fit_linear_probe(
    features_train: np.ndarray,
    labels_train: np.ndarray,
    features_val: np.ndarray,
    labels_val: np.ndarray,
    features_test: np.ndarray,
    labels_test: np.ndarray,
    *,
    penalties: Sequence[float] = PENALTIES,
    shuffle_seed: int | None = None,
    name: str = "probe",
) -> ProbeResult:
    """Fit one linear classifier per feature set on the training images and score it on the test images.

    Features are standardised by the training images' mean and standard deviation. Per feature set, C goes from strong
    to weak until the log loss on the validation images falls no further, and the lowest is taken. Log loss, since
    accuracy on a few hundred images jumps between neighbours of the grid. The classifier is not refitted on training
    plus validation images.

    Args:
        features_train: [n_train, S, D], float; S feature sets (layers) of the same images.
        labels_train: [n_train] integers; their distinct values are the classes.
        features_val: [n_val, S, D].
        labels_val: [n_val]; images of a class that training lacks do not count in the choice of C.
        features_test: [n_test, S, D].
        labels_test: [n_test]; an image of a class that training lacks counts as wrong.
        penalties: candidates for C.
        shuffle_seed: the control of Hewitt and Liang (2019): permute the training and validation labels with this
            seed. What accuracy remains is chance.
        name: what is probed; for error messages.

    Raises:
        DataError: features or labels of the wrong shape, not finite, without images, of one class only, or with fewer
            training images than classes.
    """
    sets = (
        ("train", features_train, labels_train),
        ("val", features_val, labels_val),
        ("test", features_test, labels_test),
    )
    for subset, features, labels in sets:
        _check(name, subset, features, labels, features_train.shape[1:])
    classes = np.unique(labels_train)
    _check_classes(name, classes, labels_train, labels_val, labels_test)
    if shuffle_seed is not None:
        rng = np.random.default_rng(shuffle_seed)
        labels_train, labels_val = rng.permutation(labels_train), rng.permutation(labels_val)

    targets = torch.from_numpy(np.searchsorted(classes, labels_train))
    step = layers_at_once(features_train.shape[0], features_train.shape[2])
    chosen, correct = [], []
    for start in range(0, features_train.shape[1], step):
        part = [_as_sets(f[:, start : start + step]) for f in (features_train, features_val, features_test)]
        c, right = _fit_chunk(part, targets, labels_val, labels_test, classes, sorted(penalties), name)
        chosen.append(c)
        correct.append(right)
    right_NS = np.concatenate(correct, axis=1)
    return ProbeResult(right_NS.mean(axis=0), np.concatenate(chosen), len(labels_test), right_NS)


def layers_at_once(num_train: int, dims: int) -> int:
    """Return how many feature sets are solved together, so that their float64 training features fit `CHUNK_BYTES`."""
    return max(1, CHUNK_BYTES // (8 * max(num_train, 1) * max(dims, 1)))


def _check(name: str, subset: str, features: np.ndarray, labels: np.ndarray, sets_and_dims: tuple[int, ...]) -> None:
    where = f"{name}: {subset} features"
    if features.ndim != 3 or features.shape[1:] != sets_and_dims or labels.shape != features.shape[:1]:
        raise DataError(
            f"{where} have shape {features.shape} and labels {labels.shape}; expected [n, sets, dims] and [n]"
        )
    if len(labels) == 0:
        raise DataError(f"{name}: no {subset} images; a probe needs training, validation and test images")
    if labels.dtype.kind not in "biu":
        raise DataError(f"{name}: {subset} labels are {labels.dtype}, expected one integer per image")
    if not np.isfinite(features).all():
        bad = int((~np.isfinite(features)).any(axis=(1, 2)).sum())
        raise DataError(f"{where}: NaN or infinite values in {bad} of {len(labels)} images; check the model's weights")


def _check_classes(name: str, classes: np.ndarray, *labels: np.ndarray) -> None:
    known = np.unique(np.concatenate(labels))
    if len(classes) < 2:
        raise DataError(f"{name}: the training images have one class only ({classes[0]}); a probe needs two")
    if len(labels[0]) < len(known):
        raise DataError(f"{name}: {len(labels[0])} training images for {len(known)} classes; add images")


def _as_sets(features: np.ndarray) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(features.transpose(1, 0, 2), dtype=np.float64))


def _fit_chunk(
    features: list[Tensor],
    targets: Tensor,
    labels_val: np.ndarray,
    labels_test: np.ndarray,
    classes: np.ndarray,
    penalties: Sequence[float],
    name: str,
) -> tuple[np.ndarray, np.ndarray]:
    """Return the chosen C, [S], and which test images are right, [n_test, S]."""
    (train, val, test), curvature = _whiten(features)
    onehot = torch.nn.functional.one_hot(targets, len(classes)).double().T
    seen = np.isin(labels_val, classes)
    val_rows = torch.from_numpy(np.flatnonzero(seen))
    val_targets = torch.from_numpy(np.searchsorted(classes, labels_val[seen]))
    best_weights = train.new_zeros(train.shape[0], len(classes), train.shape[2])
    best_loss = torch.full((len(train),), torch.inf, dtype=torch.float64)
    chosen = torch.zeros_like(best_loss)
    falling = torch.arange(len(train))  # the sets whose validation loss still falls along the path
    for penalty in penalties:  # from strong to weak: each solution starts at the one before
        # With two classes scikit-learn fits one weight vector w = w_1 - w_0, whose ||w||^2 is twice ours.
        ridge = (2.0 if len(classes) == 2 else 1.0) / (penalty * len(targets))
        weights = _minimise(train[falling], onehot, ridge, curvature[falling], best_weights[falling], name)
        log_p = torch.log_softmax(weights @ val[falling][:, val_rows].transpose(1, 2), dim=1)
        loss = -log_p.gather(1, val_targets.expand(len(log_p), 1, -1)).sum(dim=(1, 2))
        better = loss < best_loss[falling]
        falling = falling[better]
        best_loss[falling], best_weights[falling], chosen[falling] = loss[better], weights[better], penalty
        if len(falling) == 0:
            break
    predicted = classes[(best_weights @ test.transpose(1, 2)).argmax(dim=1).numpy()]
    return chosen.numpy(), (predicted == labels_test).T


def _whiten(features: list[Tensor]) -> tuple[list[Tensor], Tensor]:
    """Standardise by the first set, rotate to its principal axes and append a column of ones for the intercept.

    The rotation leaves ||W||^2, and so the solution's predictions, unchanged.

    Returns:
        The sets, each [S, n, D + 1], and the variances along the new axes, [S, 1, D + 1] (1 for the intercept).
    """
    train = features[0]
    mean, scale = train.mean(dim=1, keepdim=True), train.std(dim=1, keepdim=True, correction=0)
    scale = torch.where(scale > 1e-8 * mean.abs(), scale, 1.0)  # a constant feature stays at zero
    standard = [(f - mean) / scale for f in features]
    variances, axes = torch.linalg.eigh(standard[0].transpose(1, 2) @ standard[0] / train.shape[1])
    rotated = [torch.cat([f @ axes, f.new_ones(*f.shape[:2], 1)], dim=2) for f in standard]
    ones = variances.new_ones(len(variances), 1)
    return rotated, torch.cat([variances.clamp(min=0), ones], dim=1)[:, None]


def _objective(x_SND: Tensor, y_CN: Tensor, ridge: float, w_SCD: Tensor) -> tuple[Tensor, Tensor]:
    """Return mean cross-entropy + ridge / 2 ||W||^2 (last column of W, the intercept, free), [S], and its gradient."""
    log_p = torch.log_softmax(w_SCD @ x_SND.transpose(1, 2), dim=1)
    penalised = w_SCD * ridge
    penalised[..., -1] = 0.0
    value = -(log_p * y_CN).sum(dim=(1, 2)) / y_CN.shape[1] + (penalised * w_SCD).sum(dim=(1, 2)) / 2
    gradient = ((log_p.exp_() - y_CN) / y_CN.shape[1]) @ x_SND + penalised
    return value, gradient


def _minimise(x: Tensor, y: Tensor, ridge: float, curvature: Tensor, start: Tensor, name: str) -> Tensor:
    """Return the minimisers, [S, C, D + 1]: S problems side by side, each with a step length of its own.

    Args:
        x: [S, n, D + 1] features, the last column ones.
        y: [C, n] one-hot labels.
        ridge: strength of the penalty.
        curvature: [S, 1, D + 1] variances of the features (`_whiten`).
        start: [S, C, D + 1].
        name: for the warning about a solution short of the optimum.
    """
    solution, rows = start.clone(), torch.arange(len(start))
    bound = 0.5 * curvature + ridge  # Böhning: the likelihood's curvature is at most half the features' variance
    bound[..., -1] = 0.5
    w = start
    value, gradient = _objective(x, y, ridge, w)
    history: list[tuple[Tensor, Tensor, Tensor]] = []
    stuck = torch.zeros_like(value, dtype=torch.bool)
    for _ in range(MAX_STEPS):
        done = stuck | (gradient.abs().amax(dim=(1, 2)) <= TOLERANCE)
        if 2 * int(done.sum()) >= len(done):  # go on with the unfinished half
            solution[rows[done]], rest = w[done], ~done
            if not bool(rest.any()):
                return solution
            x, bound, w, value, gradient, rows, stuck, done = (
                t[rest] for t in (x, bound, w, value, gradient, rows, stuck, done)
            )
            history = [(moved[rest], change[rest], product[rest]) for moved, change, product in history]
        direction = torch.where(done[:, None, None], 0.0, -_inverse_hessian(gradient, 1 / bound, history))
        slope = (gradient * direction).sum(dim=(1, 2))
        new_w, new_value, new_gradient, accepted = _line_search(x, y, ridge, w, value, direction, slope)
        stuck = stuck | ~accepted  # no decrease left at float64's precision
        keep = accepted[:, None, None]
        moved = torch.where(keep, new_w - w, 0.0)
        change = torch.where(keep, new_gradient - gradient, 0.0)
        w, gradient = torch.where(keep, new_w, w), torch.where(keep, new_gradient, gradient)
        value = torch.where(accepted, new_value, value)
        history = [*history[-(MEMORY - 1) :], (moved, change, (moved * change).sum(dim=(1, 2)))]
    logger.warning("%s: a linear probe stopped after %d steps short of the optimum", name, MAX_STEPS)
    solution[rows] = w
    return solution


def _line_search(
    x: Tensor, y: Tensor, ridge: float, w: Tensor, value: Tensor, direction: Tensor, slope: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Halve each problem's step until its objective falls enough (Armijo); return point, value, gradient, success."""
    length = torch.ones_like(value)
    for _ in range(MAX_HALVINGS):
        new_w = w + length[:, None, None] * direction
        new_value, new_gradient = _objective(x, y, ridge, new_w)
        accepted = new_value <= value + 1e-4 * length * slope + 1e-14 * value.abs()
        if bool(accepted.all()):
            break
        length = torch.where(accepted, length, length / 2)
    return new_w, new_value, new_gradient, accepted


def _inverse_hessian(gradient: Tensor, scale: Tensor, history: Sequence[tuple[Tensor, Tensor, Tensor]]) -> Tensor:
    """Return H^-1 times the gradient (two-loop recursion); pairs without curvature (finished problems) drop out."""
    result = gradient
    factors = []
    for moved, change, product in reversed(history):
        rho = torch.where(product > 0, 1.0 / product, 0.0)
        alpha = rho * (moved * result).sum(dim=(1, 2))
        result = result - alpha[:, None, None] * change
        factors.append((rho, alpha))
    result = result * scale
    if history:
        _, change, product = history[-1]
        gamma = product / (change * scale * change).sum(dim=(1, 2))
        result = result * torch.where(product > 0, gamma, 1.0)[:, None, None]
    for (moved, change, _), (rho, alpha) in zip(history, reversed(factors), strict=True):
        beta = rho * (change * result).sum(dim=(1, 2))
        result = result + (alpha - beta)[:, None, None] * moved
    return result
