"""The engine's answers equal plain `model.generate` at batch size 1, whatever the batches, and failures stay alone."""

from __future__ import annotations

import io
import random
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from prebench.errors import EvaluationError, ModelError
from prebench.evaluation import engine as engine_module
from prebench.evaluation import prompts, reading
from prebench.evaluation.engine import Engine
from prebench.evaluation.generation import GenerationRequest, Sampling, generation_settings, truncate
from prebench.evaluation.threads import num_workers

QUESTIONS = ["is there a red circle?", "what color?", "describe the image.", "yes", "où est le cercle? 红色"]


def _image(seed: int) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def _messages(question: str, *images: Image.Image) -> list[dict]:
    content = [{"type": "image", "image": image} for image in images]
    return [{"role": "user", "content": [*content, {"type": "text", "text": question}]}]


def _requests(max_new_tokens: int = 12) -> list[GenerationRequest]:
    """24 documents: 4 images with 5 questions each, a document with two images, three text-only prompts."""
    documents = [_messages(question, _image(i)) for i in range(4) for question in QUESTIONS]
    documents.append(_messages("which is larger?", _image(0), _image(1)))
    documents += [_messages(question) for question in QUESTIONS[:3]]
    return [GenerationRequest(i, messages, max_new_tokens) for i, messages in enumerate(documents)]


def _plain_ids(engine: Engine, request: GenerationRequest, **settings) -> list[int]:
    """One prompt through processor and generate, as a user of transformers would write it."""
    messages = request.messages
    images = [part["image"] for part in messages[0]["content"] if part["type"] == "image"]
    content = [{k: v for k, v in part.items() if k != "image"} for part in messages[0]["content"]]
    bare = [{"role": "user", "content": content}]
    text = engine.processor.apply_chat_template(bare, tokenize=False, add_generation_prompt=True)
    inputs = engine.processor(text=text, images=images or None, return_tensors="pt")
    settings = settings or {"do_sample": False}
    output = engine.model.generate(**inputs.to(engine.model.device), **settings, max_new_tokens=request.max_new_tokens)
    return output[0, inputs["input_ids"].shape[1] :].tolist()


def _plain(engine: Engine, request: GenerationRequest, **settings) -> str:
    return engine.processor.tokenizer.decode(_plain_ids(engine, request, **settings), skip_special_tokens=True)


@pytest.fixture(scope="module")
def engine(tiny_export: Path) -> Engine:
    return Engine(tiny_export, device="cpu", dtype="float32")


@pytest.fixture(scope="module")
def expected(engine: Engine) -> dict[int, str]:
    return {request.key: _plain(engine, request) for request in _requests()}


def _answers(engine: Engine, requests: list[GenerationRequest]) -> dict:
    found = list(engine.generate(requests))
    assert len(found) == len(requests)
    assert all(answer.error is None for answer in found), found
    return {answer.key: answer.text for answer in found}


def test_answers_differ_between_documents(expected: dict[int, str]) -> None:
    assert len(set(expected.values())) > 8  # otherwise the tests below would show nothing


@pytest.mark.parametrize("token_budget", [1, 300, 1000, 100_000])
def test_answers_equal_plain_generate_at_any_batch_size(tiny_export, expected, token_budget: int) -> None:
    engine = Engine(tiny_export, device="cpu", dtype="float32", token_budget=token_budget)
    assert _answers(engine, _requests()) == expected


@pytest.mark.cuda
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_answers_on_a_gpu_equal_plain_generate_there(tiny_export, dtype) -> None:
    engine = Engine(tiny_export, device="cuda", dtype=dtype)
    expected = {request.key: _plain(engine, request) for request in _requests()}
    found = _answers(engine, _requests())
    if dtype == "float32":
        assert found == expected
    else:  # of random weights many logits are nearly equal
        assert sum(found[key] == answer for key, answer in expected.items()) >= len(expected) // 2


def test_order_and_windows_do_not_matter(engine, expected, monkeypatch) -> None:
    shuffled = _requests()
    random.Random(0).shuffle(shuffled)  # noqa: S311
    assert _answers(engine, shuffled) == expected
    monkeypatch.setattr(reading, "WINDOW", 5)
    assert _answers(engine, shuffled) == expected


