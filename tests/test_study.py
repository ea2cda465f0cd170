"""A study on disk is created, extended, or refused with the difference."""

from __future__ import annotations

import pytest

from prebench.config import load_preset, load_suite, load_variant
from prebench.errors import StoreError, StudyMismatchError
from prebench.schema import StudyConfig
from prebench.study import locked, open_study, read_study, runs


def study(overrides=(), suite="smoke", variants=("baseline", "pre"), seeds=(0,)):
    return StudyConfig(
        name="s",
        preset=load_preset("smoke", overrides),
        suite=load_suite(suite),
        variants=tuple(load_variant(v) for v in variants),
        seeds=seeds,
    )


def test_opening_twice_changes_nothing(tmp_path):
    open_study(tmp_path, study())
    before = (tmp_path / "study.yaml").read_bytes(), (tmp_path / "study.yaml").stat().st_mtime_ns
    assert open_study(tmp_path, study()) == study()
    assert before == ((tmp_path / "study.yaml").read_bytes(), (tmp_path / "study.yaml").stat().st_mtime_ns)


def test_seeds_and_variants_extend(tmp_path):
    open_study(tmp_path, study(variants=("baseline",)))
    extended = open_study(tmp_path, study(variants=("baseline", "pre"), seeds=(1,)))
    assert [run.name for run in runs(tmp_path, extended)] == ["baseline-s0", "pre-s0", "baseline-s1", "pre-s1"]
    assert read_study(tmp_path) == extended


def test_another_recipe_is_refused_with_the_diff(tmp_path):
    open_study(tmp_path, study())
    before = (tmp_path / "study.yaml").read_bytes()
    with pytest.raises(StudyMismatchError, match=r"preset\.train\.instruct\.steps: \d+ -> 9"):
        open_study(tmp_path, study(overrides=["train.instruct.steps=9"]))
    assert (tmp_path / "study.yaml").read_bytes() == before


def test_another_definition_of_a_variant_is_refused(tmp_path):
    open_study(tmp_path, study())
    variant = load_variant("pre")
    changed = variant.model_copy(update={"regularizer": variant.regularizer.model_copy(update={"weight": 2.0})})
    with pytest.raises(StudyMismatchError, match=r"variant pre\.regularizer\.weight: 0\.5 -> 2\.0"):
        open_study(tmp_path, study().model_copy(update={"variants": (changed,)}))


def test_another_size_of_a_task_is_refused(tmp_path):
    open_study(tmp_path, study())
    with pytest.raises(StudyMismatchError, match=r"task gqa\.num_images: \d+ -> \d+"):
        open_study(tmp_path, study(suite="full"))


def test_one_process_at_a_time(tmp_path):
    with locked(tmp_path), pytest.raises(StoreError, match="another prebench process"), locked(tmp_path):
        pass
    with locked(tmp_path):
        pass


def test_a_folder_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(StoreError, match="can't be written"), locked(tmp_path / "file" / "study"):
        pass
