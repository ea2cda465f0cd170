"""Every benchmark of the suite `paper` through upstream's own YAML and code, on small mirrors in upstream's schemas."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import random
import socket
import statistics
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from prebench.analysis.compare import compare
from prebench.analysis.join import load_study
from prebench.analysis.plots import write_figures
from prebench.analysis.render import render
from prebench.analysis.tables import write_tables
from prebench.config import dump_yaml, load_suite
from prebench.errors import EvaluationError
from prebench.evaluation.protocols import PAPER, PROTOCOLS, UPSTREAM
from prebench.evaluation.request import EvaluationRequest, RunRequest, find_task
from prebench.records import SampleRecord, TaskRecord
from prebench.schema import TaskConfig
from prebench.store import read_jsonl, write_text
from tests.analysis.conftest import study_config
from tests.evaluation.paper_mirror import CLUSTERS, REPLIES, UNPARSED, write_paper_mirror
from tests.evaluation.test_circular import Replies

CONFIGS = {task.task: task for task in load_suite("paper").tasks}


def test_the_suite_names_the_declared_benchmarks() -> None:
    assert tuple(CONFIGS) == PAPER == tuple(REPLIES) == tuple(CLUSTERS)
    for name, config in CONFIGS.items():
        protocol = PROTOCOLS[name]
        assert config.primary_metric == protocol.metric
        assert config.label.startswith(protocol.benchmark)
        assert config.data_source == "real" and config.num_images is None
        assert protocol.difference and protocol.parser


def test_the_protocols_were_seen_with_the_installed_version() -> None:
    assert importlib.metadata.version("lmms_eval") == UPSTREAM, "hold the protocols against the new version"


def test_the_page_on_benchmarks_shows_the_protocols() -> None:
    docs = Path(__file__).parents[2] / "docs"
    spec = importlib.util.spec_from_file_location("benchmarks", docs / "benchmarks.py")
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    assert script.block() in (docs / "benchmarks.md").read_text(encoding="utf-8"), "run `python docs/benchmarks.py`"


@pytest.fixture(scope="module")
def load(tmp_path_factory: pytest.TempPathFactory):
    """Return a function that loads a task from the mirror, each once; nothing may open a connection."""
    from prebench.evaluation.harness import LoadedTask

    mirror = write_paper_mirror(tmp_path_factory.mktemp("paper"))
    connect = socket.socket.connect

    def local_only(self: socket.socket, address: Any) -> None:
        assert self.family == socket.AF_UNIX, f"a connection to {address} was opened"
        connect(self, address)

    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(mirror)
        patch.setenv("LMMS_EVAL_DATASETS_CACHE", str(mirror / "cache"))
        patch.setattr("datasets.config.HF_DATASETS_CACHE", mirror / "cache")
        patch.setattr("datasets.config.HF_HUB_OFFLINE", True)
        patch.setattr(socket.socket, "connect", local_only)
        yield cache(lambda name: LoadedTask(find_task(name)))


def evaluate(
    loaded: Any, engine: Any, folder: Path, config: TaskConfig | None = None, variant: str = "pre", seed: int = 0
) -> tuple[TaskRecord, list[SampleRecord]]:
    from prebench.evaluation.harness import evaluate_task

    config = config or CONFIGS[loaded.name]
    run = RunRequest(variant=variant, seed=seed, model_dir=folder, run_dir=folder / f"{variant}-s{seed}")
    request = EvaluationRequest(runs=(run,), tasks=(config,), max_error_share=1.0)
    record = evaluate_task(engine, loaded, run, config, request, {}, lambda *_: None)
    path = run.run_dir / "eval" / f"{loaded.name}.samples.jsonl"
    return record, [SampleRecord(**values) for values in read_jsonl(path)]


def replying(loaded: Any, texts: Sequence[str | None]) -> Replies:
    return Replies(loaded.bare, lambda doc_id, _: texts[doc_id])


def upstream_aggregate(name: str, texts: Sequence[str]) -> float:
    """Return what lmms-eval's evaluator makes of answers: its filters, its scores and its aggregation, untouched."""
    from types import SimpleNamespace

    from prebench.evaluation.harness import LoadedTask

    task = LoadedTask(find_task(name)).task
    task.set_config(key="num_fewshot", value=0)
    task.build_all_requests()
    for instance in task.instances:
        instance.resps = [texts[instance.doc_id]]
    task.apply_filters()
    results = [
        task.process_results(task.eval_docs_no_media[instance.doc_id], list(instance.filtered_resps.values()))
        for instance in task.instances
    ]
    metric = PROTOCOLS[name].metric
    values = [result[metric] for result in results]
    function = task.aggregation()[metric]
    if name in ("ocrbench", "mmbench_en_dev_static"):
        return float(function(values, args=SimpleNamespace(output_path="out")))
    return float(function(values))


