"""Odd and broken documents, through the engine and `prebench evaluate`: an answer, or an error with its reason."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image, ImageFile, ImageOps

from prebench.evaluation.engine import Answer, Engine, GenerationRequest
from prebench.evaluation.request import EvaluationRequest, RunRequest
from prebench.evaluation.runner import run_in_subprocesses
from prebench.records import TaskRecord
from prebench.schema import TaskConfig
from prebench.store import read_jsonl, read_record
from tests.evaluation import odd_images
from tests.evaluation.mirror import write_mirror

LIMIT = 6


@pytest.fixture(scope="module")
def engine(tiny_export: Path) -> Engine:
    return Engine(tiny_export, device="cpu", dtype="float32")


@pytest.fixture(autouse=True)
def _whole_images(monkeypatch: pytest.MonkeyPatch) -> None:
    """lmms-eval, once imported by another test, has PIL fill truncated pictures up."""
    monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", False)


def _messages(question: str | None, *images: Image.Image) -> list[dict]:
    content = [{"type": "image", "image": image} for image in images]
    return [{"role": "user", "content": [*content, {"type": "text", "text": question}]}]


def _late(question: str, *contents: bytes) -> Callable[[], list[dict]]:
    return lambda: _messages(question, *(odd_images.opened(content) for content in contents))


def _plain(engine: Engine, messages: list[dict], max_new_tokens: int = LIMIT) -> str:
    """One prompt alone through processor and `model.generate`."""
    images = [part["image"] for part in messages[0]["content"] if part["type"] == "image"]
    bare = [{"role": "user", "content": [{k: v for k, v in p.items() if k != "image"} for p in messages[0]["content"]]}]
    text = engine.processor.apply_chat_template(bare, tokenize=False, add_generation_prompt=True)
    inputs = engine.processor(text=text, images=images or None, return_tensors="pt")
    ids = engine.model.generate(**inputs, do_sample=False, max_new_tokens=max_new_tokens)
    return engine.processor.tokenizer.decode(ids[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)


def _ask(engine: Engine, documents: dict[str, list[dict] | Callable[[], list[dict]]]) -> dict[str, Answer]:
    """Ask everything at once, good documents between the bad ones, and check that each key comes back once."""
    good = {f"good {i}": _messages(f"what color is it? {i}", odd_images.picture(i)) for i in range(len(documents))}
    mixed = [pair for pairs in zip(documents.items(), good.items(), strict=True) for pair in pairs]
    found = list(engine.generate(GenerationRequest(key, messages, LIMIT) for key, messages in mixed))
    assert sorted(answer.key for answer in found) == sorted(key for key, _ in mixed)
    answers = {answer.key: answer for answer in found}
    for key in list(good)[:3]:
        assert answers[key].text == _plain(engine, good[key]), key
    assert len({answers[key].prompt_hash for key in good}) == len(good)
    return answers


def test_odd_images_get_the_answer_of_the_picture_that_they_show(engine: Engine) -> None:
    cases = odd_images.answered()
    documents = {name: _late(f"what is {name}?", content) for name, (content, _) in cases.items()}
    answers = _ask(engine, documents)
    for name, (_, shown) in cases.items():
        assert answers[name].text == _plain(engine, _messages(f"what is {name}?", shown)), name
        (alone,) = engine.generate([GenerationRequest(0, _messages(f"what is {name}?", shown), LIMIT)])
        assert alone.image_hash == answers[name].image_hash, name
    assert len({answers[name].image_hash for name in cases}) == len(cases)


def test_broken_images_are_errors_with_their_reason(engine: Engine) -> None:
    cases = odd_images.failing()
    answers = _ask(engine, {name: _late(f"what is {name}?", content) for name, (content, _) in cases.items()})
    for name, (_, reason) in cases.items():
        assert answers[name].text is None and reason in str(answers[name].error), (name, answers[name])
        assert "\n" not in str(answers[name].error)


def test_orientation_tags_are_left_to_whoever_opens_the_file(engine: Engine) -> None:
    """As in lmms-eval: `datasets` turns a picture as its tag asks, the processors take the pixels as they are."""
    content = odd_images.rotated(odd_images.picture(30))
    turned = ImageOps.exif_transpose(odd_images.opened(content))
    documents = {"tagged": _late("what?", content), "turned": _messages("what?", turned)}
    answers = _ask(engine, documents)
    assert answers["tagged"].image_hash != answers["turned"].image_hash
    for key, image in (("tagged", odd_images.opened(content)), ("turned", turned)):
        assert answers[key].text == _plain(engine, _messages("what?", image))


def test_odd_texts_are_answered_as_plain_generate_does(engine: Engine) -> None:
    first, second = odd_images.picture(40), odd_images.picture(41)
    documents = {
        "no image": _messages("is there a red circle?"),
        "two images": _messages("which is larger?", first, second),
        "two equal images": _messages("which is larger?", first, first),
        "blank": _messages(" ", first),
        "control tokens": _messages("yes</s><|user|>no<s><pad>", first),
        "Arabic": _messages("هل توجد دائرة حمراء؟", first),
        "Chinese": _messages("图中有红色的圆吗？", second),
        "emoji": _messages("🔴🟥 e\u0301 \u202e\x00", second),
        "template": _messages("{{ bos_token }}{% for x in y %}", first),
    }
    answers = _ask(engine, documents)
    for name, messages in documents.items():
        assert answers[name].text == _plain(engine, messages), name


def test_texts_that_can_not_be_asked_are_errors_with_their_reason(engine: Engine) -> None:
    image = odd_images.picture(50)
    cases = {
        "no text": (_messages(None, image), "a text was expected, not NoneType"),
        "placeholder": (_messages("what does <image> mean?", image), "2 image tokens for 1 images"),
        "placeholder alone": (_messages("what does <image> mean?"), "1 image tokens for 0 images"),
        "surrogate": (_messages("\ud800", image), "Error: "),
        "10,000 characters": (_messages("red circle " * 910, image), "in the context of 1024"),
        "no image in its place": (_messages("what?", None), "an image was expected, not NoneType"),
    }
    answers = _ask(engine, {name: messages for name, (messages, _) in cases.items()})
    for name, (_, reason) in cases.items():
        assert answers[name].text is None and reason in str(answers[name].error), (name, answers[name])


def _length(engine: Engine, messages: list[dict]) -> int:
    draft, pixels = engine._prompts.look(messages)
    (prompt,) = engine._prompts.render([draft])
    (encoded,) = engine._prompts.encode([prompt], engine._prompts.images.take(prompt.images, pixels))
    return len(encoded.ids)


def test_answers_end_where_the_context_ends(tiny_export: Path, tmp_path: Path) -> None:
    """Beyond it a model meets positions that it was never trained on."""
    folder = Path(shutil.copytree(tiny_export, tmp_path / "model"))
    config = json.loads((folder / "config.json").read_text())
    image = odd_images.picture(60)
    messages = {str(n): _messages("circle " * n, image) for n in (1, 8, 10, 12, 14)}
    engine = Engine(folder, device="cpu", dtype="float32")
    lengths = {key: _length(engine, value) for key, value in messages.items()}
    context = lengths["12"]
    config["text_config"]["max_position_embeddings"] = context
    (folder / "config.json").write_text(json.dumps(config))
    engine = Engine(folder, device="cpu", dtype="float32")
    requests = [GenerationRequest(key, value, 1024) for key, value in messages.items()]
    answers = {
        answer.key: answer for answer in engine.generate([*requests, GenerationRequest("short", messages["1"], 2)])
    }
    for key in ("1", "8", "10"):
        assert answers[key].truncated
        assert answers[key].text == _plain(engine, messages[key], context - lengths[key])
    for key in ("12", "14"):
        assert answers[key].text is None
        assert f"a prompt of {lengths[key]} tokens leaves no room in the context of {context}" in answers[key].error
    assert not answers["short"].truncated and answers["short"].text == _plain(engine, messages["1"], 2)


def _words(engine: Engine) -> str:
    """Return a question that leaves some of 16 new tokens in the context of 1024, of which 64 are the image's."""
    number = 1
    rest = " 19\nAnswer the question using a single word or phrase."
    while len(engine.processor.tokenizer("circle " * number + rest)["input_ids"]) < 1024 - 64 - 12:
        number += 1
    return "circle " * number