def test_rows_that_end_early_leave_the_others_unchanged(engine, expected) -> None:
    """EOS of a random model is rare: a frequent token plays its part, and plain answers are cut at it."""
    counts = torch.bincount(torch.tensor([t for request in _requests() for t in _plain_ids(engine, request)[1:]]))
    frequent = int(counts.argmax())
    original = engine._eos_ids
    engine._eos_ids = original | {frequent}
    engine.model.generation_config.eos_token_id = [*original, frequent]
    try:
        plain = {request.key: _plain(engine, request) for request in _requests()}
        assert plain != expected
        assert _answers(engine, _requests()) == plain
    finally:
        engine._eos_ids = original
        engine.model.generation_config.eos_token_id = next(iter(original))


def test_limits_may_differ_within_a_batch(engine) -> None:
    requests = [GenerationRequest(i, _messages("yes", _image(1)), limit) for i, limit in enumerate([1, 3, 20, 7])]
    answers = _answers(engine, requests)
    assert answers == {request.key: _plain(engine, request) for request in requests}


def test_answers_longer_than_planned(engine, monkeypatch) -> None:
    """The cache's room is used up, and made anew."""
    monkeypatch.setattr(engine_module, "PLANNED_NEW_TOKENS", 4)
    requests = [GenerationRequest(i, _messages(question, _image(1)), 30) for i, question in enumerate(QUESTIONS)]
    assert _answers(engine, requests) == {request.key: _plain(engine, request) for request in requests}


def test_stop_strings_cut_the_answer(engine, expected) -> None:
    key, text = next((k, t) for k, t in expected.items() if len(t) > 6)
    stop = text[3:5]
    request = GenerationRequest(key, _requests()[key].messages, 12, until=(stop,))
    (answer,) = engine.generate([request])
    assert answer.text == text.split(stop)[0]
    assert truncate("a\n\nb.c", ["\n\n", "."]) == "a"


def test_an_image_is_preprocessed_once(engine, monkeypatch) -> None:
    calls = []
    original = engine._prompts.images._preprocess
    monkeypatch.setattr(engine._prompts.images, "_preprocess", lambda ims: calls.extend(ims) or original(ims))
    image = _image(77)
    list(engine.generate(GenerationRequest(i, _messages(f"{i}?", image.copy()), 2) for i in range(50)))
    assert len(calls) == 1


def test_requests_are_read_a_few_windows_ahead_in_order_by_one_thread(engine, monkeypatch) -> None:
    monkeypatch.setattr(reading, "WINDOW", 4)
    built, threads = [], set()

    def late(number: int) -> list[dict]:
        built.append(number)
        threads.add(threading.get_ident())
        return _messages("yes", _image(number % 3))

    answers = engine.generate(GenerationRequest(i, lambda i=i: late(i), 1) for i in range(1000))
    ahead = 3 * 4 + 4 * (num_workers(engine.model) - 1)  # its own window, two ahead, and those computed beside it
    for number, _ in enumerate(answers):
        assert len(built) <= number + ahead + 1
        if number == 100:
            break
    answers.close()
    assert built == list(range(len(built)))
    assert len(threads) == 1 and threading.get_ident() not in threads


def test_large_images_make_small_windows(tiny_export, expected, monkeypatch) -> None:
    monkeypatch.setattr(reading, "WINDOW_BYTES", 2 * 64 * 64 * 3)  # two images
    engine = Engine(tiny_export, device="cpu", dtype="float32")
    sizes = []
    original = engine._plan
    monkeypatch.setattr(engine, "_plan", lambda window: sizes.append(len(window.jobs)) or original(window))
    assert _answers(engine, _requests()) == expected
    assert len(sizes) > 1


def test_image_tokens_are_expanded_as_the_processor_does(engine) -> None:
    builder = prompts.PromptBuilder(engine.processor, engine.model.config.image_token_id)
    assert builder._expand_ids
    messages = [
        {"role": "user", "content": [*_messages("", _image(0))[0]["content"], *_messages("a", _image(1))[0]["content"]]}
    ]
    draft, pixels = builder.look(messages)
    (prompt,) = builder.render([draft])
    images = builder.images.take(prompt.images, pixels)
    text = engine.processor.apply_chat_template(prompts._without_pixels(messages), add_generation_prompt=True)
    expected = engine.processor(text=text, images=[_image(0), _image(1)])["input_ids"][0]
    for expand_ids in (True, False):  # False: a tokenizer that joins neighbouring image tokens
        builder._expand_ids = expand_ids
        assert list(builder.encode([prompt], images)[0].ids) == expected


