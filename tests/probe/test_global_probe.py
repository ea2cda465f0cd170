"""The batched linear probe against scikit-learn, its controls and its refusals."""

from __future__ import annotations

import numpy as np
import pytest
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import log_loss
from sklearn.preprocessing import StandardScaler

from prebench.errors import DataError
from prebench.probe.global_probe import PENALTIES, fit_linear_probe


def make_sets(classes: int, sizes=(240, 120, 400), sets: int = 3, dims: int = 20, noise: float = 3.0, seed: int = 0):
    """Noisy class means under ill-conditioned mixing, worse with each set: [n, S, D] and labels, three times."""
    rng = np.random.default_rng(seed)
    n = sum(sizes)
    labels = rng.integers(0, classes, size=n)
    means = rng.normal(size=(classes, dims))
    mixing = rng.normal(size=(sets, dims, dims)) * np.geomspace(1, 0.01, dims)
    features = [(means[labels] + noise * (1 + s / 2) * rng.normal(size=(n, dims))) @ mixing[s] + 5 for s in range(sets)]
    stacked = np.stack(features, axis=1).astype(np.float32)
    edges = np.cumsum(sizes)[:-1]
    return [part for pair in zip(np.split(stacked, edges), np.split(labels, edges), strict=True) for part in pair]


def reference_accuracy(data, index: int, penalties=PENALTIES) -> float:
    """scikit-learn's accuracy on one feature set, C chosen by the same rule."""
    train, train_labels, val, val_labels, test, test_labels = data
    scaler = StandardScaler().fit(train[:, index].astype(np.float64))
    best, accuracy = np.inf, np.nan
    for penalty in penalties:
        model = LogisticRegression(C=penalty, tol=1e-7, max_iter=5000)
        model.fit(scaler.transform(train[:, index].astype(np.float64)), train_labels)
        loss = log_loss(val_labels, model.predict_proba(scaler.transform(val[:, index].astype(np.float64))))
        if loss >= best:
            break
        best = loss
        accuracy = model.score(scaler.transform(test[:, index].astype(np.float64)), test_labels)
    return accuracy


@pytest.mark.parametrize("classes", [2, 3, 7])
def test_accuracy_agrees_with_scikit_learn_on_every_layer(classes):
    data = make_sets(classes)
    result = fit_linear_probe(*data)
    expected = [reference_accuracy(data, index) for index in range(3)]
    np.testing.assert_allclose(result.accuracy, expected, atol=0.005)
    assert result.accuracy[0] > 1.2 / classes  # the agreement is not one of two chance levels


@pytest.mark.parametrize("penalty", [1e-3, 1.0, 100.0])
@pytest.mark.parametrize("classes", [2, 4])
def test_predictions_agree_with_scikit_learn_at_any_strength(classes, penalty):
    data = make_sets(classes, noise=1.0)
    result = fit_linear_probe(*data, penalties=[penalty])
    for index in range(3):
        assert result.accuracy[index] == pytest.approx(reference_accuracy(data, index, [penalty]), abs=0.0026)
        assert result.penalty[index] == penalty


def test_layers_do_not_influence_each_other_nor_does_scale(monkeypatch: pytest.MonkeyPatch):
    data = make_sets(4)
    together = fit_linear_probe(*data)
    scaled = [part * np.float32(1000) if part.ndim == 3 else part for part in data]
    assert (fit_linear_probe(*scaled).correct == together.correct).mean() > 0.999
    monkeypatch.setattr("prebench.probe.global_probe.CHUNK_BYTES", 1)
    alone = fit_linear_probe(*data)
    assert np.array_equal(alone.penalty, together.penalty)
    assert (alone.correct == together.correct).mean() > 0.999


def test_correctness_is_given_per_image():
    data = make_sets(3)
    result = fit_linear_probe(*data)
    assert result.correct.shape == (400, 3) and result.correct.dtype == bool and result.n == 400
    np.testing.assert_array_equal(result.correct.mean(axis=0), result.accuracy)


def test_constant_features_and_more_features_than_images_are_fine():
    data = make_sets(2, sizes=(30, 30, 200), dims=60, noise=0.3)
    for part in data[::2]:
        part[:, :, 7] = 3.25
    assert (fit_linear_probe(*data).accuracy > 0.9).all()


def test_shuffled_labels_leave_chance_and_follow_their_seed():
    data = make_sets(4, noise=0.5)
    assert (fit_linear_probe(*data).accuracy > 0.9).all()
    control = fit_linear_probe(*data, shuffle_seed=1)
    assert (control.accuracy < 0.45).all()
    assert np.array_equal(control.correct, fit_linear_probe(*data, shuffle_seed=1).correct)
    assert not np.array_equal(control.correct, fit_linear_probe(*data, shuffle_seed=2).correct)


def test_an_image_of_an_unseen_class_counts_as_wrong():
    data = make_sets(3)
    data[3][:5] = 9
    data[5][:10] = 9
    result = fit_linear_probe(*data)
    assert not result.correct[:10].any() and result.correct[10:].any()


def _break(index: int, value):
    def change(data):
        data[index] = value(data[index])

    return change


def _with_nan(features):
    features = features.copy()
    features[3, 1, 2] = np.nan
    return features


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_break(1, np.zeros_like), "one class only"),
        (_break(0, _with_nan), r"NaN or infinite values in 1 of 240 images"),
        (_break(4, _with_nan), "test features: NaN"),
        (_break(1, lambda y: np.arange(len(y))[:-1]), "labels"),
        (_break(5, lambda y: np.arange(len(y))), "240 training images for 400 classes"),
        (_break(3, lambda y: y.astype(float)), "integer"),
        (_break(2, lambda x: x[:, :1]), "shape"),
    ],
)
def test_wrong_input_is_one_clear_line(change, message):
    data = make_sets(3)
    change(data)
    with pytest.raises(DataError, match=message) as caught:
        fit_linear_probe(*data, name="background")
    assert str(caught.value).startswith("background: ") and "\n" not in str(caught.value)


def test_an_empty_subset_is_refused():
    data = make_sets(3)
    data[2], data[3] = data[2][:0], data[3][:0]
    with pytest.raises(DataError, match="no val images"):
        fit_linear_probe(*data)
