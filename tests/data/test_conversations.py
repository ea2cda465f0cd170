"""Examples from files: what is left out and when that is an error, confined paths, padding, truncation, the report."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from click.testing import CliRunner
from PIL import Image

from prebench.cli import main
from prebench.data import image_files
from prebench.data.chat_templates import VICUNA
from prebench.data.collator import Collator
from prebench.data.conversations import open_data
from prebench.data.encoding import encode_example
from prebench.data.image_files import ImageFolders
from prebench.data.llava_json import parse_record
from prebench.data.visual_tokens import pad_to_square
from prebench.errors import DataError
from prebench.schema import DataConfig
from tests.data.tiny_conversations import good_records, llava_config, picture, tiny_processor, turns, write_records


@pytest.fixture(scope="module")
def processor() -> Any:
    return tiny_processor()


# --- what is left out --------------------------------------------------------------------------------------------


@pytest.fixture
def damaged(tmp_path: Path) -> Path:
    """Twenty records; the pictures of five are missing, empty, cut in half, no pictures, and far too large."""
    path = write_records(tmp_path, good_records(20, every_text_only=20))
    (tmp_path / "coco" / "1.png").unlink()
    (tmp_path / "coco" / "3.png").write_bytes(b"")
    (tmp_path / "coco" / "4.png").write_bytes(picture(4)[:700])
    (tmp_path / "coco" / "6.png").write_bytes(b"<html>not found</html>")
    Image.new("1", (9000, 9000)).save(tmp_path / "coco" / "8.png")
    return path


REASONS = {1: "no such file", 3: "the file is empty", 4: "truncated", 6: "cannot identify", 8: "exceeds the limit"}


def test_bad_pictures_are_left_out_and_listed(processor, damaged: Path, tmp_path: Path) -> None:
    data = open_data(llava_config(damaged, max_bad_share=0.6), processor)
    stage = data.stage("instruct")
    kept = {example.image_ids[0].split(":")[1] for example in stage if example.image_ids}
    assert len(stage) == 10 and not kept & {str(i + ten) for i in REASONS for ten in (0, 10)}
    assert data.write_quarantine(tmp_path / "quarantine.jsonl") == 10
    lines = [json.loads(line) for line in (tmp_path / "quarantine.jsonl").read_text().splitlines()]
    assert [line["index"] for line in lines] == [i + ten for ten in (0, 10) for i in REASONS]
    for line in lines:
        assert REASONS[line["index"] % 10] in line["reason"] and f"data.json:{line['index'] + 1} " in line["where"]


def test_too_many_bad_pictures_are_an_error(processor, damaged: Path) -> None:
    with pytest.raises(
        DataError, match=r"data\.json:2 \(record 1\).*1\.png.*10 of 20 examples are bad, more than.*0\.4"
    ):
        open_data(llava_config(damaged, max_bad_share=0.4), processor)


def test_headers_alone_find_no_truncated_file(processor, damaged: Path) -> None:
    data = open_data(llava_config(damaged, max_bad_share=0.6, check_images="header"), processor)
    assert len(data.stage("instruct")) == 12
    with pytest.raises(DataError, match=r"data\.json:5 \(record 4\).*truncated"):
        data.image("0:4:coco/4.png")


def test_findings_are_kept_and_follow_the_content(processor, tmp_path: Path) -> None:
    path = write_records(tmp_path, good_records(8))
    first = open_data(llava_config(path), processor, tmp_path / "cache")
    looked: list[int] = []
    again = open_data(llava_config(path), processor, tmp_path / "cache", lambda *_: looked.append(1))
    assert not looked and again.fingerprint() == first.fingerprint() and len(again.image_ids) == 6
    (kept,) = (tmp_path / "cache").iterdir()
    kept.write_text("{}")
    assert open_data(llava_config(path), processor, tmp_path / "cache").fingerprint() == first.fingerprint()
    (tmp_path / "coco" / "0.png").write_bytes(picture(77))
    assert open_data(llava_config(path), processor).fingerprint() != first.fingerprint()
    path.write_text(path.read_text().replace("is it red?", "why?"))
    assert open_data(llava_config(path), processor, tmp_path / "cache").fingerprint() != first.fingerprint()


# --- paths -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("../secret.png", "refused"),
        ("coco/../../secret.png", "refused"),
        ("/etc/hostname", "refused"),
        ("coco\\..\\secret.png", "not a path"),
        ("", "not a path"),
        ("coco/0.png\0.jpg", "not a path"),
        ("out.png", "a link leads out"),
        ("folder/secret.png", "a link leads out"),
        ("loop.png", "no such file"),
        ("coco", "no file"),
        ("coco/none.png", "no such file"),
        ("a/" * 5000 + "b.png", "no such file"),
    ],
)
def test_image_paths_stay_in_their_folder(tmp_path: Path, name: str, message: str) -> None:
    root = tmp_path / "images"
    (root / "coco").mkdir(parents=True)
    for path in (root / "coco" / "0.png", tmp_path / "secret.png"):
        path.write_bytes(picture())
    (root / "out.png").symlink_to(tmp_path / "secret.png")
    (root / "folder").symlink_to(tmp_path)
    (root / "loop.png").symlink_to(root / "loop.png")
    (root / "in.png").symlink_to(root / "coco" / "0.png")
    folders = ImageFolders(root)
    assert folders.find("coco/0.png") == folders.find("in.png") == root / "coco" / "0.png"
    with pytest.raises(DataError, match=message):
        folders.find(name)


def test_each_source_of_images_may_have_a_folder_of_its_own(processor, tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "x.png").write_bytes(picture(ord(name)))
    records = [{"image": f"{part}/x.png", "conversations": turns("<image>why?", "no")} for part in ("coco", "gqa")]
    roots = {"coco": str(tmp_path / "a"), "gqa": str(tmp_path / "b")}
    data = open_data(llava_config(write_records(tmp_path, records), block={"image_root": roots}), processor)
    for image_id, name in zip(data.image_ids[:2], "ab", strict=True):
        assert data.image(image_id).tobytes() == image_files.decode(picture(ord(name)), "x").tobytes()
    with pytest.raises(DataError, match="image_root names no folder for 'vg'"):
        ImageFolders(roots).find("vg/x.png")


# --- pictures and lengths ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [(40, 24), (24, 41), (30, 30)])
def test_padding_to_a_square(tmp_path: Path, size: tuple[int, int]) -> None:
    path = write_records(tmp_path, good_records(1))
    (tmp_path / "coco" / "0.png").write_bytes(picture(5, size))
    processor = tiny_processor()
    pad_to_square(processor)
    processor.image_processor.image_mean = [0.48, 0.45, 0.4]
    data = open_data(llava_config(path, pad_to_square=True), processor)
    found = np.asarray(data.image("0:0:coco/0.png"))
    original = np.asarray(image_files.decode(picture(5, size), "x"))
    side = max(size)
    expected = np.empty((side, side, 3), dtype=np.uint8)
    expected[:] = (122, 114, 102)
    top, left = (side - size[1]) // 2, (side - size[0]) // 2
    expected[top : top + size[1], left : left + size[0]] = original
    assert np.array_equal(found, expected)
    # The processor that is exported makes the same of the picture as it lies on disk.
    both = processor.image_processor([Image.fromarray(original), Image.fromarray(expected)], return_tensors="pt")
    assert both["pixel_values"][0].equal(both["pixel_values"][1])
    assert both["pixel_values"].shape == (2, 3, 32, 32)


def test_truncation_cuts_the_end_and_never_a_picture(processor, tmp_path: Path) -> None:
    path = write_records(tmp_path, good_records(3))
    whole = [item.input_ids for item in encoded(processor, llava_config(path))]
    assert [len(ids) for ids in whole] == [37, 42, 47]
    cut = encoded(processor, llava_config(path, max_length=40))
    assert [item.input_ids for item in cut] == [ids[:40] for ids in whole]
    assert list(open_data(llava_config(path, max_length=40), processor).stage("align").lengths) == [37, 40, 40]
    for length, message in ((28, "would cut off visual tokens"), (33, "nothing to learn is left")):
        with pytest.raises(DataError, match=message):
            open_data(llava_config(path, max_length=length), processor)


def encoded(processor: Any, config: Any) -> list[Any]:
    data = open_data(config, processor)
    collate = Collator(processor, data)
    return [collate.encode(example) for example in data.stage("instruct")]


def test_batches_hold_any_number_of_pictures(processor, tmp_path: Path) -> None:
    records = [
        {"image": ["coco/1.png", "coco/2.png"], "conversations": turns("<image><image>why?", "no")},
        {"conversations": turns("why?", "no")},
        {"image": "coco/3.png", "conversations": turns("<image>why?", "no")},
    ]
    data = open_data(llava_config(write_records(tmp_path, records)), processor)
    collate = Collator(processor, data)
    items = [collate.encode(example) for example in data.stage("instruct")]
    batch = collate(items)
    assert batch.image_ids == ("0:0:coco/1.png", "0:0:coco/2.png", "0:2:coco/3.png")
    assert batch.pixel_values.shape == (3, 3, 32, 32)
    assert int((batch.input_ids == 4).sum()) == 3 * 4 and batch.num_targets == 6
    for row, name in enumerate(batch.image_ids):
        alone = processor.image_processor([data.image(name)], return_tensors="pt")["pixel_values"]
        assert batch.pixel_values[row].equal(alone[0])
    assert collate(items[1:2]).pixel_values.shape == (0, 3, 32, 32)


# --- the mask against the template -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("template", "answer", "message"),
    [
        (VICUNA.replace("{{ eos_token }}", ""), "yes", "nothing ends the assistant's turn"),
        (VICUNA.replace("part['text']", "part['text'] | trim"), " yes", "it changes the assistant's words"),
        (VICUNA.replace("part['text']", "part['text'] | upper"), "yes", "it changes the assistant's words"),
        (VICUNA.replace("'<image>' }}", "'' }}"), "yes", "writes 0 image placeholders for 1 images"),
        (VICUNA, "yes</s>", "holds the special token '</s>'"),
        (VICUNA.replace("'ASSISTANT: ' }}", "'ASSISTANT:' }}"), "yes", "half of the prompt and half of the answer"),
    ],
)
def test_a_mask_that_does_not_fit_the_template_is_an_error(template: str, answer: str, message: str) -> None:
    processor = tiny_processor(template)
    messages = parse_record({"image": "x", "conversations": turns("<image>why?", answer)}).messages
    with pytest.raises(DataError, match=message):
        encode_example(processor, messages, 4)


def test_a_template_may_trim_what_the_user_says() -> None:
    trimmed = VICUNA.replace("part['text']", "part['text'] | trim")
    messages = parse_record({"conversations": turns(" why?", "yes")}).messages
    plain = parse_record({"conversations": turns("why?", "yes")}).messages
    assert encode_example(tiny_processor(trimmed), messages, 4) == encode_example(tiny_processor(), plain, 4)


# --- the report --------------------------------------------------------------------------------------------------


def doctor(*arguments: object) -> Any:
    return CliRunner().invoke(main, ["doctor", "--data", *map(str, arguments)])


def test_the_report_counts(tmp_path: Path) -> None:
    path = write_records(tmp_path, good_records(12), "data.jsonl")
    result = doctor(path, "--max-length", 57, "--json", tmp_path / "report.json")
    assert result.exit_code == 0, result.output
    (found,) = json.loads((tmp_path / "report.json").read_text())
    assert (found["examples"], found["text_only"], found["images"], found["turns"]) == (12, 3, 9, 24)
    rows = dict(line.strip().split(maxsplit=1) for line in result.stdout.splitlines()[2:])
    assert rows["answers"] == "24 (2.0 per example)" and rows["text"] == "only  3 (25.0%)"
    assert found["truncated"] > 0 and rows["truncated"] == f"{found['truncated']} longer than 57 tokens"


def test_the_report_of_bad_data_ends_with_2(damaged: Path, tmp_path: Path) -> None:
    result = doctor(damaged, "--json", tmp_path / "report.json")
    assert result.exit_code == 2 and isinstance(result.exception, SystemExit)
    assert "left out   10 (ERROR: more than data.max_bad_share 0.10%)" in result.stdout
    assert "and 5 more" in result.stdout and "more examples are bad" in result.stderr
    (found,) = json.loads((tmp_path / "report.json").read_text())
    assert len(found["bad"]) == 10 and "1.png" in found["bad"][0]["reason"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["none.json"], "none.json: no such file"),
        (["data.txt"], "unknown preset 'data.txt'"),
        (["embedded", "--max-length", "20"], "--image-root and --max-length are for files"),
        (["none.parquet"], "none.parquet: can't be read as Parquet"),
    ],
)
def test_the_report_needs_data(arguments: list[str], message: str) -> None:
    result = doctor(*arguments)
    assert result.exit_code == 2 and message in result.stderr and isinstance(result.exception, SystemExit)


# --- tables: streaming and the Hub ---------------------------------------------------------------------------------


def write_rows(folder: Path, number: int) -> Path:
    kind = pa.list_(pa.struct([("bytes", pa.binary()), ("path", pa.string())]))
    rows = [{"user": f"why? {i}", "assistant": "no"} for i in range(number)]
    table = pa.table({"texts": [[row] for row in rows]})
    images = pa.array([[{"bytes": picture(i), "path": None}] for i in range(number)], kind)
    features = {"info": {"features": {"images": {"feature": {"_type": "Image"}, "_type": "List"}}}}
    features["info"]["features"]["texts"] = {
        "feature": {name: {"dtype": "string", "_type": "Value"} for name in ("user", "assistant")},
        "_type": "List",
    }
    table = table.append_column("images", images).replace_schema_metadata({"huggingface": json.dumps(features)})
    folder.mkdir(parents=True, exist_ok=True)
    for part, start in enumerate(range(0, number, 5)):
        pq.write_table(table.slice(start, 5), folder / f"train-{part:05}-of-00002.parquet")
    return folder


@pytest.mark.parametrize("streaming", [False, True])
def test_the_first_rows_of_a_table(processor, tmp_path: Path, monkeypatch, streaming: bool) -> None:
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    folder = write_rows(tmp_path / "table", 10)
    block = {"type": "cauldron", "path": str(folder), "streaming": streaming, "num_examples": 7}
    data = open_data(DataConfig.model_validate({"instruct": [block]}), processor)
    stage = data.stage("instruct")
    texts = [example.messages[0]["content"][1]["text"] for example in stage]
    assert texts == [f"why? {i}" for i in range(7)]
    assert data.image(data.image_ids[6]).tobytes() == image_files.decode(picture(6), "x").tobytes()
