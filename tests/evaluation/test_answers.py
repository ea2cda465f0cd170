"""The answer log: what was answered is found again by what decided it, whatever happened to the file or its path."""

from __future__ import annotations

import json
import multiprocessing
import resource
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from prebench.errors import StoreError
from prebench.evaluation.answers import AnswerLog, answer_file, decided_by, read_answers
from prebench.evaluation.engine import Engine
from prebench.evaluation.generation import Answer, GenerationRequest
from prebench.evaluation.prompts import Prompt
from tests.evaluation.mirror import image

BASIS = {"weights": "w0", "dtype": "torch.float32"}
TEXTS = st.lists(st.text(max_size=20), min_size=1, max_size=8)


def prompt(number: int, images: str = "i") -> Prompt:
    return Prompt("a question", (images,), f"prompt-{number}", images)


def request(number: int, max_new_tokens: int = 16, until: tuple[str, ...] = ()) -> GenerationRequest:
    return GenerationRequest(number, [], max_new_tokens, until)


def write(path: Path, texts: list[str], first: int = 0, basis: dict | None = None) -> None:
    """Answer the prompts `first`, `first + 1`, ... through the log, as an evaluation does."""
    with AnswerLog(path, basis or BASIS) as log:
        for number, text in enumerate(texts, start=first):
            assert log.known(request(number), prompt(number)) is None
            log.add(Answer(number, text, None, f"prompt-{number}", "i"))


def answers(path: Path, count: int, basis: dict | None = None) -> list[str | None]:
    with AnswerLog(path, basis or BASIS) as log:
        return [log.known(request(number), prompt(number)) for number in range(count)]


# --- the file ------------------------------------------------------------------------------------------------


@settings(max_examples=40)
@given(texts=TEXTS, more=TEXTS, data=st.data())
@example(texts=["\n", "\u2028", "\x00", "\ud800"], more=['"}'], data=None)
def test_a_file_cut_anywhere_keeps_its_whole_lines_and_those_appended_later(
    tmp_path_factory: pytest.TempPathFactory, texts: list[str], more: list[str], data: st.DataObject | None
) -> None:
    path = tmp_path_factory.mktemp("log") / "task.jsonl"
    ends = []
    for number, text in enumerate(texts):
        write(path, [text], number)
        ends.append(path.stat().st_size)
    size = ends[-1] - 1 if data is None else data.draw(st.integers(0, ends[-1]))
    path.write_bytes(path.read_bytes()[:size])
    whole = sum(end <= size for end in ends)
    assert answers(path, len(texts)) == texts[:whole] + [None] * (len(texts) - whole)
    assert read_answers(path)[1] == 0  # a line that is being written is no damage
    write(path, more, 100)
    with AnswerLog(path, BASIS) as log:
        assert [log.known(request(100 + n), prompt(100 + n)) for n in range(len(more))] == more
        assert log.damaged == (size not in (0, *ends) and size - max([0, *ends[:whole]]) > 1)
    assert answers(path, len(texts))[:whole] == texts[:whole]


@given(place=st.integers(0, 10_000), byte=st.integers(0, 255))
def test_a_changed_byte_never_changes_an_answer(tmp_path_factory, place: int, byte: int) -> None:
    path = tmp_path_factory.mktemp("log") / "task.jsonl"
    texts = ["red", "blue", "a circle"]
    write(path, texts)
    content = bytearray(path.read_bytes())
    content[place % len(content)] = byte
    path.write_bytes(content)
    for found, text in zip(answers(path, 3), texts, strict=True):
        assert found in (text, None)


@pytest.mark.parametrize(
    "damage",
    [
        lambda line: line.replace(b"blue", b"red"),
        lambda line: line.replace(b"prompt-1", b"prompt-3"),
        lambda line: b"\x80\x00" + line,
        lambda line: b"[" * 100_000,
        lambda line: json.dumps({"text": "blue"}).encode(),
        lambda line: json.dumps(json.loads(line) | {"text": 3}).encode(),
    ],
    ids=["text", "prompt", "binary", "nested", "fields", "type"],
)
def test_a_damaged_line_is_no_answer_and_is_counted(tmp_path: Path, damage: Callable[[bytes], bytes]) -> None:
    path = tmp_path / "task.jsonl"
    write(path, ["red", "blue", "red"])
    lines = path.read_bytes().split(b"\n")
    path.write_bytes(b"\n".join([*lines[:2], damage(lines[2]), *lines[3:]]))
    assert answers(path, 4) == ["red", None, "red", None]
    assert read_answers(path)[1] == 1


def _append(path: Path, first: int) -> None:
    write(path, [f"answer {n} " * 300 for n in range(first, first + 40)], first)


def test_processes_that_append_at_once_lose_nothing(tmp_path: Path) -> None:
    path = tmp_path / "w0" / "task.jsonl"
    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=_append, args=(path, 40 * n)) for n in range(4)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
        assert process.exitcode == 0
    assert answers(path, 160) == [f"answer {n} " * 300 for n in range(160)]
    assert read_answers(path)[1] == 0