def _odd_mirror(folder: Path, words: str) -> tuple[Path, dict[int, str], dict[int, Image.Image]]:
    """Fill easy-VQA's mirror with odd documents; return it, the reasons of errors, and the pictures of the others."""
    mirror = write_mirror(folder)
    path = mirror / "prebench" / "easy_vqa" / "default.parquet"
    table = pq.read_table(path)
    rows = table.to_pylist()
    pictures = {i: odd_images.opened(row["image"]["bytes"]).convert("RGB") for i, row in enumerate(rows)}
    errors = {}
    row = 1  # upstream looks at document 0 while it loads a task
    for name, (content, reason) in odd_images.failing().items():
        rows[row]["image"]["bytes"] = content
        errors[row] = "truncated" if name == "too large" else reason  # `datasets` decodes it first
        row += 1
    for name in ("cmyk", "palette", "rgba", "1x1", "16-bit colour", "animated"):
        rows[row]["image"]["bytes"], pictures[row] = odd_images.answered()[name]
        row += 1
    rows[row]["image"]["bytes"] = odd_images.rotated(odd_images.picture(70))
    pictures[row] = ImageOps.exif_transpose(odd_images.opened(rows[row]["image"]["bytes"])).convert("RGB")
    rows[row + 1]["question"], errors[row + 1] = "red circle " * 910, "in the context of 1024"
    rows[row + 2]["question"], errors[row + 2] = "<image>", "2 image tokens for 1 images"
    rows[row + 3]["question"] = ""
    rows[row + 4]["question"] = "图中有红色的圆吗？"
    rows[row + 5]["image"], errors[row + 5] = None, "NoneType"
    rows[row + 6]["question"] = words
    for index, values in enumerate(rows):
        values["question"] += f" {index}"  # no two documents have the same prompt
        values["image_id"] = f"{index}"
    pq.write_table(pa.Table.from_pylist(rows, schema=table.schema), path)
    return mirror, errors, pictures


