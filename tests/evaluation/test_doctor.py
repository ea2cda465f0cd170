"""`prebench doctor`: no flips on a sound engine; an answer that depends on the batch is found, with its margin."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner, Result

from prebench.cli import main
from prebench.data.check_documents import check_documents
from prebench.errors import EvaluationError, ModelError
from prebench.evaluation import doctor, doctor_report
from prebench.evaluation.doctor import Document, Plan, Reference, examine
from prebench.evaluation.engine import Engine
from prebench.evaluation.generation import Answer, GenerationRequest
from prebench.store import read_json
from tests.tiny_study import call, command

FOUND = {"prebench": "", "prebench_pre": "lost"}


@pytest.fixture
def documents(tmp_path: Path) -> tuple[Document, ...]:
    found = check_documents(tmp_path, 14)
    return tuple(Document(question=text, images=images) for text, images in found)


def _invoke(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> Result:
    """Run the command in this process, without the seconds that importing lmms-eval takes."""
    monkeypatch.setattr(doctor_report, "lmms_eval_models", lambda: FOUND)
    return CliRunner().invoke(main, ["doctor", *map(str, arguments), "--device", "cpu", "--processes", "1"])


Change = Callable[[Engine, str, Answer], Answer]


def _change_answers(monkeypatch: pytest.MonkeyPatch, change: Change) -> None:
    """Let the engine answer wrongly: `change` is given the engine, the question and the right answer."""
    original = Engine.generate

    def generate(self: Engine, requests: Iterable[GenerationRequest], *rest: object) -> Iterator[Answer]:
        asked = {}

        def listen() -> Iterator[GenerationRequest]:
            for request in requests:
                asked[request.key] = request.messages()[0]["content"][-1]["text"]
                yield request

        for answer in original(self, listen(), *rest):
            yield change(self, asked[answer.key], answer)

    monkeypatch.setattr(Engine, "generate", generate)


def test_documents_are_of_all_kinds_and_images_of_several_shapes(documents: tuple[Document, ...]) -> None:
    assert {document.kind for document in documents} == set(doctor.KINDS)
    assert len({(document.question, document.images) for document in documents}) == 14
    shapes = {image.size for d in documents for p in d.messages()[0]["content"] if (image := p.get("image"))}
    assert len(shapes) == 2


def test_a_sound_engine_has_no_flips(tiny_export: Path, documents: tuple[Document, ...]) -> None:
    plan = Plan(
        model_dir=tiny_export, device="cpu", documents=documents, processes=(1,), batch_sizes=(1, 16), generated=4
    )
    report = examine(plan)
    assert report.flips == [] and report.left_out == ()
    assert [(result.setting, result.documents) for result in report.results] == [
        ("model.generate, one by one", 4),
        ("batch size 1, in order", 14),
        ("batch size 1, shuffled", 14),
        ("batch size 16, shuffled", 14),
    ]
    assert (report.device, report.dtype, sum(report.kinds.values())) == ("cpu", "float32", 14)


def test_a_flip_is_reported_with_its_margin_and_exit_code_1(
    tiny_export: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wrong = check_documents(tmp_path, 5)[3][0]

    def change(engine: Engine, question: str, answer: Answer) -> Answer:
        flipped = engine.token_budget > 1000 and question == wrong
        return dataclasses.replace(answer, text=f"no, {answer.text}") if flipped else answer

    _change_answers(monkeypatch, change)
    output = tmp_path / "doctor.json"
    options = ("--documents", 5, "--batch-sizes", "1,4,64", "--generate", 2, "--json", output)
    result = _invoke(monkeypatch, tiny_export, *options)
    assert result.exit_code == 1, result.output
    found = read_json(output)
    flips = [flip for each in found["results"] for flip in each["flips"]]
    assert [flip["document"] for flip in flips] == [3] * len(flips)
    assert "batch size 64, shuffled" in {flip["setting"] for flip in flips}
    assert not any(flip["setting"].startswith("batch size 1,") for flip in flips)
    assert all(flip["found"] == "no, " + flip["expected"] and flip["margin"] > 0 for flip in flips)
    assert "1 of 5 answers depend on how they are computed" in result.output
    assert "no, " in result.output and "prebench_pre: lost" in result.output
    assert found["machine"]["versions"]["torch"] and found["advice"]


def test_advice_follows_the_size_of_the_margins() -> None:
    def advice(dtype: str, *margins: float) -> str:
        flips = tuple(doctor.Flip(0, "q", "s", "a", "b", margin) for margin in margins)
        report = doctor.Report("cpu", dtype, 1, {"one image": 9}, (), (doctor.Result("s", 9, None, flips),))
        return " ".join(doctor_report.advice(report))

    assert advice("float32").startswith("No flips: in float32")
    assert "Evaluate in float32" in advice("bfloat16", 0.01, 0.2)
    assert "tied within float32's rounding" in advice("float32", 1e-5)
    assert "more than rounding in float32" in advice("float32", 1e-5, 0.5)
    assert "more than rounding in bfloat16" in advice("bfloat16", 3.0)


def test_flips_are_shown_by_document_where_the_answers_part() -> None:
    start = "a very long answer that both of them share, word by word, "
    flips = [doctor.Flip(n, "q", f"size {s}", f"{start}red", f"{start}blue", 0.5) for s in (4, 16) for n in range(12)]
    report = doctor.Report("cpu", "bfloat16", 1, {"one image": 20}, (), (doctor.Result("s", 20, None, tuple(flips)),))
    lines = doctor_report._flips(report)
    assert lines[0] == "document 0: 'q', margin 0.5 (size 4 and 1 more)"
    assert "word by word, red'" in lines[1] and "word by word, blue'" in lines[2]
    assert lines[-2:] == ["... and 2 more documents (--json writes all)", ""]


def test_the_margin_is_that_of_the_first_token_that_differs() -> None:
    reference = Reference("a red circle", ("a", "a red", "a red circle", "a red circle"), (4.0, 3.0, 2.0, 1.0))
    assert reference.margin("the red circle") == 4.0
    assert reference.margin("a red square") == 2.0
    assert reference.margin("a red circle and") == 1.0  # where the reference ended


def test_a_kind_that_the_model_does_not_take_is_left_out(
    tiny_export: Path, documents: tuple[Document, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    refused = {document.question for document in documents if document.kind == "text-only"}

    def change(_engine: Engine, question: str, answer: Answer) -> Answer:
        error = "TemplateError: no image" if question in refused else None
        return dataclasses.replace(answer, text=None, error=error) if error else answer

    _change_answers(monkeypatch, change)
    plan = Plan(model_dir=tiny_export, device="cpu", documents=documents, processes=(1,), batch_sizes=(8,), generated=1)
    report = examine(plan)
    assert report.kinds["text-only"] == 0 and report.kinds["one image"] > 8
    assert report.left_out == ("text-only: left out, the model does not take it (TemplateError: no image)",)
    refused |= {document.question for document in documents}
    with pytest.raises(ModelError, match=r"the model takes no document: text-only: left out.*; one image: left out"):
        examine(plan)


def test_what_can_not_be_checked_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    result = _invoke(monkeypatch, tmp_path)
    assert result.exit_code == 2 and f"{tmp_path}: no model here" in result.output
    result = _invoke(monkeypatch, tmp_path, "--batch-sizes", "1,none")
    assert result.exit_code == 2 and "write whole numbers from 1" in result.output


@pytest.mark.slow
def test_the_command_finds_no_flip_over_sizes_orders_and_processes(tiny_export: Path, tmp_path: Path) -> None:
    """The same for 2,000 documents and a trained model: prebench doctor MODEL --documents 2000 --dtype float32."""
    output = tmp_path / "doctor.json"
    done = call(command("doctor", tiny_export.parent, "--documents", 120, "--device", "cpu", "--json", output))
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]
    found = json.loads(output.read_text())
    settings = {each["setting"]: each["documents"] for each in found["results"]}
    assert settings.pop("model.generate, one by one") == 50
    assert len(settings) == 9 and set(settings.values()) == {120}
    assert set(found["machine"]["lmms_eval_models"].values()) == {""}
    assert "No flips: in float32" in done.stdout


@pytest.mark.parametrize(
    ("script", "reason"),
    [
        ("echo starting; echo 'prebench: document 3 failed' >&2; echo more; exit 2", "document 3 failed"),
        ("echo one; echo two; kill -9 $$", "one | two"),
    ],
)
def test_a_process_that_ends_early_is_one_line(
    tmp_path: Path, documents: tuple[Document, ...], monkeypatch: pytest.MonkeyPatch, script: str, reason: str
) -> None:
    launcher = tmp_path / "python"
    launcher.write_text(f"#!/bin/sh\n{script}\n")
    launcher.chmod(0o755)
    monkeypatch.setattr("sys.executable", str(launcher))
    plan = Plan(model_dir=tmp_path, documents=documents)
    with pytest.raises(EvaluationError, match=re.escape(f"2 processes: {reason}")):
        doctor._launch(plan, 2, torch.device("cpu"), lambda *_: None)