def _mean(samples: Sequence[SampleRecord]) -> float:
    return statistics.fmean(sample.score for sample in samples if sample.counts)


def _mean_of_means(samples: Sequence[SampleRecord]) -> float:
    by_category = defaultdict(list)
    for sample in samples:
        by_category[sample.category].append(sample)
    return statistics.fmean(map(_mean, by_category.values()))


FROM_SCORES: dict[str, Callable[[Sequence[SampleRecord]], float]] = {
    "mean": _mean,
    "mean over pairs": _mean,
    "100 x mean over questions": lambda samples: 100 * _mean(samples),
    "sum / 1000": lambda samples: sum(sample.score for sample in samples) / 1000,
    "mean of the means by category": _mean_of_means,
}
"""Upstream's aggregate from the documents' scores, as a protocol states it."""


@pytest.fixture(scope="module")
def engine(tiny_export: Path):
    """The real engine with a random model, which seldom ends an answer by itself: a few tokens are enough."""
    from prebench.evaluation.engine import Engine

    class Brief(Engine):
        def generate(self, requests, known=None):
            return super().generate((replace(request, max_new_tokens=6) for request in requests), known)

    return Brief(tiny_export, device="cpu", dtype="float32")


@pytest.mark.slow
@pytest.mark.parametrize("name", PAPER)
def test_a_model_is_evaluated_through_upstreams_code(load, engine, tmp_path: Path, name: str) -> None:
    loaded = load(name)
    record, samples = evaluate(loaded, engine, tmp_path)
    assert record.n == len(samples) == len(REPLIES[name]) and record.n_errors == 0, samples
    assert record.score == pytest.approx(_mean(samples)) and loaded.protocol.metric in record.metrics
    places: dict[str, int] = {}
    assert [places.setdefault(sample.image_id, len(places)) for sample in samples] == CLUSTERS[name]
    assert all(sample.question and sample.target and sample.image_hash for sample in samples)
    assert bool(samples[0].category) == bool(loaded.protocol.category)
    _, again = evaluate(loaded, engine, tmp_path / "again")
    assert again == samples  # nothing is kept from one model to the next


@pytest.mark.slow
@pytest.mark.parametrize("name", PAPER)
def test_the_declaration_says_what_upstreams_files_say(load, name: str) -> None:
    loaded, protocol = load(name), PROTOCOLS[name]
    config = loaded.task.config
    assert (config.dataset_path, config.test_split) == (protocol.data_set, protocol.split)
    assert protocol.metric in loaded.task.aggregation()
    assert "prebench" not in config.lmms_eval_specific_kwargs  # so the block `default` is used
    texts = {instance.args[0] for instance in loaded.instances().values()}
    for text in texts:
        assert any(text.endswith(f"\n{instruction}") for instruction in protocol.prompt) or not protocol.prompt, text
    used = loaded.task.lmms_eval_specific_kwargs
    assert used.get("ocr") == protocol.ocr_tokens
    assert not any("OCR" in text for text in texts)


