"""Malformed records, files and configurations: named by line and field, never accepted silently, never a traceback."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from click.testing import CliRunner
from hypothesis import given, settings
from hypothesis import strategies as st

from prebench.cli import main
from prebench.config import load_preset, validate
from prebench.data.conversations import open_source
from prebench.data.examination import examine
from prebench.data.llava_json import LlavaJson
from prebench.data.tables import cauldron_messages, trl_messages
from prebench.errors import ConfigError, DataError
from prebench.schema import DataConfig, LlavaJsonConfig, PresetConfig
from tests.data.tiny_conversations import NUM_IMAGE_TOKENS, llava_config, tiny_processor, turns, write_records

PROCESSOR = tiny_processor()
RECORDS_PER_FILE = 40

# Anything that JSON can hold; texts include what breaks tokenizers: surrogate halves, NUL, special tokens.
SCALARS = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=4)
ANYTHING = st.recursive(
    SCALARS, lambda v: st.lists(v, max_size=3) | st.dictionaries(st.text(max_size=4), v, max_size=3), max_leaves=5
)
NO_TEXT = ANYTHING.filter(lambda v: not isinstance(v, str)) | st.sampled_from(["", "  ", "\n", "x\ud800"])
NO_LIST = ANYTHING.filter(lambda v: not isinstance(v, list)) | st.just([])
BAD_PATHS = st.sampled_from(
    [
        *("../coco/1.png", "coco/../../x.png", "/etc/passwd", "/", "", " ", ".", "..", "coco", "coco/99.png"),
        *("coco\\1.png", "C:\\x.png", "a\0b", "~/x.png", "file:///etc/passwd", "http://x/y.png", "data.jsonl"),
        *("coco/1.png/..", "x" * 300, "a/" * 2100, "\ud800.png"),
    ]
)
GOOD = {"id": "g", "image": "coco/1.png", "conversations": turns("<image>\nis it red?", "yes", "why?", "no")}


@st.composite
def malformed(draw: st.DrawFn) -> tuple[Any, str]:
    """Return a record with one fault, and a part of the message that has to name it."""
    record: dict[str, Any] = copy.deepcopy(GOOD)
    conversation = record["conversations"]
    turn = draw(st.integers(0, 3))
    match draw(st.integers(0, 11)):
        case 0:
            return draw(ANYTHING.filter(lambda v: not isinstance(v, dict))), "a record is an object"
        case 1:
            del record["conversations"]
            return record, "conversations"
        case 2:
            record["conversations"] = draw(NO_LIST)
            return record, "conversations"
        case 3:
            conversation[turn] = draw(ANYTHING.filter(lambda v: not isinstance(v, dict)))
            return record, f"conversations[{turn}].from"
        case 4:
            conversation[turn]["from"] = draw(ANYTHING.filter(lambda v: v not in ("human", "gpt")))
            return record, f"conversations[{turn}].from"
        case 5:
            conversation[turn]["value"] = draw(NO_TEXT)
            return record, f"conversations[{turn}].value" if turn else ""
        case 6:
            del conversation[turn][draw(st.sampled_from(["from", "value"]))]
            return record, f"conversations[{turn}]."
        case 7:
            del conversation[turn]
            # Without its first turn a conversation starts with the assistant, which is allowed; the picture is not.
            return record, "image" if turn == 0 else "conversations["
        case 8:
            record["image"] = draw(BAD_PATHS)
            return record, "image"
        case 9:
            record["image"] = draw(ANYTHING.filter(lambda v: not isinstance(v, str) and v not in (None, [])))
            return record, "image"
        case 10:
            del record["image"]
            return record, "image"
        case _:
            mark = draw(st.sampled_from(["</s>", "<s>", "<pad>", "<image>"]))
            conversation[turn]["value"] = f"what {mark} is" if mark != "<image>" or turn else "no mark"
            return record, ""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    found = tmp_path_factory.mktemp("malformed")
    write_records(found, [GOOD])
    return found


# 30 files of 40: 1,200 records.
@settings(max_examples=30)
@given(faults=st.lists(malformed(), min_size=RECORDS_PER_FILE, max_size=RECORDS_PER_FILE))
def test_every_malformed_record_is_named(folder: Path, faults: list[tuple[Any, str]]) -> None:
    records = [GOOD, *(record for record, _ in faults), GOOD]
    path = folder / "data.jsonl"
    path.write_text("\n".join(json.dumps(record) for record in records))
    config = llava_config(path)
    source = open_source(config.instruct[0])
    found = examine(source, config.instruct[0], config, PROCESSOR, NUM_IMAGE_TOKENS)
    assert [finding.index for finding in found.findings] == [0, len(faults) + 1]
    assert [index for index, _ in found.bad] == list(range(1, len(faults) + 1))
    for (index, reason), (record, named) in zip(found.bad, faults, strict=True):
        assert named in reason, (record, reason)
        assert f"data.jsonl:{index + 1} " in source.where(index) and "\n" not in reason


@settings(max_examples=300)
@given(
    value=ANYTHING | st.lists(st.fixed_dictionaries({}, optional={"user": ANYTHING, "assistant": ANYTHING}), max_size=3)
)
def test_anything_in_a_column_of_texts(value: Any) -> None:
    try:
        messages = cauldron_messages(value, 1, "texts")
    except DataError as error:
        assert str(error).startswith("texts") and "\n" not in str(error)
        return
    assert isinstance(value, list) and len(messages) == 2 * len(value)
    assert all(turn["user"] is not None and turn["assistant"].strip() for turn in value)


PART = st.fixed_dictionaries(
    {}, optional={"type": st.sampled_from(["text", "image", "video"]) | ANYTHING, "text": ANYTHING}
)
MESSAGE = st.fixed_dictionaries(
    {},
    optional={
        "role": st.sampled_from(["system", "user", "assistant", "tool"]) | ANYTHING,
        "content": st.text(max_size=3) | st.lists(PART, max_size=3) | ANYTHING,
    },
)


@settings(max_examples=300)
@given(value=ANYTHING | st.lists(MESSAGE, max_size=4), num_images=st.integers(0, 2))
def test_anything_in_a_column_of_messages(value: Any, num_images: int) -> None:
    try:
        messages = trl_messages(value, num_images, "messages")
    except DataError as error:
        assert str(error).startswith("messages") and "\n" not in str(error)
        return
    assert messages[-1]["role"] == "assistant" and len(messages) == len(value)
    assert sum(part["type"] == "image" for m in messages for part in m["content"]) == num_images


@settings(max_examples=200)
@given(data=st.data())
def test_a_damaged_file_is_read_or_named(folder: Path, data: st.DataObject) -> None:
    text = json.dumps([GOOD] * 3, indent=1)
    first = data.draw(st.integers(0, len(text)))
    last = data.draw(st.integers(first, min(len(text), first + 30)))
    content = (text[:first] + data.draw(st.text(max_size=3)) + text[last:]).encode(errors="surrogatepass")
    path = folder / "damaged.json"
    path.write_bytes(content)
    try:
        source = LlavaJson(LlavaJsonConfig(type="llava_json", path=str(path)))
    except DataError as error:
        assert str(error).startswith(str(path)) and "\n" not in str(error)
        try:
            values = json.loads(content)
        except ValueError:
            return
        assert not isinstance(values, list) or not values, "Python reads a list of records"
        return
    assert len(source) > 0
    for index in range(len(source)):
        try:
            source.record(index)
        except DataError as error:
            assert "\n" not in str(error)


BAD_BLOCKS = st.sampled_from(
    [
        ({"type": "llava"}, "data.align.0"),
        ({"path": ""}, "path"),
        ({"path": 3}, "path"),
        ({"path": None}, "path"),
        ({"image_root": 7}, "image_root"),
        ({"image_root": {"a": 1}}, "image_root"),
        ({"prompt": "vicuna"}, "prompt"),
        ({"image_rot": "x"}, "image_rot"),
        ({"type": "messages", "revision": "main"}, "revision"),
        ({"type": "messages", "streaming": True}, "num_examples"),
        ({"type": "cauldron", "num_examples": 0}, "num_examples"),
        ({"type": "cauldron", "columns": {"text": "x"}}, "columns.text"),
        ({"type": "cauldron", "columns": "x"}, "columns"),
        ({"type": "cauldron", "trust_remote_code": True}, "trust_remote_code"),
    ]
)
BAD_DATA = st.sampled_from(
    [
        ({"scenes": {"num_images": 3, "questions_per_image": 1}}, "data"),
        ({"align": [], "instruct": []}, "data"),
        ({"align": []}, "data.align"),
        ({"align": "x.json"}, "data.align"),
        ({"max_length": 1}, "data.max_length"),
        ({"max_length": "long"}, "data.max_length"),
        ({"group_by": "size"}, "data.group_by"),
        ({"max_bad_share": 1}, "data.max_bad_share"),
        ({"max_bad_share": -0.1}, "data.max_bad_share"),
        ({"max_bad_share": float("nan")}, "data.max_bad_share"),
        ({"num_workers": -1}, "data.num_workers"),
        ({"check_images": False}, "data.check_images"),
        ({"pad_to_square": "mean"}, "data.pad_to_square"),
        ({"seed": 1.5}, "data.seed"),
    ]
)


def preset_values() -> dict[str, Any]:
    values: dict[str, Any] = load_preset("embedded").model_dump(mode="json")
    block = {"type": "llava_json", "path": "data.json"}
    values["data"] = {"align": [dict(block)], "instruct": [dict(block)]}
    values["train"]["validate_every"] = 0
    for stage in ("align", "instruct"):
        values["train"][stage]["caption_share"] = 0
    return values


PRESET = preset_values()


@settings(max_examples=300)
@given(change=BAD_BLOCKS, other=BAD_DATA, which=st.integers(0, 2), key=st.text(min_size=1, max_size=6), value=ANYTHING)
def test_a_malformed_configuration_is_named(change, other, which, key, value) -> None:
    validate(PresetConfig, PRESET, "p.yaml")
    values = copy.deepcopy(PRESET)
    if which == 0:
        values["data"]["align"][0] |= change[0]
        named = change[1]
    elif which == 1:
        values["data"] |= other[0]
        named = other[1]
    else:
        if key in DataConfig.model_fields:
            return
        values["data"][key] = value
        named = "unknown key"
    with pytest.raises(ConfigError) as caught:
        validate(PresetConfig, values, "p.yaml")
    assert str(caught.value).startswith("p.yaml: ") and named in str(caught.value)


def test_the_command_prints_one_line(folder: Path) -> None:
    for content in ('[{"conversations": 3}]', "[1, 2", "\x00", "[]", '{"a": [}', "[" * 100_000):
        path = folder / "bad.json"
        path.write_text(content)
        result = CliRunner().invoke(main, ["doctor", "--data", str(path)])
        assert result.exit_code == 2 and isinstance(result.exception, SystemExit), result.output
        (line,) = [line for line in result.stderr.splitlines() if line.startswith("prebench: ")]
        assert str(path) in line and "Traceback" not in result.output


@pytest.mark.parametrize("content", [b"", b"PAR1", b"PAR1" * 100])
def test_a_damaged_table_is_named(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "rows.parquet"
    path.write_bytes(content)
    config = DataConfig.model_validate({"instruct": [{"type": "messages", "path": str(path)}]})
    with pytest.raises(DataError, match=r"rows\.parquet: can't be read as a table"):
        open_source(config.instruct[0])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"path": "org/name"}, "needs its commit in `revision`"),
        ({"path": "./none"}, "no such file or folder"),
        ({"columns": {"texts": "text"}}, "no column 'text'.*it has texts"),
    ],
)
def test_a_table_that_is_not_there_is_named(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    path = tmp_path / "rows.parquet"
    pq.write_table(pa.table({"texts": [[{"user": "why?", "assistant": "no"}]]}), path)
    config = DataConfig.model_validate({"instruct": [{"type": "cauldron", "path": str(path)} | changes]})
    with pytest.raises(DataError, match=message):
        open_source(config.instruct[0])