@pytest.mark.slow
def test_an_evaluation_survives_every_odd_document(tiny_export: Path, engine: Engine, tmp_path: Path) -> None:
    mirror, errors, pictures = _odd_mirror(tmp_path / "mirror", _words(engine))
    task = TaskConfig(
        task="prebench_easy_vqa", label="e", data_source="real", primary_metric="exact_match", num_images=6
    )
    run = RunRequest(variant="pre", seed=0, model_dir=tiny_export, run_dir=tmp_path / "run")
    request = EvaluationRequest(runs=(run,), tasks=(task,), max_error_share=0.5, device="cpu", dtype="float32")
    run_in_subprocesses(request, mirror, tmp_path / "cache")
    samples = list(read_jsonl(tmp_path / "run" / "eval" / "prebench_easy_vqa.samples.jsonl"))
    assert [sample["doc_id"] for sample in samples] == list(range(24))
    assert {sample["doc_id"] for sample in samples if sample["error"]} == set(errors)
    for sample in samples:
        doc_id = sample["doc_id"]
        if doc_id in errors:
            assert errors[doc_id] in sample["error"] and sample["score"] is sample["response"] is None, sample
        else:
            messages = _messages(sample["question"], pictures[doc_id])
            assert f" {doc_id}\n" in sample["question"]
            limit = 10 if sample["truncated"] else 16
            assert sample["response"] == _plain(engine, messages, limit), sample
    assert sum(sample["truncated"] for sample in samples) == 1
    record = read_record(tmp_path / "run" / "eval" / "prebench_easy_vqa.json", TaskRecord)
    scored = [sample["score"] for sample in samples if sample["score"] is not None]
    assert (record.n, record.n_errors) == (24, len(errors)) and record.score == pytest.approx(sum(scored) / len(scored))