@pytest.mark.slow
@pytest.mark.parametrize("name", PAPER)
def test_scores_are_right_and_give_upstreams_aggregate(load, tmp_path: Path, name: str) -> None:
    texts = [text for text, _ in REPLIES[name]]
    random.seed(1)
    state = random.getstate()
    loaded = load(name)
    record, samples = evaluate(loaded, replying(loaded, texts), tmp_path)
    if name != "mmbench_en_dev_static":  # its aggregation seeds the generator, and draws nothing
        assert random.getstate() == state
    assert [sample.score for sample in samples] == pytest.approx([score for _, score in REPLIES[name]])
    assert 0 < record.score < 1 and record.score == pytest.approx(_mean(samples))
    aggregate = record.metrics[loaded.protocol.metric]
    assert FROM_SCORES[loaded.protocol.aggregate](samples) == pytest.approx(aggregate, abs=1e-5)
    if name == "mmmu_val":  # upstream draws a letter where it finds none: without the draw that is a wrong one
        texts = ["A" if i == 2 else "B" if i in UNPARSED[name] else text for i, text in enumerate(texts)]
    assert upstream_aggregate(name, texts) == pytest.approx(aggregate, abs=1e-12)
    assert [sample.doc_id for sample in samples if sample.unparsed] == UNPARSED.get(name, [])
    assert record.metrics.get("unparsed", 0) == len(UNPARSED.get(name, [])) / len(samples)


@pytest.mark.slow
def test_no_letter_is_drawn_where_upstream_would(load, tmp_path: Path) -> None:
    loaded = load("mmmu_val")
    draws = {upstream_aggregate("mmmu_val", ["no idea"] * len(REPLIES["mmmu_val"])) for _ in range(12)}
    assert len(draws) > 1, "upstream no longer draws: the work-around can go"
    record, samples = evaluate(loaded, replying(loaded, ["no idea"] * len(loaded.bare)), tmp_path)
    assert record.score == record.metrics["mmmu_acc"] == 0
    assert [sample.unparsed for sample in samples] == [True] * 3 + [False] * 2 + [True] * 2  # two are open questions


@pytest.mark.slow
def test_a_task_that_draws_answers_is_an_error(load, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As another task than mmmu_val with the same parser would be: a sampled answer is none of the model's."""
    from contextlib import nullcontext

    loaded = load("mmmu_val")
    monkeypatch.setattr(loaded, "protocol", PROTOCOLS["gqa"].__class__("mmmu_other", scoring=nullcontext))
    state = random.getstate()
    results = loaded.results(loaded.instances(), {0: "no idea", 1: "A"})
    assert results[0] == "scoring failed: the task draws the answer at random where it can't read one"
    assert isinstance(results[1], dict) and random.getstate() == state


@pytest.mark.slow
def test_ocrbench_counts_from_zero_for_every_model(load, tmp_path: Path) -> None:
    loaded = load("ocrbench")
    results = list(loaded.results(loaded.instances(), {0: "centre", 1: "fresh"}).values())
    function = loaded.task.aggregation()["ocrbench_accuracy"]
    from types import SimpleNamespace

    entries = [result["ocrbench_accuracy"] for result in results]
    output = SimpleNamespace(output_path=str(tmp_path))
    alone = [function(entries, args=output) for _ in range(2)]
    assert alone[1] > alone[0], "upstream no longer adds up: the work-around can go"
    assert [loaded.aggregate(results, tmp_path)["ocrbench_accuracy"] for _ in range(2)] == [0.002, 0.002]


@pytest.mark.slow
def test_annotators_without_ids_agree_with_each_other(load, monkeypatch: pytest.MonkeyPatch) -> None:
    from lmms_eval.tasks.vqav2.utils import vqav2_process_results_val

    loaded = load("vqav2_val")
    without = loaded.bare.map(lambda row: {"answers": [{**a, "answer_id": None} for a in row["answers"]]})
    assert vqav2_process_results_val(without[0], ["red"])["exact_match"] == 0, "upstream no longer gives 0"
    expected = loaded.results(loaded.instances(), {0: "red", 1: "3"})
    monkeypatch.setattr(loaded, "bare", without)
    assert loaded.results(loaded.instances(), {0: "red", 1: "3"}) == expected
    assert expected[0]["exact_match"] == 1.0 and expected[1]["exact_match"] == pytest.approx(0.6)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["vqav2_val", "textvqa_val"])
