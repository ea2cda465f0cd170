"""The lmms-eval model: names, variants, prompts, failures. Starting lmms-eval is slow, so most tests are marked so."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from PIL import ImageFile

from prebench.errors import EvaluationError, ModelError
from prebench.evaluation import scores
from tests.evaluation import odd_images
from tests.evaluation.mirror import NUM_IMAGES, QUESTIONS, write_mirror

NAMES = ("prebench", "prebench_baseline", "prebench_pre")


@pytest.fixture(scope="module")
def task(tmp_path_factory: pytest.TempPathFactory):
    """The easy-VQA task, loaded by lmms-eval from a tiny mirror."""
    from prebench.evaluation.harness import LoadedTask
    from prebench.evaluation.request import find_task

    mirror = write_mirror(tmp_path_factory.mktemp("mirror"))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(mirror)
        patch.setenv("LMMS_EVAL_DATASETS_CACHE", str(mirror / "cache"))
        return LoadedTask(find_task("prebench_easy_vqa"))


@pytest.fixture
def model(tiny_export: Path, task):
    from prebench.evaluation.adapter import PrebenchPre

    model = PrebenchPre(str(tiny_export), device="cpu", dtype="float32", batch_size=7)
    model.task_dict[task.name] = task.task.dataset
    return model


@pytest.mark.slow
def test_all_names_resolve_to_chat_models() -> None:
    from lmms_eval.models import get_model

    classes = [get_model(name) for name in NAMES]
    assert [cls.variant for cls in classes] == [None, "baseline", "pre"]
    assert not any(cls.is_simple for cls in classes)


@pytest.mark.slow
def test_prompts_agree_across_names(tmp_path, monkeypatch) -> None:
    """A task may give a model name a prompt of its own; ours must not differ."""
    from lmms_eval.tasks import TaskManager, get_task_dict

    from prebench.evaluation.request import find_task

    monkeypatch.chdir(write_mirror(tmp_path / "mirror"))
    monkeypatch.setenv("LMMS_EVAL_DATASETS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    for name in ("gqa", "prebench_easy_vqa"):
        folder = str(find_task(name).yaml_path.parent)
        seen = []
        for model_name in NAMES:
            manager = TaskManager("ERROR", folder, include_defaults=False, model_name=model_name)
            loaded = get_task_dict([name], manager, task_type="chat")[name]
            messages = [loaded.doc_to_messages(document)[0]["content"] for document in loaded.eval_docs]
            seen.append([(image["url"].tobytes(), text["text"]) for image, text in messages])
        assert len(seen[0]) == NUM_IMAGES * len(QUESTIONS) and seen[0] == seen[1] == seen[2]


@pytest.mark.slow
def test_answers_come_in_the_order_of_the_requests(model, task) -> None:
    instances = list(task.instances().values())
    answers = model.generate_until(instances)
    assert answers == list(reversed(model.generate_until(instances[::-1])))
    assert len(answers) == NUM_IMAGES * len(QUESTIONS)
    assert len(set(answers)) > 1


@pytest.mark.slow
def test_a_failed_document_raises_instead_of_an_empty_answer(model, task) -> None:
    instances = list(task.instances().values())
    instances[5].arguments = (*instances[5].args[:1], _broken, *instances[5].args[2:])
    with pytest.raises(EvaluationError, match=r"1 of 24 documents failed \(prebench_easy_vqa document 5: OSError: cut"):
        model.generate_until(instances)


def _broken(_document: dict) -> list[dict]:
    raise OSError("cut off")


@pytest.mark.slow
def test_under_the_lmms_eval_command_a_failure_ends_the_process(model, task, tiny_export: Path, capfd) -> None:
    """The command's own function prints every exception and goes on to exit with 0."""
    from prebench.evaluation.adapter import PrebenchBaseline

    instances = list(task.instances().values())
    instances[5].arguments = (*instances[5].args[:1], _broken, *instances[5].args[2:])

    def cli_evaluate(what: Callable[[], object]) -> None:
        with pytest.raises(SystemExit) as ended:
            what()
        assert ended.value.code == 2

    cli_evaluate(lambda: model.generate_until(instances))
    assert "prebench: 1 of 24 documents failed (prebench_easy_vqa document 5: OSError: cut" in capfd.readouterr().err
    cli_evaluate(lambda: PrebenchBaseline(str(tiny_export)))
    assert "variant 'pre'" in capfd.readouterr().err


@pytest.mark.slow
def test_a_truncated_picture_fails_although_lmms_eval_would_fill_it_up(model, task, monkeypatch) -> None:
    content = odd_images.failing()["truncated"][0]

    def truncated(_document: dict) -> list[dict]:
        image = {"type": "image", "url": odd_images.opened(content)}
        return [{"role": "user", "content": [image, {"type": "text", "text": "what?"}]}]

    monkeypatch.setattr("PIL.ImageFile.LOAD_TRUNCATED_IMAGES", True)
    (instance, *_) = task.instances().values()
    instance.arguments = (*instance.args[:1], truncated, *instance.args[2:])
    with pytest.raises(EvaluationError, match="image file is truncated"):
        model.generate_until([instance])
    assert ImageFile.LOAD_TRUNCATED_IMAGES