@pytest.mark.parametrize("size", [(64, 64), (31, 90)])
def test_images_preprocessed_together_are_what_each_is_alone(engine, size: tuple[int, int]) -> None:
    images = {str(i): _image(i).resize(size) for i in range(2 * prompts.IMAGES_AT_ONCE + 1)}
    images |= {f"other {i}": _image(i).resize((50, 40)) for i in range(3)}
    together = prompts.ImageStore(engine.processor, engine.model.config.image_token_id).take(images, images)
    for key, image in images.items():
        alone = engine.processor(text="<image>", images=[image], return_tensors="pt")
        assert torch.equal(together[key].features["pixel_values"], alone["pixel_values"]), key
        assert together[key].num_tokens == int((alone["input_ids"] == engine.model.config.image_token_id).sum())


def test_known_answers_cost_neither_preprocessing_nor_compute(engine, expected, monkeypatch) -> None:
    monkeypatch.setattr(engine._prompts.images, "_preprocess", lambda ims: pytest.fail("an image was preprocessed"))
    monkeypatch.setattr(engine.model.model, "forward", lambda *a, **k: pytest.fail("the model was run"))
    image = _image(78)
    requests = [GenerationRequest(i, _messages(f"{i}?", image), 2) for i in range(3)]
    answers = list(engine.generate(requests, known=lambda request, prompt: f"{request.key} {prompt.image_hash}"))
    assert [answer.text for answer in answers] == [f"{i} {answers[0].image_hash}" for i in range(3)]
    assert len(answers[0].image_hash) == 16


def _truncated() -> Image.Image:
    buffer = io.BytesIO()
    _image(5).save(buffer, "PNG")
    return Image.open(io.BytesIO(buffer.getvalue()[:2000]))


def _raises() -> list[dict]:
    raise OSError("broken data stream")


def test_a_failure_is_an_answer_with_an_error(engine, expected, monkeypatch) -> None:
    monkeypatch.setattr("PIL.ImageFile.LOAD_TRUNCATED_IMAGES", False)
    good = _requests()[:10]
    bad = {
        "truncated": _messages("yes", _truncated()),
        "late": _raises,
        "bomb": _messages("yes", Image.new("1", (50_000, 2_000))),
        "placeholder": _messages("<image> yes", _image(0)),
        "none": _messages("yes", None),
        "no text part": [{"role": "user", "content": [{"type": "image", "image": _image(0)}, {"type": "text"}]}],
    }
    requests = [*good[:5], *(GenerationRequest(k, m, 4) for k, m in bad.items()), *good[5:]]
    answers = {answer.key: answer for answer in engine.generate(requests)}
    assert len(answers) == len(requests)
    for key in bad:
        assert answers[key].text is None and answers[key].error, key
    assert {request.key: answers[request.key].text for request in good} == {r.key: expected[r.key] for r in good}
    assert "50000 x 2000" in answers["bomb"].error


def test_odd_images_are_answered(engine) -> None:
    images = [
        Image.new("CMYK", (30, 50), (9, 8, 7, 6)),
        Image.new("RGBA", (64, 64), (1, 2, 3, 0)),
        Image.new("P", (10, 10)),
        Image.new("I;16", (40, 40)),
        Image.new("L", (1, 1)),
    ]
    requests = [GenerationRequest(i, _messages("yes", image), 3) for i, image in enumerate(images)]
    requests.append(GenerationRequest("blank", _messages(" ", _image(0)), 3))
    assert len(_answers(engine, requests)) == len(requests)


def test_an_error_in_the_computation_stays_with_its_document(engine, expected, monkeypatch) -> None:
    """A batch that raises (out of memory, say) is halved until the failing document stands alone."""
    poison = engine.processor.tokenizer("describe the image.")["input_ids"]
    original = engine_module.decode

    def failing(model, cache, length, rows, eos_ids):
        if len(rows) > 6 or any(list(row.suffix[-len(poison) :]) == poison for row in rows):
            raise torch.OutOfMemoryError("no memory left")
        original(model, cache, length, rows, eos_ids)

    monkeypatch.setattr(engine_module, "decode", failing)
    answers = {answer.key: answer for answer in engine.generate(_requests())}
    failed = {key for key, answer in answers.items() if answer.error}
    assert failed == {2, 7, 12, 17, 23}
    assert {k: a.text for k, a in answers.items() if k not in failed} == {
        k: t for k, t in expected.items() if k not in failed
    }


