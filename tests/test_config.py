"""Configuration: strict, readable errors, overrides, diff, and every shipped file."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from prebench.config import (
    KINDS,
    diff,
    dump_yaml,
    list_configs,
    load_preset,
    load_suite,
    load_variant,
    read_yaml,
    validate,
)
from prebench.errors import ConfigError
from prebench.runtime import data_dir
from prebench.schema import PresetConfig, StudyConfig

LOADERS = {"presets": load_preset, "suites": load_suite, "variants": load_variant}


def test_every_shipped_file_loads():
    files = sorted(data_dir("configs").rglob("*.yaml"))
    loaded = [LOADERS[kind](name) for kind in KINDS for name in list_configs(kind)]
    assert len(loaded) == len(files) >= 6
    for name in list_configs("suites"):
        suite = load_suite(name)
        assert suite.defaults.preset in list_configs("presets")
        assert set(suite.defaults.variants) <= set(list_configs("variants"))


def test_overrides_apply_and_are_checked():
    preset = load_preset("embedded", ["train.instruct.steps=7", "model.language_model.hidden_size=96"])
    assert preset.train.instruct.steps == 7
    assert preset.model.language_model.hidden_size == 96
    assert list(diff(load_preset("embedded").model_dump(), preset.model_dump())) == [
        "model.language_model.hidden_size: 64 -> 96",
        f"train.instruct.steps: {load_preset('embedded').train.instruct.steps} -> 7",
    ]


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("train.instruct.step=7", "unknown key 'train.instruct.step' (did you mean 'steps'?"),
        ("train.instruct.steps", "write it as section.field=value"),
        ("train.instruct.steps=many", "train.instruct.steps: Input should be a valid integer"),
        ("train.instruct.steps=-1", "greater than or equal to 0"),
        ("name.x=1", "'name' is a value, not a section"),
        ("train.log_every=[1", "the value is no YAML"),
        ("data.scenes.min_objects=6", "min_objects 6 is larger than max_objects 5"),
        ("data.easy_vqa.num_images=4000", "less than or equal to 3600"),
        ("model.language_model.hidden_size=97", "hidden_size 97 is no multiple of 2 * num_attention_heads (8)"),
        ("model.vision_tower.patch_size=7", "image_size 96 is no multiple of patch_size (7)"),
        ("train.align.trainable=[]", "at least 1 item"),
        ("name=../x", "String should match pattern"),
    ],
)
def test_bad_overrides(override, message):
    with pytest.raises(ConfigError) as caught:
        load_preset("embedded", [override])
    assert message in str(caught.value)


def test_unknown_names_suggest():
    with pytest.raises(ConfigError, match=r"unknown suite 'smok' \(did you mean 'smoke'\?"):
        load_suite("smok")
    with pytest.raises(ConfigError, match=r"unknown variant 'prr' \(did you mean 'pre'\?"):
        load_variant("prr")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: [1", "malformed YAML"),
        ("- 1", "a mapping of names"),
        ("", "a mapping of names"),
        ("1: 2", "a mapping of names"),
    ],
)
def test_malformed_yaml_names_the_file(tmp_path, text, message):
    path = tmp_path / "broken.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError) as caught:
        load_variant(str(path))
    assert message in str(caught.value)
    assert str(path) in str(caught.value)


def test_a_study_names_everything_once():
    values = {
        "name": "s",
        "preset": load_preset("smoke"),
        "suite": load_suite("smoke"),
        "variants": (load_variant("pre"), load_variant("pre")),
        "seeds": (0,),
    }
    with pytest.raises(ConfigError, match="variant 'pre' is named twice"):
        validate(StudyConfig, values, "study s")
    deep = load_variant("pre")
    deep = deep.model_copy(update={"regularizer": deep.regularizer.model_copy(update={"layer": 99})})
    with pytest.raises(ConfigError, match=r"variant pre: regularizer.layer 99 lies outside 1\.\.6"):
        validate(StudyConfig, values | {"variants": (deep,)}, "study s")
    suite = load_suite("smoke").model_dump()
    with pytest.raises(ConfigError, match="task 'gqa' is named twice"):
        validate(type(load_suite("smoke")), suite | {"tasks": [*suite["tasks"], suite["tasks"][0]]}, "suite")


def test_extends_goes_on_until_a_file_extends_none(tmp_path):
    """A preset of the user's may extend a shipped one that extends another."""
    path = tmp_path / "mine.yaml"
    path.write_text("extends: siglip2-qwen25-0.5b\nname: mine\ntrain: {instruct: {steps: 7}}\n")
    mine, shipped = load_preset(str(path)), load_preset("siglip2-qwen25-0.5b")
    assert (mine.name, mine.train.instruct.steps, mine.model) == ("mine", 7, shipped.model)
    assert mine.train.instruct.model_copy(update={"steps": shipped.train.instruct.steps}) == shipped.train.instruct


def test_extends_in_a_circle_is_refused(tmp_path):
    one, other = tmp_path / "one.yaml", tmp_path / "other.yaml"
    one.write_text(f"extends: {other}\nname: one\n")
    other.write_text(f"extends: {one}\nname: other\n")
    with pytest.raises(ConfigError, match=r"other.yaml: extends .*one.yaml', which leads back to a file"):
        load_variant(str(one))


def test_yaml_objects_are_not_constructed(tmp_path):
    path = tmp_path / "evil.yaml"
    path.write_text("a: !!python/object/apply:os.system ['true']\n")
    with pytest.raises(ConfigError):
        read_yaml(path)


def test_study_round_trips(tmp_path):
    study = StudyConfig(
        name="s",
        preset=load_preset("embedded"),
        suite=load_suite("full"),
        variants=(load_variant("baseline"), load_variant("pre")),
        seeds=(0, 1),
    )
    path = tmp_path / "study.yaml"
    path.write_text(dump_yaml(study))
    assert validate(StudyConfig, read_yaml(path), "x") == study


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=8,
)


@given(st.dictionaries(st.sampled_from(["name", "data", "model", "train", "x"]), json_values))
def test_any_mapping_gives_a_config_or_a_config_error(values):
    try:
        validate(PresetConfig, values, "file.yaml")
    except ConfigError as error:
        assert str(error).startswith("file.yaml: ")


@given(json_values)
def test_diff_of_equals_is_empty(value):
    assert list(diff(value, value)) == []
