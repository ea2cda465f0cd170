"""`prebench probe MODEL` through the command line: every kind of data, what it leaves, and what it refuses."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import datasets
import numpy as np
import pandas as pd
import pytest
import torch
import yaml
from click.testing import CliRunner
from PIL import Image
from safetensors.torch import load_file, save_file

from prebench.cli import main
from prebench.data.scenes import generate_scene, labels, render
from prebench.store import read_json, write_json

FAST = ("--no-random-weights", "--device", "cpu")
SUITE = {
    "defaults": {"preset": "smoke"},
    "tasks": [],
    "probe": {
        "num_train": 40,
        "num_val": 10,
        "num_test": 20,
        "attributes": [{"name": "fill", "kind": "unasked"}],
        "reference_attribute": "fill",
    },
}
CLASSES = {"dark": 40, "grey": 110, "light": 180}


@pytest.fixture(autouse=True)
def _caches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Images are probed in the test's folder: the default output lies in the working directory."""
    monkeypatch.chdir(tmp_path)


def call(*arguments: object):
    return CliRunner().invoke(main, ["probe", *(str(a) for a in arguments)])


def done(*arguments: object) -> str:
    result = call(*arguments)
    assert result.exit_code == 0, (result.output, result.exception)
    return result.output


def refused(*arguments: object) -> str:
    """Run what must be refused in one line with exit code 2; return the line."""
    result = call(*arguments)
    assert result.exit_code == 2, (result.output, result.exception)
    assert isinstance(result.exception, SystemExit)
    lines = [line for line in result.stderr.splitlines() if line.startswith("prebench:")]
    assert len(lines) == 1, result.stderr
    return lines[0]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An image folder of three classes, 20 pictures of two shapes each."""
    root = tmp_path_factory.mktemp("images")
    rng = np.random.default_rng(0)
    for name, level in CLASSES.items():
        (root / name).mkdir()
        for number in range(20):
            shape = (32, 48, 3) if number % 2 else (40, 40, 3)
            pixels = rng.integers(level, level + 60, shape, dtype=np.uint8)
            Image.fromarray(pixels).save(root / name / f"{number}.png")
    return root


def scene_table(count: int = 12) -> datasets.Dataset:
    scenes = [generate_scene(0, "probe", index) for index in range(count)]
    drawn = [render(scene) for scene in scenes]
    columns = {
        "picture": [image for image, _ in drawn],
        "objects": [Image.fromarray(mask) for _, mask in drawn],
        "fill": [labels(scene)["fill"] for scene in scenes],
        "word": [f"{labels(scene)['fill']}!" for scene in scenes],
    }
    made = datasets.Dataset.from_dict(columns)
    return made.cast_column("picture", datasets.Image()).cast_column("objects", datasets.Image())


@pytest.fixture(scope="module")
def parquet(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("parquet") / "scenes.parquet"
    scene_table().to_parquet(str(path))
    return path


@pytest.fixture
def suite(tmp_path: Path) -> Path:
    path = tmp_path / "tiny.yaml"
    path.write_text(yaml.safe_dump(SUITE))
    return path


def rows(output: Path | str, **chosen: object) -> pd.DataFrame:
    frame = pd.read_parquet(Path(output) / "probe.parquet")
    for name, value in chosen.items():
        frame = frame[frame[name] == value]
    return frame


def test_an_image_folder_is_probed_with_every_control_and_not_twice(tiny_export: Path, folder: Path) -> None:
    arguments = (tiny_export, "--data", folder, "--output", "out", "--device", "cpu")
    text = done(*arguments)
    for metric, layers in {
        "accuracy": [-1, 0, 1, 2, 3, 4],
        "accuracy_10_per_class": [],  # fewer than ten of a class are for training
        "random_weights_accuracy": [1, 2, 3, 4],
        "shuffled_label_accuracy": [-1, 2],
        "raw_pixel_accuracy": [-1],
    }.items():
        found = rows("out", level="global", metric=metric)
        assert sorted(found["layer"]) == layers, metric
        assert set(found["attribute"]) <= {"label"} and (found["n"] == 20).all()
    assert rows("out", metric="accuracy", layer=-1)["value"].item() >= 0.9
    assert rows("out", level="patch").empty
    assert re.search(r"label: accuracy, %: encoder [0-9.]+ \[[0-9.]+, [0-9.]+\]; layer 0 .*; random weights .*", text)
    summary = pd.read_csv("out/summary.csv")
    assert summary["layer"].tolist() == [-1, 0, 1, 2, 3, 4]
    low, high = summary["label_accuracy_low"], summary["label_accuracy_high"]
    assert ((low <= summary["label_accuracy"]) & (summary["label_accuracy"] <= high) & (low < high)).all()
    names = {"probe.parquet", "probe.json", "probe_maps.json", "summary.csv", "layer_curves.svg", "layer_curves.pdf"}
    assert {path.name for path in Path("out").iterdir()} == names
    before = {path: path.stat().st_mtime_ns for path in Path("out").iterdir()}
    assert "probed already" in done(*arguments)
    assert {path: path.stat().st_mtime_ns for path in Path("out").iterdir()} == before
    assert "out/probe.parquet: made with other config" in refused(*arguments, "--seed", 1)


@pytest.mark.slow
def test_scenes_are_those_of_the_task_and_equal_a_table_of_them(tiny_export: Path, suite: Path) -> None:
    run = Path("runs/pre-s0")
    shutil.copytree(tiny_export, run / "model")
    done(run, "--suite", suite, *FAST)
    made = scene_table(70).add_column("subset", ["train"] * 40 + ["val"] * 10 + ["test"] * 20)
    made.save_to_disk("saved")
    columns = ("--image-column", "picture", "--mask-column", "objects", "--label-columns", "fill")
    done(run / "model", "--data", "saved", *columns, "--output", "table", *FAST)
    one, other = rows("pre-s0-probe").drop(columns="kind"), rows("table").drop(columns="kind")
    assert set(one["level"]) - set(other["level"]) == {"category"}  # a table of masks alone names no shapes
    one = one[one["level"] != "category"].reset_index(drop=True)
    pd.testing.assert_frame_equal(one, other)
    assert set(rows("pre-s0-probe", level="global")["kind"]) == {"unasked"}
    assert sorted(rows("table", level="patch", metric="auc")["layer"]) == [-1, 0, 1, 2, 3, 4]
    maps = read_json(Path("table/probe_maps.json"))["maps"]
    assert maps == read_json(Path("pre-s0-probe/probe_maps.json"))["maps"]
    assert {found["layer"] for found in maps} == {0, 2, 4} and min(found["image_id"] for found in maps) >= 50
    assert len(maps) == 4 * 2 * 3


@pytest.mark.slow
def test_texts_are_classes_and_masks_alone_are_enough(tiny_export: Path, parquet: Path) -> None:
    seen = ("--data", parquet, "--image-column", "picture", *FAST)
    done(tiny_export, *seen, "--label-columns", "fill,word", "--output", "labels")
    fill, word = (rows("labels", metric="accuracy", attribute=name)["value"].tolist() for name in ("fill", "word"))
    assert fill == word and rows("labels", level="patch").empty
    done(tiny_export, *seen, "--mask-column", "objects", "--output", "masks")
    assert rows("masks", level="global").empty
    assert rows("masks", level="patch", metric="cohesion")["n"].tolist() == [12] * 6
    assert rows("masks", level="category").empty
    done(tiny_export, *seen, "--mask-column", "objects", "--semantic-masks", "--output", "classes")
    present = [set(np.unique(render(generate_scene(0, "probe", index))[1])) - {0} for index in range(12)]
    found = rows("classes", level="category", metric="cohesion", layer=2).set_index("attribute")["n"]
    # An id that covers no two patches has no cohesion, so a class may have fewer values than images that show it.
    assert set(found.index) <= {str(number) for number in set().union(*present)} and len(found) > 1
    assert all(found[name] <= sum(int(name) in ids for ids in present) for name in found.index)
    assert found.sum() == rows("classes", level="object", metric="cohesion", layer=2)["n"].item()
    assert "--category-column" in refused(
        tiny_export, *seen, "--mask-column", "objects", "--semantic-masks", "--category-column", "x"
    )
    done(tiny_export, *seen, "--mask-column", "objects", "--ignore-ids", "1,2,3,4,5", "--output", "void")
    assert rows("void", level="patch").empty and not rows("void", level="statistics").empty


def test_splits_say_who_trains(tiny_export: Path, folder: Path, tmp_path: Path) -> None:
    for split, names in {"train": range(12), "test": range(12, 20)}.items():
        for kind in CLASSES:
            (tmp_path / "split" / split / kind).mkdir(parents=True)
            for number in names:
                shutil.copy(folder / kind / f"{number}.png", tmp_path / "split" / split / kind)
    text = done(tiny_export, "--data", "split", "--dry-run")
    assert "60 images (27 train, 9 val, 24 test)" in text or "(9 val, 27 train, 24 test)" in text, text


def test_a_dry_run_looks_at_everything_and_writes_nothing(tiny_export: Path, folder: Path, tmp_path: Path) -> None:
    text = done(tiny_export, "--data", folder, "--dry-run")
    for part in ("llava, 4 decoder layers", "30 train", "label (3 classes)", "no patch structure", "second pass"):
        assert part in text, text
    assert not list(tmp_path.iterdir())


def test_options_of_the_other_kind_are_refused(tiny_export: Path) -> None:
    assert "--results is about a study" in refused(tiny_export, "--results", "x")
    assert "--data needs MODEL_OR_RUN" in refused("--data", "x")


# --- bad data ------------------------------------------------------------------------------------------------


def save(table: datasets.Dataset, name: str = "bad.parquet") -> str:
    table.to_parquet(name)
    return name


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--data", "absent"], "absent: not found"),
        (["--image-column", "image"], "no column 'image'"),
        (["--mask-column", "mask"], "no column 'mask'"),
        (["--label-columns", "fil"], "no column 'fil' (did you mean 'fill'?"),
        ([], "neither a column of labels nor one of masks"),
        (["--label-columns", "fill", "--subset-column", "word"], "column 'word' holds '0!'; expected train, val, test"),
    ],
)
def test_wrong_names_are_one_clear_line(tiny_export: Path, parquet: Path, arguments: list[str], message: str) -> None:
    given = ["--image-column", "picture"] if "--image-column" not in arguments else []
    assert message in refused(tiny_export, "--data", parquet, *given, *arguments, *FAST)


def test_labels_of_one_class_or_none_are_one_clear_line(tiny_export: Path) -> None:
    table = scene_table()
    seen = ("--image-column", "picture", "--label-columns", "label", *FAST)
    data = save(table.add_column("label", [3] * 12))
    assert "'label': the training images have one class only (3)" in refused(tiny_export, "--data", data, *seen)
    data = save(table.add_column("label", [0, 1, None] * 4))
    assert "column 'label': row 2 is empty" in refused(tiny_export, "--data", data, *seen)
    data = save(table.add_column("label", [0.5] * 12))
    assert "column 'label': row 0 is 0.5, which is no class" in refused(tiny_export, "--data", data, *seen)
    data = save(table.add_column("label", list(range(12))))
    assert "6 training images for 12 classes" in refused(tiny_export, "--data", data, *seen)


def test_wrong_masks_are_one_clear_line(tiny_export: Path) -> None:
    seen = ("--image-column", "picture", "--mask-column", "mask", *FAST)
    wide = Image.fromarray(np.ones((10, 96), dtype=np.uint8))
    colours = Image.new("RGB", (96, 96))
    for mask, message in ((wide, "the mask of image 0 has shape (10, 96)"), (colours, "mask 0 can't be read: shape")):
        table = scene_table(2).add_column("mask", [{"bytes": _png(mask), "path": None}] * 2)
        data = save(table.cast_column("mask", datasets.Image()))
        assert message in refused(tiny_export, "--data", data, *seen)


def test_empty_masks_and_few_images_are_said_and_go_on(tiny_export: Path, caplog: pytest.LogCaptureFixture) -> None:
    empty = Image.fromarray(np.zeros((48, 48), dtype=np.uint8))
    table = scene_table().add_column("mask", [{"bytes": _png(empty), "path": None}] * 12)
    data = save(table.cast_column("mask", datasets.Image()))
    done(tiny_export, "--data", data, "--image-column", "picture", "--label-columns", "fill", "--output", "out", *FAST)
    said = [record.getMessage() for record in caplog.records]
    assert any("6 training images for 32 features" in line for line in said)
    assert any("no test image has a mask with two patches of objects" in line for line in said)


def test_a_damaged_picture_is_named(tiny_export: Path, folder: Path) -> None:
    broken = Path(shutil.copytree(folder, "broken"))
    path = broken / "grey" / "3.png"
    path.write_bytes(path.read_bytes()[:300])
    line = refused(tiny_export, "--data", broken, "--output", "out", *FAST)
    assert "can't be read" in line and "image" in line
    assert not Path("out/probe.parquet").exists()


def _png(image: Image.Image) -> bytes:
    import io

    buffer = io.BytesIO()
    image.save(buffer, format="PNG")
    return buffer.getvalue()


# --- bad models ----------------------------------------------------------------------------------------------


@pytest.fixture
def copy(tiny_export: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_export, tmp_path / "copy"))


def test_a_folder_without_a_model_is_refused(tiny_export: Path, copy: Path, tmp_path: Path) -> None:
    assert "no such folder" in refused(tmp_path / "absent")
    assert "config.json is missing" in refused(tiny_export.parent / "..")
    (copy / "model.safetensors").unlink()
    assert "no *.safetensors here" in refused(copy)
    write_json(copy / "config.json", {"model_type": "llama", "hidden_size": 32})
    (copy / "model.safetensors").touch()
    assert "can't be loaded: Unrecognized configuration class" in refused(copy)


def test_an_image_token_that_stands_in_no_prompt_is_refused(copy: Path, folder: Path) -> None:
    config = json.loads((copy / "config.json").read_text())
    config["image_token_id"] = config["image_token_index"] = 7
    write_json(copy / "config.json", config)
    assert "has no visual tokens (id 7)" in refused(copy, "--data", folder, "--output", "out", *FAST)


def test_a_model_without_decoder_layers_is_refused(copy: Path, folder: Path) -> None:
    small = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 1, "intermediate_size": 16}
    write_json(copy / "config.json", {"model_type": "blip", "text_config": small, "vision_config": small})
    assert "no decoder layers found; prebench needs a model whose get_decoder()" in refused(copy, "--data", folder)


def test_weights_that_are_not_finite_are_refused(copy: Path, folder: Path) -> None:
    weights = load_file(copy / "model.safetensors")
    name = next(name for name in weights if name.endswith("layers.1.mlp.down_proj.weight"))
    weights[name][0, 0] = torch.nan
    save_file(weights, copy / "model.safetensors", metadata={"format": "pt"})
    line = refused(copy, "--data", folder, "--output", "out", *FAST)
    assert "hidden states have NaN or infinite values" in line
    assert not Path("out/probe.parquet").exists()