def test_batches_shrink_where_memory_ends(tiny_export, expected, monkeypatch) -> None:
    engine = Engine(tiny_export, device="cpu", dtype="float32", token_budget=4000)
    original = engine_module.decode

    def failing(model, cache, length, rows, eos_ids):
        if len(rows) > 6:
            raise torch.OutOfMemoryError("no memory left")
        original(model, cache, length, rows, eos_ids)

    monkeypatch.setattr(engine_module, "decode", failing)
    assert _answers(engine, _requests()) == expected
    assert 512 <= engine.token_budget < 4000


def test_hashes_follow_content(engine) -> None:
    requests = [
        GenerationRequest("a", _messages("yes", _image(0)), 1),
        GenerationRequest("same", _messages("yes", _image(0)), 1),
        GenerationRequest("question", _messages("no", _image(0)), 1),
        GenerationRequest("image", _messages("yes", _image(1)), 1),
        GenerationRequest("text", _messages("yes"), 1),
    ]
    found = {answer.key: (answer.prompt_hash, answer.image_hash) for answer in engine.generate(requests)}
    assert found["a"] == found["same"]
    assert found["a"][0] != found["question"][0] and found["a"][1] == found["question"][1]
    assert found["a"][0] == found["image"][0] and found["a"][1] != found["image"][1]
    assert found["text"][1] == ""


def test_a_prompt_that_ends_with_its_image_is_answered(engine) -> None:
    """No question follows the image, or a text stands before it: nothing is left to run after the prefix."""
    requests = [GenerationRequest(i, _messages("", _image(i)), 6) for i in range(3)]
    behind = [{"role": "user", "content": list(reversed(_messages("describe the image.", _image(1))[0]["content"]))}]
    requests += [GenerationRequest("behind", behind, 6), GenerationRequest("one token", behind, 1)]
    requests += [GenerationRequest(f"mixed {i}", _messages("yes", _image(i)), 6) for i in range(3)]
    plain = {request.key: _plain(engine, request) for request in requests}
    assert len(set(plain.values())) > 4
    assert _answers(engine, requests) == plain


SAMPLING = [Sampling(0.9), Sampling(1.3, top_p=0.8), Sampling(1.0, top_k=5), Sampling(2.0, 0.9, 0)]


def test_samples_are_those_of_generate_and_depend_on_the_document_alone(tiny_export, engine, monkeypatch) -> None:
    """As `generate` draws them from the same seed, whatever the batch, the order, or whether others are greedy."""
    images = [_image(i) for i in range(3)]
    requests = [
        GenerationRequest((i, j), _messages(question, image), 8, (), sampling)
        for i, image in enumerate(images)
        for j, (question, sampling) in enumerate(zip(QUESTIONS, [*SAMPLING, None], strict=True))
    ]
    seeds = []
    original = engine_module.derive_seed
    monkeypatch.setattr(engine_module, "derive_seed", lambda *parts: seeds.append(original(*parts)) or seeds[-1])
    plain = {}
    for request in requests:
        seeds.clear()
        (answer,) = engine.generate([request])
        assert answer.sampled == (request.sampling is not None)
        settings = {"do_sample": True, **request.sampling._asdict()} if request.sampling else {"do_sample": False}
        torch.manual_seed(seeds[0] if seeds else 0)
        plain[request.key] = _plain(engine, request, **settings)
        assert answer.text == plain[request.key], request.key
    assert len(set(plain.values())) > 10
    random.Random(1).shuffle(requests)  # noqa: S311
    for budget in (1, 400, 100_000):
        batched = Engine(tiny_export, device="cpu", dtype="float32", token_budget=budget)
        assert _answers(batched, requests) == plain


def test_settings_of_generation() -> None:
    settings = generation_settings({"until": ["\n\n", ""], "max_new_tokens": 5, "temperature": 0.7}, "t")
    assert settings == (5, ("\n\n",), None)  # a temperature alone does not sample
    sampled = {"do_sample": True, "temperature": 0.7, "top_p": None}
    assert generation_settings(sampled, "t").sampling == Sampling(0.7, 1.0, 50)
    assert generation_settings({"do_sample": True, "temperature": 0}, "t") == (1024, (), None)
    with pytest.raises(EvaluationError, match=r"t: .*top_p 1\.5"):
        generation_settings(sampled | {"top_p": 1.5}, "t")
    with pytest.raises(EvaluationError, match="beam"):
        generation_settings({"num_beams": 3}, "t")


def test_a_folder_without_a_model_is_one_clear_line(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"config\.json is missing"):
        Engine(tmp_path)
