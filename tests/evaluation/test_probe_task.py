"""The probe task's functions: a part of the data set is refused, rows may come from several shards in any order."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from prebench.errors import EvaluationError
from prebench.evaluation import probe_task
from prebench.probe.extract import ProbeFeatures
from prebench.store import read_json

LAYERS = 4


@pytest.fixture(autouse=True)
def _config(monkeypatch: pytest.MonkeyPatch) -> None:
    chosen = {"attributes": [{"name": "background", "kind": "unasked"}], "reference_attribute": "background"}
    monkeypatch.setenv(probe_task.CONFIG_VARIABLE, json.dumps(chosen))


def _features(labels: np.ndarray, rng: np.random.Generator) -> ProbeFeatures:
    """The encoder and the outer layers tell the label, the middle layers 1..3 are noise."""
    pooled = rng.normal(size=(len(labels), LAYERS + 1, 3)).astype(np.float32)
    pooled[:, [0, 4], 0] = 9 * labels[:, None]
    encoder = np.stack([9.0 * labels, rng.normal(size=len(labels))], axis=1).astype(np.float32)
    structure = rng.uniform(size=(len(labels), LAYERS + 1, 5)).astype(np.float32)
    return ProbeFeatures(pooled, encoder, structure, structure[:, 0])


def _items(folder: Path, per_shard: tuple[int, ...]) -> list[dict]:
    """Answers of several processes, one shard each, in mixed order."""
    rng = np.random.default_rng(0)
    documents = []
    for number, count in enumerate(per_shard):
        labels = rng.integers(0, 2, count)
        shard = folder / f"features-rank{number}.safetensors"
        _features(labels, rng).save(shard)
        for row, label in enumerate(labels):
            answer = json.dumps({"shard": str(shard), "row": row, "num_layers": LAYERS})
            subset = ("train", "train", "val", "test", "test")[row % 5]
            document = {"background": int(label), "subset": subset, probe_task.SIZE_COLUMN: sum(per_shard)}
            documents.append(probe_task.process_results(document, [answer])["degradation"])
    return [documents[i] for i in rng.permutation(len(documents))]


def test_metrics_come_from_the_reference_attribute(tmp_path: Path) -> None:
    items = _items(tmp_path, (80, 50))
    assert probe_task.encoder_accuracy(items) == 1.0
    rows = read_json(tmp_path / probe_task.LAYERS_FILE)
    accuracy = {r["layer"]: r["value"] for r in rows if r["metric"] == "accuracy"}
    assert accuracy[0] == accuracy[4] == 1.0  # features and labels kept together across shards
    middle = (accuracy[1] + accuracy[2] + accuracy[3]) / 3
    assert middle < 0.8
    assert probe_task.mid_depth_accuracy(items) == pytest.approx(middle)
    assert probe_task.degradation(items) == pytest.approx(1.0 - middle)


def test_a_part_of_the_data_set_is_refused(tmp_path: Path) -> None:
    items = _items(tmp_path, (20,))
    with pytest.raises(EvaluationError, match=r"19 of 20 images; probes need all of them \(no --limit\)"):
        probe_task.degradation(items[:-1])


def test_text_instead_of_features_is_refused() -> None:
    with pytest.raises(EvaluationError, match="gave no features"):
        probe_task.process_results({"background": 1, "subset": "test", probe_task.SIZE_COLUMN: 1}, ["a red circle"])


def test_a_missing_column_is_named() -> None:
    answer = json.dumps({"shard": "x", "row": 0})
    with pytest.raises(EvaluationError, match="no column 'background'"):
        probe_task.process_results({"subset": "test", probe_task.SIZE_COLUMN: 1}, [answer])


@pytest.mark.parametrize("text", ["[", "{}", '{"attributes": [], "reference_attribute": "x"}'])
def test_a_malformed_configuration_is_named(monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    monkeypatch.setenv(probe_task.CONFIG_VARIABLE, text)
    with pytest.raises(EvaluationError, match="PREBENCH_PROBE_CONFIG"):
        probe_task.attributes()
