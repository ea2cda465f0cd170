"""A small synthetic study with known numbers, written through the real records and store."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import yaml

from prebench.config import dump_yaml, validate
from prebench.records import ProbeRow, SampleRecord, TaskRecord, to_dict
from prebench.schema import StudyConfig
from prebench.store import read_json, write_json, write_jsonl, write_record, write_text

LAYERS = 4
QUESTIONS = 4
ENCODER = 0.95
ACCURACY = {"baseline": (0.90, 0.80, 0.70, 0.60, 0.50), "pre": (0.90, 0.85, 0.80, 0.75, 0.60)}
"""Probe accuracy of the background by layer at seed 0; each further seed loses .01 in the baseline."""


CONTROLS: dict[str, dict[str, Any]] = {
    "pre-shuffled": {"regularizer": {"weight": 0.5, "anchor": "shuffled"}},
    "pre-frozen-copy": {"regularizer": {"weight": 0.5, "anchor": "frozen_copy"}},
    "norm-penalty": {"regularizer": {"type": "norm_penalty", "weight": 0.5}},
    "baseline-again": {"regularizer": {"weight": 0.0}, "seed_offset": 1000},
}
KINDS = {"color": 1.0, "count": 0.5}
"""Question types of the validation, and how much of the fall of the loss each turns into accuracy."""


def study_config(variants: Sequence[str], seeds: Sequence[int], probe: bool = True) -> StudyConfig:
    stage = {"steps": 1, "batch_size": 2, "learning_rate": 0.1}
    generated = {"data_source": "generated", "primary_metric": "exact_match", "num_images": 30}
    suite: dict[str, Any] = {
        "name": "tiny",
        "defaults": {"preset": "p"},
        "tasks": [
            {"task": "gqa", "label": "GQA on scenes", **generated},
            {"task": "prebench_easy_vqa", "label": "easy_VQA & more", **generated | {"data_source": "real"}},
        ],
    }
    if probe:
        attributes = [{"name": "background", "kind": "unasked"}, {"name": "fill", "kind": "asked"}]
        sizes = {"num_train": 5, "num_val": 5, "num_test": 5}
        suite["probe"] = sizes | {"attributes": attributes, "reference_attribute": "background"}
    values = {
        "name": "tiny-p",
        "preset": {
            "name": "p",
            "data": {"easy_vqa": {"questions_per_image": 1}},
            "train": {"align": stage, "instruct": stage},
        },
        "suite": suite,
        "variants": [
            {"name": name, **CONTROLS.get(name, {"regularizer": {"weight": 0.0 if name == "baseline" else 0.5}})}
            for name in variants
        ],
        "seeds": list(seeds),
    }
    return validate(StudyConfig, values, "test")


def sample(index: int, score: float | None, **changes: Any) -> SampleRecord:
    values = {
        "doc_id": index,
        "image_id": f"i{index // QUESTIONS:03d}",
        "prompt_hash": f"p{index}",
        "image_hash": f"h{index // QUESTIONS}",
        "question": "what color is the circle?",
        "target": "red",
        "response": None if score is None else "red",
        "score": score,
        "error": "the answer is empty" if score is None else None,
    }
    return SampleRecord(**values | changes)


def write_task(run: Path, task: str, label: str, source: str, samples: Sequence[SampleRecord]) -> None:
    variant, _, seed = run.name.rpartition("-s")
    scores = [s.score for s in samples if s.score is not None]
    record = TaskRecord(
        task=task,
        label=label,
        variant=variant,
        seed=int(seed),
        primary_metric="exact_match",
        score=float(np.mean(scores)) if scores else None,
        metrics={"exact_match": float(np.mean(scores)) if scores else 0.0, "length": 1.5},
        n=len(samples),
        n_errors=len(samples) - len(scores),
        data_source=source,
        references={"majority": 0.25, "blind": 0.4},
        hashes=hashes(run),
    )
    write_record(run / "eval" / f"{task}.json", record)
    write_jsonl(run / "eval" / f"{task}.samples.jsonl", samples)


def write_probe(run: Path, accuracy: Sequence[float]) -> None:
    rows = [ProbeRow(-1, LAYERS, "global", "background", "unasked", "accuracy", ENCODER, 100)]
    rows += [ProbeRow(-1, LAYERS, "global", "fill", "asked", "accuracy", 1.0, 100)]
    rows += [ProbeRow(-1, LAYERS, "patch", "", "", "auc", 0.9, 100)]
    for layer, value in enumerate(accuracy):
        rows.append(ProbeRow(layer, LAYERS, "global", "background", "unasked", "accuracy", value, 100))
        rows.append(ProbeRow(layer, LAYERS, "global", "fill", "asked", "accuracy", 0.99, 100))
        for metric, number in (("cohesion", 0.8), ("coupling", 0.4), ("contrast_ratio", 2.0)):
            rows.append(ProbeRow(layer, LAYERS, "patch", "", "", metric, number, 90))
        rows.append(ProbeRow(layer, LAYERS, "patch", "", "", "centred_difference", 1.2 - 0.1 * layer, 90))
        rows.append(ProbeRow(layer, LAYERS, "patch", "", "", "auc", 0.9 - 0.05 * layer, 90))
    pd.DataFrame([to_dict(row) for row in rows]).to_parquet(run / "probe.parquet")


def validation(step: int, lm_loss: float, accuracy: Mapping[str, float], stage: str = "instruct") -> dict[str, Any]:
    return {"kind": "validation", "stage": stage, "step": step, "lm_loss": lm_loss, "accuracy": dict(accuracy), "n": 40}


def write_curve(run: Path, losses: Sequence[float], shift: float = 0.0) -> None:
    """Write a log: a training line and a validation every ten steps, whose accuracy is (2 - loss) / 2 times KINDS."""
    lines: list[dict[str, Any]] = [{"stage": "align", "step": 0, "lm_loss": 3.0, "pre_loss": None}]
    for i, loss in enumerate(losses):
        lines.append({"stage": "instruct", "step": 10 * i, "lm_loss": loss, "pre_loss": None})
        accuracy = {kind: share * (2 - loss) / 2 + shift for kind, share in KINDS.items()}
        lines.append(validation(10 * i + 9, loss, accuracy))
    write_jsonl(run / "train.jsonl", lines)


def write_run(folder: Path, variant: str, seed: int, scores: Sequence[float | None], probe: bool = True) -> Path:
    run = folder / "runs" / f"{variant}-s{seed}"
    samples = [sample(index, score) for index, score in enumerate(scores)]
    write_task(run, "gqa", "GQA on scenes", "generated", samples)
    write_task(run, "prebench_easy_vqa", "easy_VQA & more", "real", samples[: len(samples) // 2])
    layer = {"baseline": 2, "pre": 2}.get(variant, 1)
    manifest = {"variant": variant, "seed": seed, "regularizer_layer": layer, "lm_loss": 0.5 + 0.1 * seed}
    write_json(run / "model" / "prebench.json", manifest)
    if probe:
        offset = 0.01 * seed if variant == "baseline" else 0.0
        write_probe(run, [value - offset for value in ACCURACY.get(variant, ACCURACY["pre"])])
    return run


def random_scores(seed: int, images: int, accuracy: float) -> list[float | None]:
    generator = np.random.default_rng(seed)
    image = np.repeat(generator.normal(0, 0.15, images), QUESTIONS)
    return [float(value) for value in generator.random(images * QUESTIONS) < accuracy + image]


StudyMaker = Callable[..., Path]


@pytest.fixture
def make_study(tmp_path: Path) -> StudyMaker:
    """Return a writer: variants with the accuracy of each, and seeds."""
    return study_maker(tmp_path)


def study_maker(tmp_path: Path) -> StudyMaker:

    def make(
        accuracies: Mapping[str, float] | None = None,
        seeds: Sequence[int] = (0, 1, 2),
        images: int = 30,
        probe: bool = True,
        name: str = "tiny-p",
    ) -> Path:
        chosen = accuracies or {"baseline": 0.5, "pre": 0.8}
        folder = tmp_path / "results" / name
        write_text(folder / "study.yaml", dump_yaml(study_config(list(chosen), seeds, probe)))
        for i, (variant, accuracy) in enumerate(chosen.items()):
            for seed in seeds:
                write_run(folder, variant, seed, random_scores(100 * seed + i, images, accuracy), probe)
        return folder

    return make


SNAPSHOTS = (0.25, 0.5)
STEPS = 40


def write_snapshots(folder: Path, gain: float = 0.2, loss: float = 0.1) -> None:
    """Give every run snapshots after 10 and 20 of 40 steps: `gain` less accurate in tasks, `loss` better probed each.

    So from the first snapshot to the finished model tasks gain twice `gain`, and probes lose twice `loss`.
    """
    path = folder / "study.yaml"
    config = yaml.safe_load(path.read_text(encoding="utf-8"))
    config["preset"]["train"]["instruct"]["steps"] = STEPS
    config["preset"]["train"]["snapshots"] = list(SNAPSHOTS)
    path.write_text(yaml.safe_dump(config), encoding="utf-8")
    for run in sorted((folder / "runs").iterdir()):
        variant, _, seed = run.name.rpartition("-s")
        for back, step in ((2, 10), (1, 20)):
            place = run / "snapshots" / f"step-{step}"
            write_json(place / "model" / "prebench.json", read_json(run / "model" / "prebench.json") | {"step": step})
            for task in ("gqa", "prebench_easy_vqa"):
                values = read_json(run / "eval" / f"{task}.json")
                values |= {"score": values["score"] - back * gain, "step": step, "hashes": hashes(run, f"-{step}")}
                write_json(place / "eval" / f"{task}.json", values)
            offset = 0.01 * int(seed) if variant == "baseline" else 0.0
            write_probe(place, [v - offset + back * loss for v in ACCURACY.get(variant, ACCURACY["pre"])])


def hashes(run: Path, end: str = "") -> dict[str, str]:
    return {"weights": f"w-{run.name}{end}", "data": "data"}
