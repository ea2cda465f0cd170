"""MMBench's CircularEval through upstream's own task code: a question counts only if all its rotations are right."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path

import pytest

from prebench.data.mirror import build_mirror
from prebench.errors import EvaluationError, StoreError
from prebench.evaluation.engine import Answer, GenerationRequest
from prebench.evaluation.request import EvaluationRequest, RunRequest, find_task
from prebench.records import SampleRecord, TaskRecord
from prebench.schema import SuiteConfig, TaskConfig
from prebench.store import read_jsonl

MMBENCH = "mmbench_en_dev_static"
QUESTIONS, OPTIONS = 6, 4
CONFIGS = {
    name: TaskConfig(
        task=name,
        label=f"{name} label",
        data_source=source,
        primary_metric=metric,
        num_images=QUESTIONS,
        questions_per_image=6,
    )
    for name, source, metric in (
        ("gqa", "generated", "exact_match"),
        ("vqav2_val", "generated", "exact_match"),
        ("pope", "generated", "pope_accuracy"),
        (MMBENCH, "generated", "gpt_eval_score"),
        ("prebench_easy_vqa", "real", "exact_match"),
    )
}

Reply = Callable[[int, dict], str | None]


class Replies:
    """An engine that answers document by document as it is told; None is a failure."""

    def __init__(self, documents, reply: Reply) -> None:
        self.documents, self.reply = documents, reply

    def generate(self, requests, known=None) -> Iterator[Answer]:
        for request in requests:
            assert isinstance(request, GenerationRequest) and isinstance(request.key, int)
            text = self.reply(request.key, self.documents[request.key])
            yield Answer(request.key, text, "OSError: cut off" if text is None else None, f"p{request.key}", "i")


@pytest.fixture(scope="module")
def mirror(tmp_path_factory) -> tuple[Path, dict]:
    tasks = [config.model_dump() for config in CONFIGS.values()]
    suite = SuiteConfig.model_validate({"name": "test", "defaults": {"preset": "embedded"}, "tasks": tasks})
    folder = tmp_path_factory.mktemp("mirror") / "mirror"
    return folder, build_mirror(folder, suite)


@pytest.fixture(scope="module")
def load(mirror, tmp_path_factory):
    """Return a function that loads a task from the mirror, each once."""
    from prebench.evaluation.harness import LoadedTask

    folder = tmp_path_factory.mktemp("cache")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(mirror[0])
        patch.setenv("LMMS_EVAL_DATASETS_CACHE", str(folder))
        patch.setattr("datasets.config.HF_DATASETS_CACHE", folder)
        patch.setattr("datasets.config.HF_HUB_OFFLINE", True)
        yield cache(lambda name: LoadedTask(find_task(name)))


def evaluate(loaded, folder: Path, reply: Reply, share: float = 1.0) -> tuple[TaskRecord, list[SampleRecord]]:
    from prebench.evaluation.harness import evaluate_task

    config = CONFIGS[loaded.name]
    run = RunRequest(variant="pre", seed=0, model_dir=folder, run_dir=folder / "pre-s0")
    request = EvaluationRequest(runs=(run,), tasks=(config,), max_error_share=share)
    engine = Replies(loaded.bare, reply)
    record = evaluate_task(engine, loaded, run, config, request, {}, lambda *_: None)
    path = run.run_dir / "eval" / f"{loaded.name}.samples.jsonl"
    return record, [SampleRecord(**values) for values in read_jsonl(path)]


def wrong(letter: str) -> str:
    return "B" if letter == "A" else "A"


@pytest.mark.slow
def test_a_question_counts_only_with_all_rotations_right(load, tmp_path) -> None:
    """Question q is right in its first q rotations (letters, words and phrases), questions 4 and 5 in all."""

    def reply(_doc_id: int, row: dict) -> str:
        shift, question = divmod(int(row["index"]), 1_000_000)
        forms = (row["answer"], f"{row['answer']}. {row[row['answer']]}", row[row["answer"]], f"({row['answer']})")
        return forms[shift] if shift < question else wrong(row["answer"])

    record, samples = evaluate(load(MMBENCH), tmp_path, reply)
    by_question = {str(q): 1.0 if q >= OPTIONS else 0.0 for q in range(QUESTIONS)}
    assert [sample.score for sample in samples] == [by_question[question] for question in load(MMBENCH).question_ids]
    assert [sample.counts for sample in samples] == ([True] + [False] * (OPTIONS - 1)) * QUESTIONS
    assert len({sample.image_id for sample in samples}) == QUESTIONS  # the rotations share a picture
    assert (record.n, record.n_errors, len(samples)) == (QUESTIONS * OPTIONS, 0, QUESTIONS * OPTIONS)
    assert record.score == pytest.approx(2 / 6)
    assert 100 * record.score == pytest.approx(record.metrics["gpt_eval_score"])


@pytest.mark.slow
@pytest.mark.parametrize("letter", ["A", "no idea", ""])
def test_one_answer_to_everything_scores_as_upstream_says(load, tmp_path, letter: str) -> None:
    record, _ = evaluate(load(MMBENCH), tmp_path, lambda *_: letter)
    assert record.score == record.metrics["gpt_eval_score"] == 0


@pytest.mark.slow
@pytest.mark.parametrize("shift", [0, 2])
def test_a_failed_rotation_fails_its_question(load, tmp_path, shift: int) -> None:
    """Upstream would judge question 1 by what is left, or not at all where its first row is the one that failed."""

    def reply(_doc_id: int, row: dict) -> str | None:
        if int(row["index"]) == 1 + shift * 1_000_000:
            return None
        return row["answer"] if int(row["index"]) % 1_000_000 < 3 else wrong(row["answer"])

    record, samples = evaluate(load(MMBENCH), tmp_path, reply)
    failed = [sample for sample in samples if load(MMBENCH).question_ids[sample.doc_id] == "1"]
    assert len(failed) == record.n_errors == OPTIONS
    assert all(sample.score is None and sample.error for sample in failed)
    errors = [sample.error for sample in failed]
    number = failed[shift].doc_id
    assert errors.pop(shift) == "OSError: cut off"
    assert set(errors) == {f"another document of this question failed (document {number})"}
    assert [sample.response is None for sample in failed] == [position == shift for position in range(OPTIONS)]
    assert record.score == pytest.approx(2 / 5)
    assert 100 * record.score == pytest.approx(record.metrics["gpt_eval_score"])
    with pytest.raises(EvaluationError, match=r"4 of 24 documents failed, more than 10.0%"):
        evaluate(load(MMBENCH), tmp_path / "strict", reply, share=0.1)


@pytest.mark.slow
@pytest.mark.parametrize("task", list(CONFIGS))
def test_samples_carry_type_and_blind_score_of_their_document(load, mirror, tmp_path, task: str) -> None:
    loaded = load(task)
    targets = {d: str(loaded.bare[d].get("multiple_choice_answer", loaded.bare[d].get("answer"))) for d in
               range(len(loaded.bare))}  # fmt: skip
    record, samples = evaluate(loaded, tmp_path, lambda doc_id, _: targets[doc_id])
    assert record.score == 1.0 and record.n_errors == 0
    blind = [sample.blind_score for sample in samples]
    assert sum(blind) / len(blind) == pytest.approx(mirror[1]["tasks"][task]["references"]["blind"])
    words = {"color": "color", "shape": "shape", "count": "how many objects", "position": "where is"}
    for sample in samples:
        assert sample.question_type
        assert words.get(sample.question_type, "") in sample.question.split("\n")[0], sample


@pytest.mark.slow
def test_a_question_that_the_task_cannot_put_fails_alone(load, tiny_export, tmp_path, monkeypatch) -> None:
    from prebench.evaluation.engine import Engine
    from prebench.evaluation.harness import evaluate_task

    loaded = load("gqa")
    put = loaded.task.doc_to_text

    def broken(document: dict) -> str:
        return document["no such field"] if document["id"] == loaded.bare[3]["id"] else put(document)

    monkeypatch.setattr(loaded.task, "doc_to_text", broken)
    run = RunRequest(variant="pre", seed=0, model_dir=tiny_export, run_dir=tmp_path / "pre-s0")
    request = EvaluationRequest(runs=(run,), tasks=(CONFIGS["gqa"],), max_error_share=1.0)
    engine = Engine(tiny_export, device="cpu", dtype="float32")
    record = evaluate_task(engine, loaded, run, CONFIGS["gqa"], request, {}, lambda *_: None)
    assert record.n == len(loaded.bare) and record.n_errors == 1
    samples = [SampleRecord(**v) for v in read_jsonl(run.run_dir / "eval" / "gqa.samples.jsonl")]
    (failed,) = [sample for sample in samples if sample.error]
    assert failed.doc_id == 3 and "no such field" in str(failed.error)


@pytest.mark.slow
def test_a_data_set_without_the_file_has_the_defaults(load, mirror, tmp_path) -> None:
    from prebench.evaluation.harness import LoadedTask

    path = mirror[0] / "lmms-lab-encoder" / "POPE" / "pope.documents.jsonl"
    content = path.read_text()
    load("pope")
    try:
        path.unlink()
        _, samples = evaluate(LoadedTask(find_task("pope")), tmp_path, lambda *_: "yes")
        assert all(sample.question_type == "" and sample.blind_score is None for sample in samples)
        path.write_text("".join(content.splitlines(keepends=True)[:-1]))
        with pytest.raises(StoreError, match=r"pope\.documents\.jsonl: \d+ documents, but the task has \d+"):
            LoadedTask(find_task("pope"))
        path.write_text(json.dumps({"doc_id": 0}) + "\n")
        with pytest.raises(StoreError, match=r"pope\.documents\.jsonl: .*'question_type' is missing"):
            LoadedTask(find_task("pope"))
    finally:
        path.write_text(content)