def test_a_log_that_takes_no_answers_is_one_clear_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    with pytest.raises(StoreError, match=r"file/w0/gqa\.jsonl: can't be read \(Not a directory\)"):
        AnswerLog(answer_file(tmp_path / "file", "w0", "gqa"), BASIS)
    log = AnswerLog(answer_file(tmp_path / "logs", "w0", "gqa"), BASIS)
    (tmp_path / "logs").write_text("in the way")
    log.known(request(0), prompt(0))
    with pytest.raises(StoreError, match=r"logs/w0/gqa\.jsonl: can't be written .* the answers so far are kept"):
        log.add(Answer(0, "red", None, "prompt-0", "i"))


def _append_to_a_full_disk(path: Path, room: int) -> None:
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (path.stat().st_size + room,) * 2)
    with pytest.raises(StoreError, match="can't be written"):
        write(path, ["blue"], 1)


@pytest.mark.parametrize("room", [0, 60])
def test_a_disk_that_fills_up_loses_nothing_but_the_line_that_did_not_fit(tmp_path: Path, room: int) -> None:
    path = tmp_path / "task.jsonl"
    write(path, ["red"])
    size = path.stat().st_size
    process = multiprocessing.get_context("fork").Process(target=_append_to_a_full_disk, args=(path, room))
    process.start()
    process.join()
    assert process.exitcode == 0 and path.stat().st_size == size + room
    assert answers(path, 2) == ["red", None]
    write(path, ["green"], 2)
    assert answers(path, 3) == ["red", None, "green"]


# --- the key -------------------------------------------------------------------------------------------------


def test_everything_that_decides_an_answer_is_in_its_key(tmp_path: Path) -> None:
    path = tmp_path / "task.jsonl"
    write(path, ["red"])
    log = AnswerLog(path, BASIS)
    assert log.known(request(7), prompt(0)) == "red"  # the document's number is no part of it
    assert log.known(request(0, max_new_tokens=17), prompt(0)) is None
    assert log.known(request(0, until=("\n",)), prompt(0)) is None
    assert log.known(request(0), prompt(1)) is None
    assert log.known(request(0), prompt(0, images="other")) is None
    assert log.taken == 1
    # The same file under the name of other weights, as after a copy or a new training in the same place.
    assert answers(path, 1, BASIS | {"weights": "w1"}) == [None]
    assert answers(path, 1, BASIS | {"dtype": "torch.bfloat16"}) == [None]


def test_errors_are_not_kept_and_an_answer_is_kept_once(tmp_path: Path) -> None:
    path = tmp_path / "task.jsonl"
    with AnswerLog(path, BASIS) as log:
        for number in (0, 1, 2):  # three documents with the same question, asked in one batch
            assert log.known(request(number), prompt(0)) is None
        log.add(Answer(0, None, "OutOfMemoryError", "prompt-0", "i"))
        log.add(Answer(1, "red", None, "prompt-0", "i"))
        log.add(Answer(2, "red", None, "prompt-0", "i"))
        log.add(Answer(3, None, "the prompt could not be built, so nobody asked", "", ""))
        assert log.known(request(4), prompt(0)) == "red"
        log.add(Answer(4, "red", None, "prompt-0", "i"))
    assert len(path.read_text().splitlines()) == 2  # the first is empty: lines begin with their newline


# --- the engine ----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def engine(tiny_export: Path) -> Engine:
    return Engine(tiny_export, device="cpu", token_budget=300)  # batches of two or three


def ask(key: int, *parts: object) -> GenerationRequest:
    content = [{"type": "text", "text": p} if isinstance(p, str) else {"type": "image", "image": p} for p in parts]
    return GenerationRequest(key, [{"role": "user", "content": content}], 4)


def requests() -> list[GenerationRequest]:
    a, b = image(0), image(1)
    asked = [(a, "is there a red circle?"), (b, "is there a red circle?"), (a, "what color is the circle?")]
    asked += [(a, b, "yes no"), (b, a, "yes no"), (a, "yes no", b, "circle"), (a, b, "yes no", "circle"), ("yes no",)]
    return [ask(key, *parts) for key, parts in enumerate(asked)]


def answer_all(engine: Engine, log: AnswerLog) -> dict[int, Answer]:
    found = {}
    for answer in engine.generate(requests(), log.known):
        log.add(answer)
        found[answer.key] = answer
    return found


def test_prompts_that_differ_never_share_an_answer(engine: Engine, tmp_path: Path) -> None:
    """Other images, the same images in another order or between other words: as many keys as prompts."""
    path = answer_file(tmp_path, "w0", "gqa")
    basis = decided_by(engine, "w0")
    with AnswerLog(path, basis) as log:
        first = answer_all(engine, log)
    assert len(read_answers(path)[0]) == len(first) == len(requests()) and not [a for a in first.values() if a.error]
    with AnswerLog(path, basis) as log:
        second = {a.key: a for a in engine.generate(reversed(requests()), log.known)}
        assert log.taken == len(first)
    assert second == first
    assert basis["dtype"] == "torch.float32" and basis["device"] == "cpu"


def test_known_answers_cost_no_compute(engine: Engine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = answer_file(tmp_path, "w0", "gqa")
    with AnswerLog(path, decided_by(engine, "w0")) as log:
        expected = answer_all(engine, log)
    monkeypatch.setattr(engine.model.model, "forward", lambda *a, **k: pytest.fail("the model was run"))
    with AnswerLog(path, decided_by(engine, "w0")) as log:
        assert {a.key: a for a in engine.generate(requests(), log.known)} == expected
    with AnswerLog(path, decided_by(engine, "w1")) as log:
        assert not any(log.known(r, prompt(0)) for r in requests()) and log.taken == 0
