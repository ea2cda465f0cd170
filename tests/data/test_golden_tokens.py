"""Token ids and label masks of ten hand-checked examples per format; LLaVA's published rules where they apply."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from prebench.data.collator import Collator
from prebench.data.conversations import open_data
from prebench.data.encoding import encode_example
from prebench.data.llava_json import parse_record
from prebench.schema import DataConfig
from tests.data.tiny_conversations import (
    NUM_IMAGE_TOKENS,
    VOCABULARY,
    golden,
    llava_config,
    picture,
    tiny_processor,
    turns,
    write_records,
)

ASKED = "▁USER: ▁ IMG ⏎ is ▁it ▁red? ▁ASSISTANT:"
PLAIN = {"block": {"prompt": "plain"}}

LLAVA: list[tuple[str, Any, list[dict[str, str]], dict[str, Any], str]] = [
    ("first", "coco/0.png", turns("<image>\nis it red?", "yes"), {}, f"<s> SYS {ASKED} [▁yes </s>]"),
    ("last", "coco/0.png", turns("is it red?\n<image>", "yes"), {}, f"<s> SYS {ASKED} [▁yes </s>]"),
    (
        "middle",
        "coco/0.png",
        turns("is <image> it red?", "no"),
        {},
        "<s> SYS ▁USER: ▁ IMG ⏎ is ▁ ▁it ▁red? ▁ASSISTANT: [▁no </s>]",
    ),
    (
        "two turns",
        "coco/0.png",
        turns("<image>\nis it red?", "yes", "why?", "a cat."),
        {},
        f"<s> SYS {ASKED} [▁yes </s>] USER: ▁why? ▁ASSISTANT: [▁a ▁cat. </s>]",
    ),
    (
        "text only",
        None,
        turns("what is it", "a cat."),
        {},
        "<s> SYS ▁USER: ▁what ▁is ▁it ▁ASSISTANT: [▁a ▁cat. </s>]".replace("▁what ", "<unk> "),
    ),
    (
        "the assistant first",
        "coco/0.png",
        turns("", "a cat.")[1:] + turns("<image>\nis it red?", "yes"),
        {},
        f"<s> SYS {ASKED} [▁yes </s>]",
    ),
    ("two marks", "coco/0.png", turns("<image>\nis it red?<image>", "yes"), {}, f"<s> SYS {ASKED} [▁yes </s>]"),
    (
        "two pictures",
        ["coco/0.png", "coco/1.png"],
        turns("<image><image>\nis it red?", "no"),
        {},
        "<s> SYS ▁USER: ▁ IMG ⏎ IMG ⏎ is ▁it ▁red? ▁ASSISTANT: [▁no </s>]",
    ),
    (
        "picture in the second turn",
        "coco/0.png",
        turns("why?", "no", "<image>\nis it red?", "yes"),
        {},
        "<s> SYS ▁USER: ▁why? ▁ASSISTANT: [▁no </s>] USER: ▁ IMG ⏎ is ▁it ▁red? ▁ASSISTANT: [▁yes </s>]",
    ),
    ("plain", "coco/0.png", turns("what is it\n<image>", "a cat."), PLAIN, "<s> IMG [a ▁cat. ⏎]"),
]


@pytest.fixture(scope="module")
def processor() -> Any:
    return tiny_processor()


def encoded(processor: Any, config: DataConfig) -> list[tuple[list[int], list[int]]]:
    data = open_data(config, processor)
    collate = Collator(processor, data)
    found = [collate.encode(example) for example in data.stage("instruct")]
    assert all(len(item.image_ids) * NUM_IMAGE_TOKENS == item.input_ids.count(4) for item in found)
    return [(item.input_ids, item.labels) for item in found]


@pytest.mark.parametrize(
    ("image", "conversation", "changes", "expected"), [c[1:] for c in LLAVA], ids=[c[0] for c in LLAVA]
)
def test_llava_json(processor, tmp_path: Path, image, conversation, changes, expected) -> None:
    record = {"id": "x", "conversations": conversation} | ({} if image is None else {"image": image})
    config = llava_config(write_records(tmp_path, [record]), **changes)
    assert encoded(processor, config) == [golden(expected)]


def user(text: str, answer: str) -> dict[str, str]:
    return {"user": text, "assistant": answer}


TEXT_ONLY = "<s> SYS ▁USER: ▁why? ▁ASSISTANT: [▁no </s>]"
CAULDRON: list[tuple[str, Any, list[dict[str, str]], str]] = [
    ("one", 1, [user("is it red?", "yes")], f"<s> SYS {ASKED} [▁yes </s>]"),
    ("no", 1, [user("is it red?", "no")], f"<s> SYS {ASKED} [▁no </s>]"),
    (
        "two turns",
        1,
        [user("is it red?", "yes"), user("why?", "a cat.")],
        f"<s> SYS {ASKED} [▁yes </s>] USER: ▁why? ▁ASSISTANT: [▁a ▁cat. </s>]",
    ),
    (
        "three turns",
        1,
        [user("is it red?", "yes"), user("why?", "no"), user("why?", "yes")],
        f"<s> SYS {ASKED} [▁yes </s>] USER: ▁why? ▁ASSISTANT: [▁no </s>] USER: ▁why? ▁ASSISTANT: [▁yes </s>]",
    ),
    (
        "two pictures",
        2,
        [user("is it red?", "yes")],
        "<s> SYS ▁USER: ▁ IMG ⏎ IMG ⏎ is ▁it ▁red? ▁ASSISTANT: [▁yes </s>]",
    ),
    ("text only", 0, [user("why?", "no")], TEXT_ONLY),
    ("no list", None, [user("why?", "no")], TEXT_ONLY),
    ("no question", 1, [user("", "a cat.")], "<s> SYS ▁USER: ▁ IMG ▁ASSISTANT: [▁a ▁cat. </s>]"),
    ("source", 1, [user("is it red?", "yes") | {"source": "vqa"}], f"<s> SYS {ASKED} [▁yes </s>]"),
    (
        "a line break",
        1,
        [user("is it red?\nbe brief.", "yes")],
        "<s> SYS ▁USER: ▁ IMG ⏎ is ▁it ▁red? ⏎ be ▁brief. ▁ASSISTANT: [▁yes </s>]",
    ),
]


def write_table(path: Path, column: str, value: Any, count: int | None) -> Path:
    images = None if count is None else [{"bytes": picture(i), "path": None} for i in range(count)]
    kind = pa.list_(pa.struct([("bytes", pa.binary()), ("path", pa.string())]))
    table = pa.table({column: [value]}).append_column("images", pa.array([images], kind))
    pq.write_table(table, path)
    return path


@pytest.fixture
def table_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def table_config(kind: str, path: Path, **more: Any) -> DataConfig:
    return DataConfig.model_validate({"instruct": [{"type": kind, "path": str(path), **more}]})


@pytest.mark.parametrize(("count", "texts", "expected"), [c[1:] for c in CAULDRON], ids=[c[0] for c in CAULDRON])
@pytest.mark.usefixtures("table_cache")
def test_cauldron(processor, tmp_path: Path, count, texts, expected) -> None:
    path = write_table(tmp_path / "rows.parquet", "texts", texts, count)
    assert encoded(processor, table_config("cauldron", path)) == [golden(expected)]


def say(role: str, *parts: str | None) -> dict[str, Any]:
    """None stands for a picture."""
    content = [{"type": "image", "text": None} if p is None else {"type": "text", "text": p} for p in parts]
    return {"role": role, "content": content}


def plain(role: str, text: str) -> dict[str, Any]:
    return {"role": role, "content": text}


MESSAGES: list[tuple[str, int, list[dict[str, Any]], str]] = [
    ("parts", 1, [say("user", None, "is it red?"), say("assistant", "yes")], f"<s> SYS {ASKED} [▁yes </s>]"),
    ("picture last", 1, [say("user", "is it red?", None), say("assistant", "yes")], f"<s> SYS {ASKED} [▁yes </s>]"),
    ("texts", 1, [plain("user", "is it red?"), plain("assistant", "yes")], f"<s> SYS {ASKED} [▁yes </s>]"),
    ("no parts for it", 1, [say("user", "is it red?"), say("assistant", "no")], f"<s> SYS {ASKED} [▁no </s>]"),
    ("text only", 0, [plain("user", "why?"), plain("assistant", "no")], TEXT_ONLY),
    (
        "system",
        0,
        [plain("system", "be brief."), plain("user", "why?"), plain("assistant", "no")],
        "<s> be ▁brief. ▁USER: ▁why? ▁ASSISTANT: [▁no </s>]",
    ),
    (
        "two pictures",
        2,
        [say("user", None, "is it red?", None), say("assistant", "yes")],
        "<s> SYS ▁USER: ▁ IMG ⏎ IMG ⏎ is ▁it ▁red? ▁ASSISTANT: [▁yes </s>]",
    ),
    (
        "two turns",
        1,
        [say("user", None, "is it red?"), say("assistant", "yes"), say("user", "why?"), say("assistant", "no")],
        f"<s> SYS {ASKED} [▁yes </s>] USER: ▁why? ▁ASSISTANT: [▁no </s>]",
    ),
    (
        "second turn",
        1,
        [say("user", "why?"), say("assistant", "no"), say("user", None, "is it red?"), say("assistant", "yes")],
        "<s> SYS ▁USER: ▁why? ▁ASSISTANT: [▁no </s>] USER: ▁ IMG ⏎ is ▁it ▁red? ▁ASSISTANT: [▁yes </s>]",
    ),
    (
        "an answer in parts",
        1,
        [say("user", None, "is it red?"), say("assistant", "yes", " a cat.")],
        f"<s> SYS {ASKED} [▁yes ▁a ▁cat. </s>]",
    ),
]


@pytest.mark.parametrize(("count", "messages", "expected"), [c[1:] for c in MESSAGES], ids=[c[0] for c in MESSAGES])
@pytest.mark.usefixtures("table_cache")
def test_messages(processor, tmp_path: Path, count, messages, expected) -> None:
    path = write_table(tmp_path / "rows.parquet", "messages", messages, count)
    assert encoded(processor, table_config("messages", path)) == [golden(expected)]


# --- LLaVA's rules, written down once more: text in chunks around <image>, masks by lengths of rounds ------------


def published(processor: Any, record: dict[str, Any]) -> tuple[list[int], list[int]]:
    """Return what LLaVA's preprocessing makes of a record (vicuna template, image tokens written out)."""

    def tokens(text: str) -> list[int]:
        chunks = [processor.tokenizer(chunk, add_special_tokens=False)["input_ids"] for chunk in text.split("<image>")]
        joined = chunks[0]
        for chunk in chunks[1:]:
            joined = joined + [VOCABULARY["<image>"]] * NUM_IMAGE_TOKENS + chunk
        return joined

    system = (
        "A chat between a curious user and an artificial intelligence assistant. The assistant gives helpful, "
        "detailed, and polite answers to the user's questions."
    )
    values = [turn["value"] for turn in record["conversations"]]
    moved = [("<image>\n" + v.replace("<image>", "").strip()).strip() if "<image>" in v else v for v in values]
    rounds = [f"USER: {q} ASSISTANT: {a}" for q, a in zip(moved[::2], moved[1::2], strict=True)]
    rounds[0] = f"{system} {rounds[0]}"
    bos, eos = VOCABULARY["<s>"], VOCABULARY["</s>"]
    input_ids, labels = [bos], [-100]
    for text in rounds:
        ids = tokens(text)
        # The space that ends the prompt is a token of its own there, and belongs to the answer's first word here.
        asked = len(tokens(text.split(" ASSISTANT: ")[0] + " ASSISTANT: ")) - 1
        input_ids += [*ids, eos]
        labels += [-100] * asked + ids[asked:] + [eos]
    return input_ids, labels


WORD = st.sampled_from(["is it red?", "why?", "a cat.", "yes", "two cats.", "be brief.\nwhy?"])


@given(words=st.lists(WORD, min_size=2, max_size=8), where=st.integers(0, 3), image=st.booleans())
def test_conversations_are_tokenised_as_llava_does(words, where, image) -> None:
    processor = PROCESSOR
    values = words[: len(words) - len(words) % 2]
    if image:
        values[0] = [f"<image>\n{values[0]}", f"{values[0]}\n<image>", f"<image> {values[0]}", "<image>"][where]
    record = {"conversations": turns(*values)} | ({"image": "x.png"} if image else {})
    found = encode_example(processor, parse_record(record).messages, NUM_IMAGE_TOKENS)
    assert found == published(processor, record)


PROCESSOR = tiny_processor()