@pytest.mark.slow
def test_copies_that_fill_up_a_share_change_nothing(model, task) -> None:
    """lmms-eval repeats the last request of a process that has fewer documents than another."""
    instances = list(task.instances().values())[:5]
    answers = model.generate_until(instances)
    assert model.generate_until([*instances, copy.copy(instances[-1])]) == [*answers, answers[-1]]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("asked", "own", "expected"),
    [("auto", "cuda:1", "cuda:1"), ("cuda", "cuda:1", "cuda:1"), ("auto", "cpu:0", "cpu"), ("cpu", "cuda:1", "cpu")],
)
def test_each_process_takes_its_own_device(model, monkeypatch, asked: str, own: str, expected: str) -> None:
    from prebench.evaluation import adapter

    monkeypatch.setenv("WORLD_SIZE", "2")
    seen = SimpleNamespace(num_processes=2, process_index=1, device=torch.device(own))
    monkeypatch.setattr(adapter, "Accelerator", lambda: seen)
    assert model._join_processes(asked) == expected
    assert (model.rank, model.world_size, model.accelerator) == (1, 2, seen)
    seen.num_processes = 1
    with pytest.raises(ModelError, match="2 processes were started, but accelerate sees 1"):
        model._join_processes(asked)


@pytest.mark.slow
def test_unsupported_requests_are_refused(model, task) -> None:
    (instance, *_) = task.instances().values()
    instance.args[2].update(num_beams=3)
    with pytest.raises(EvaluationError, match="prebench_easy_vqa: asks for beam search"):
        model.generate_until([instance])
    with pytest.raises(EvaluationError, match="log-likelihood"):
        model.loglikelihood([])
    with pytest.raises(EvaluationError, match="multi-round"):
        model.generate_until_multi_round([])


@pytest.mark.slow
def test_another_variant_or_argument_is_refused(tiny_export: Path, tmp_path: Path) -> None:
    from prebench.evaluation.adapter import Prebench, PrebenchBaseline

    with pytest.raises(ModelError, match="variant 'pre', but --model prebench_baseline"):
        PrebenchBaseline(str(tiny_export))
    with pytest.raises(ModelError, match=r"no prebench\.json"):
        PrebenchBaseline(str(tmp_path))
    with pytest.raises(ModelError, match="unknown colour"):
        Prebench(str(tiny_export), colour="red")


def test_documents_of_one_image_come_together() -> None:
    documents = _Columns({"imageId": ["b", "a", "b", "c", "a"]})
    assert scores.by_image("gqa", documents) == [0, 2, 1, 4, 3]
    assert scores.image_ids("unknown", documents) == ["0", "1", "2", "3", "4"]
    mmbench = _Columns({"index": [7, 1_000_007, 8]})
    assert scores.question_ids("mmbench_en_dev_static", mmbench) == ["7", "7", "8"]


class _Columns(dict):
    @property
    def column_names(self) -> list[str]:
        return list(self)

    def __len__(self) -> int:
        return len(next(iter(self.values())))


def _score(task: str, metric: str, result: dict) -> float | str:
    return scores.document_scores(task, metric, ["7"], {0: result})[0]


def test_document_scores() -> None:
    assert _score("gqa", "exact_match", {"exact_match": True}) == 1.0
    assert _score("vqav2_val", "exact_match", {"exact_match": 0.6}) == 0.6
    assert _score("pope", "pope_accuracy", {"pope_accuracy": {"score": 1.0}}) == 1.0
    with pytest.raises(EvaluationError, match="no metric 'acc'; it returned exact_match"):
        _score("gqa", "acc", {"exact_match": 1})
    with pytest.raises(EvaluationError, match="'pope_accuracy' gives str, no score per document"):
        _score("pope", "pope_accuracy", {"pope_accuracy": "yes"})
    with pytest.raises(EvaluationError, match="take 'mmbench_en_dev_static'"):
        scores.require_judge_free("mmbench_en_dev")


@pytest.mark.slow
def test_mmbench_rows_are_judged_by_upstreams_rules_and_never_at_random() -> None:
    item = {"index": 3, "question": "q", "answer": "B", "A": "cat", "B": "dog", "C": "fox", "D": "nan"}
    for prediction, expected in {"B": 1.0, "B. dog": 1.0, "A": 0.0, "a dog": 1.0, "no idea": 0.0, "": 0.0}.items():
        result = {"gpt_eval_score": item | {"prediction": prediction}}
        assert _score("mmbench_en_dev_static", "gpt_eval_score", result) == expected, prediction


def test_one_failed_document_fails_alone_outside_mmbench() -> None:
    results = {0: {"exact_match": 1.0}, 1: "cut off", 2: {"exact_match": 0.0}}
    assert scores.document_scores("gqa", "exact_match", ["a", "a", "a"], results) == {0: 1.0, 1: "cut off", 2: 0.0}


def test_fields_of_documents() -> None:
    document = {"types": {"structural": "verify"}, "answers": [{"answer": "x"}], "multiple_choice_answer": "red"}
    assert scores.category("gqa", document) == "verify"
    assert scores.category("unknown", document) == ""
    assert scores.target("vqav2_val", document, lambda _: "answer") == "red"
    assert json.loads(scores.target("unknown", document, lambda _: ["a", "b"])) == ["a", "b"]