def test_a_document_without_annotators_is_an_error(load, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    loaded = load(name)
    monkeypatch.setattr(loaded, "bare", loaded.bare.map(lambda row, i: {"answers": row["answers"][: 10 * i]}, True))
    results = loaded.results(loaded.instances(), {0: "red", 1: "3"})
    assert results[0] == "scoring failed: ValueError: the data set holds no reference answers for this document"
    assert isinstance(results[1], dict)


@pytest.mark.slow
def test_one_failed_document_fails_its_pair(load, tmp_path: Path) -> None:
    loaded = load("mmvp")
    texts = [text for text, _ in REPLIES["mmvp"]]
    texts[7] = None
    record, samples = evaluate(loaded, replying(loaded, texts), tmp_path)
    assert record.n_errors == 2 and samples[6].error == "another document of this question failed (document 7)"
    assert record.score == pytest.approx(record.metrics["mmvp_pair_accuracy"]) == pytest.approx(1 / 3)
    with pytest.raises(EvaluationError, match="'mmvp': take primary_metric: mmvp_pair_accuracy; 'mmvp_accuracy' does"):
        other = CONFIGS["mmvp"].model_copy(update={"primary_metric": "mmvp_accuracy"})
        evaluate(loaded, replying(loaded, texts), tmp_path, other)


@pytest.mark.slow
def test_a_failed_document_shifts_no_answer_in_a_filter(load, tmp_path: Path) -> None:
    """AI2D's filter walks through the documents beside the answers."""
    loaded = load("ai2d")
    texts = [text for text, _ in REPLIES["ai2d"]]
    record, samples = evaluate(loaded, replying(loaded, [None, *texts[1:]]), tmp_path)
    assert [sample.score for sample in samples] == [None, 1.0, 0.0, 1.0, 0.0] and record.n_errors == 1


def test_a_pair_of_one_document_is_an_error() -> None:
    from prebench.evaluation.scores import document_scores

    results = {d: {"mmvp_pair_accuracy": {"is_correct": True}} for d in range(3)}
    scores = document_scores("mmvp", "mmvp_pair_accuracy", ["0", "0", "1"], results)
    assert scores == {0: 1.0, 1: 1.0, 2: "the question is incomplete in the data set"}


@pytest.mark.slow
def test_tables_and_comparison_take_every_benchmark(load, tmp_path: Path) -> None:
    """The baseline answers nothing, the variant what `REPLIES` says (its seeds differ in one answer)."""
    suite = load_suite("paper").model_copy(update={"probe": None})
    config = study_config(["baseline", "pre"], [0, 1, 2], probe=False).model_copy(update={"suite": suite})
    write_text(tmp_path / "study.yaml", dump_yaml(config))
    for name in PAPER:
        right = [text for text, _ in REPLIES[name]]
        for seed in config.seeds:
            for variant, texts in (("baseline", ["zzz"] * len(right)), ("pre", [*right[: len(right) - seed], *"zz"])):
                evaluate(load(name), replying(load(name), texts), tmp_path / "runs", None, variant, seed)
    study = load_study(tmp_path)
    assert all(path.is_file() for path in [*write_tables(study), *write_figures(study)])
    main = pd.read_csv(tmp_path / "tables" / "main.csv").set_index("variant")
    assert [name for name in main.columns if not name.endswith(" ±")][2:] == [task.label for task in suite.tasks]
    found = compare(study, "baseline", "pre")
    assert [row.task for row in found.tasks] == list(PAPER)
    counted = {row.task: (row.n_documents, row.n_images) for row in found.tasks}
    assert counted["mmbench_en_dev_static"] == (3, 2) and counted["mmvp"] == (4, 4) and counted["pope"] == (6, 2)
    for row in found.tasks:
        assert row.score_a == 0 and row.difference == pytest.approx(main.loc["pre", row.label], abs=1e-6)
    for form in ("text", "csv", "latex", "json"):
        assert "MMVP" in render(found, form) and "generated" not in render(found, form)


@pytest.mark.parametrize("task", ["mmbench_en_dev", "mmmu_val_reasoning", "ai2d_reasoning"])
def test_tasks_that_ask_a_judge_are_refused(task: str) -> None:
    from prebench.evaluation.scores import require_judge_free

    with pytest.raises(EvaluationError, match="asks a paid API to judge answers; take '"):
        require_judge_free(task)


@pytest.mark.slow
def test_a_data_set_without_its_column_is_refused(load) -> None:
    from prebench.evaluation import scores

    for name, column in (("mmvp", "Index"), ("pope", "image_source")):
        documents = load(name).documents.remove_columns(column)
        with pytest.raises(EvaluationError, match=f"{name}.* has no column '{column}'.*; it has "):
            scores.image_ids(name, documents)
