"""Accuracy by question type beside blind accuracy: pooling, clusters, failures and the mark above blind."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from prebench.analysis import question_types
from prebench.analysis.join import load_study
from prebench.analysis.summary import summary_text
from prebench.analysis.tables import write_tables
from prebench.config import dump_yaml, validate
from prebench.records import SampleRecord
from prebench.schema import StudyConfig
from prebench.store import write_text

from .conftest import StudyMaker, sample, study_config, write_task

SOURCES = {
    "gqa": "generated",
    "vqav2_val": "generated",
    "pope": "generated",
    "mmbench_en_dev_static": "generated",
    "prebench_easy_vqa": "real",
}
IMAGES = 20


def write_study(folder: Path, seeds: Sequence[int], answers: Mapping[str, Sequence[SampleRecord]]) -> None:
    """Write a study of the variants `good` and `text` (which answers as the blind guesser), all tasks the same."""
    values = study_config(["good", "text"], seeds, probe=False).model_dump()
    common = {"primary_metric": "exact_match", "num_images": IMAGES, "questions_per_image": 8}
    values["suite"]["tasks"] = [
        {"task": task, "label": f"{task} label", "data_source": source, **common} for task, source in SOURCES.items()
    ]
    write_text(folder / "study.yaml", dump_yaml(validate(StudyConfig, values, "test")))
    for seed in seeds:
        for variant in ("good", "text"):
            for task, source in SOURCES.items():
                write_task(
                    folder / "runs" / f"{variant}-s{seed}", task, f"{task} label", source, answers[f"{variant}-s{seed}"]
                )


def documents(score: Mapping[str, float], seed: int, blind: bool = False) -> list[SampleRecord]:
    """Return `color` (blind .25) and `existence` (blind .5) questions: one and two per image."""
    generator = np.random.default_rng(seed)
    guesses = np.random.default_rng(99)
    found = []
    for image in range(IMAGES):
        for name in ("color", "existence", "existence"):
            guess = float(guesses.random() < (0.25 if name == "color" else 0.5))
            right = guess if blind else float(generator.random() < score[name])
            changes = {"image_id": str(image), "question_type": name, "blind_score": guess}
            found.append(sample(len(found), right, **changes))
    return found


def rows(folder: Path) -> pd.DataFrame:
    write_tables(load_study(folder))
    frame = pd.read_csv(folder / "tables" / "question_types.csv")
    return frame.set_index(["group", "question_type"])


@pytest.fixture
def answers() -> dict[str, list[SampleRecord]]:
    accuracy = {"color": 0.95, "existence": 0.9}
    return {
        f"{variant}-s{seed}": documents(accuracy, seed, blind=variant == "text")
        for seed in (0, 1, 2)
        for variant in ("good", "text")
    }


def test_scenes_are_pooled_and_the_rest_stands_apart(tmp_path: Path, answers) -> None:
    folder = tmp_path / "results" / "tiny-p"
    write_study(folder, (0, 1, 2), answers)
    found = rows(folder)
    labels = ["scenes", *(f"{task} label" for task in ("pope", "mmbench_en_dev_static", "prebench_easy_vqa"))]
    assert list(found.index) == [(label, name) for label in labels for name in ("color", "existence")]
    pooled, alone = found.loc[("scenes", "existence")], found.loc[("pope label", "existence")]
    # The same image ids in two tasks are different images: twice the clusters, not the same ones.
    assert (pooled["n_documents"], pooled["n_images"]) == (4 * IMAGES, 2 * IMAGES)
    assert (alone["n_documents"], alone["n_images"]) == (2 * IMAGES, IMAGES)
    assert found["data_source"].tolist() == ["generated"] * 6 + ["real"] * 2


def test_numbers_are_those_of_the_documents(tmp_path: Path, answers) -> None:
    folder = tmp_path / "results" / "tiny-p"
    write_study(folder, (0, 1, 2), answers)
    row = rows(folder).loc[("pope label", "existence")]
    chosen = {
        name: [[s.score for s in records if s.question_type == "existence"] for key, records in answers.items()
               if key.startswith(name)]
        for name in ("good", "text")
    }  # fmt: skip
    means = [float(np.mean(values)) for values in chosen["good"]]
    assert row["good"] == pytest.approx(np.mean(means), abs=1e-6)
    assert row["good ±"] == pytest.approx(np.std(means, ddof=1), abs=1e-6)
    half = 4.302653 * np.std(means, ddof=1) / np.sqrt(3)
    assert (row["good low"], row["good high"]) == pytest.approx(
        (np.mean(means) - half, np.mean(means) + half), abs=1e-6
    )
    # Blind over images: the mean of two documents per image, so an ordinary t interval of image means.
    blind = np.asarray(chosen["text"][0]).reshape(IMAGES, 2).mean(axis=1)
    half = 2.093024 * blind.std(ddof=1) / np.sqrt(IMAGES)
    expected = (blind.mean(), blind.mean() - half, blind.mean() + half)
    assert (row["blind"], row["blind_low"], row["blind_high"]) == pytest.approx(expected, abs=1e-6)
    assert row["n_seeds good"] == 3


@pytest.mark.parametrize("seeds", [(0,), (0, 1, 2)])
def test_only_what_reads_the_picture_is_above_blind(tmp_path: Path, answers, seeds) -> None:
    folder = tmp_path / "results" / "tiny-p"
    write_study(folder, seeds, answers)
    found = rows(folder)
    assert found["good above_blind"].all()
    assert not found["text above_blind"].any()
    # A guesser scores the same with every seed; what the images leave open is still shown.
    assert (found["text low"] < found["text"]).all()
    text = question_types.text(load_study(folder))
    line = next(line for line in text.splitlines() if line.startswith("scenes (generated): color"))
    assert line.count("*") == 1
    assert line in summary_text(load_study(folder))
    tex = (folder / "tables" / "question_types.tex").read_text()
    assert "multiple" not in tex and r"\toprule" in tex and "existence" in tex


def test_a_score_barely_over_blind_is_not_above(tmp_path: Path, answers) -> None:
    folder = tmp_path / "results" / "tiny-p"
    blind = np.mean([s.blind_score for s in answers["good-s0"] if s.question_type == "existence"])
    for seed in (0, 1, 2):
        answers[f"good-s{seed}"] = documents({"color": 1.0, "existence": blind + 0.08}, seed)
    write_study(folder, (0, 1, 2), answers)
    found = rows(folder)
    assert not found.loc[("pope label", "existence"), "good above_blind"]
    # All seeds at 100%: no spread over seeds, so the images decide, and all of them are right.
    assert found.loc[("pope label", "color"), "good low"] == 1.0
    assert found.loc[("pope label", "color"), "good above_blind"]


def test_a_failed_document_is_left_out_of_all_runs_and_counted(tmp_path: Path, answers) -> None:
    broken = answers["good-s1"][1]
    answers["good-s1"][1] = dataclasses.replace(broken, score=None, response=None, error="cut off")
    folder = tmp_path / "results" / "tiny-p"
    write_study(folder, (0, 1, 2), answers)
    row = rows(folder).loc[("pope label", "existence")]
    assert (row["n_documents"], row["n_images"], row["n_failed"]) == (2 * IMAGES - 1, IMAGES, 1)
    left = [s for i, s in enumerate(answers["text-s0"]) if s.question_type == "existence" and i != 1]
    assert row["text"] == row["blind"] == pytest.approx(np.mean([s.score for s in left]), abs=1e-6)


def test_a_run_that_lacks_a_pooled_task_does_not_count_there(tmp_path: Path, answers) -> None:
    folder = tmp_path / "results" / "tiny-p"
    write_study(folder, (0, 1, 2), answers)
    (folder / "runs" / "good-s2" / "eval" / "vqav2_val.json").unlink()
    found = rows(folder)
    assert found.loc[("scenes", "color"), "n_seeds good"] == 2
    assert found.loc[("pope label", "color"), "n_seeds good"] == 3


def test_a_run_on_other_data_does_not_count(tmp_path: Path, answers) -> None:
    folder = tmp_path / "results" / "tiny-p"
    write_study(folder, (0, 1, 2), answers)
    path = folder / "runs" / "good-s0" / "eval" / "pope.json"
    path.write_text(path.read_text().replace('"data": "data"', '"data": "other"'))
    assert rows(folder).loc[("pope label", "color"), ["n_seeds good", "n_seeds text"]].tolist() == [2, 3]


def test_records_without_types_give_an_empty_table(make_study: StudyMaker) -> None:
    folder = make_study()
    study = load_study(folder)
    assert question_types.of_study(study) == [] and question_types.text(study) == ""
    assert rows(folder).empty
    assert r"\bottomrule" in (folder / "tables" / "question_types.tex").read_text()
