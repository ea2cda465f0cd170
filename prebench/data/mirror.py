"""The local mirror: a folder in which `datasets` finds a suite's data sets under their names on the Hub.

`datasets.load_dataset("lmms-lab-encoder/GQA")` reads the folder of that name in the working directory, where there is
one; its configs stand in the README's front matter, as on the Hub. So upstream tasks run unmodified and offline.
"""

from __future__ import annotations

import importlib.metadata
import shutil
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import yaml

from prebench.data import easy_vqa, upstream
from prebench.data.questions import Question, ask
from prebench.data.references import TextPrior
from prebench.errors import ConfigError, DataError, StoreError, did_you_mean
from prebench.records import DocumentRecord, content_hash, documents_file
from prebench.runtime import file_hash
from prebench.schema import SuiteConfig, TaskConfig
from prebench.store import read_json, write_json, write_jsonl

MANIFEST = "mirror.json"
FORMAT = 2
"""Raised with every change of what the same request yields."""
PRIOR_SCENES = 2000
"""Training scenes whose questions give the scores without a picture."""
PRIOR_QUESTIONS = 8
"""Questions per training scene for those scores."""

Builder = Callable[[TaskConfig, int], upstream.Benchmark]

BUILDERS: dict[str, Builder] = {
    "gqa": upstream.gqa,
    "vqav2_val": upstream.vqav2,
    "pope": upstream.pope,
    "mmbench_en_dev_static": upstream.mmbench,
    "prebench_easy_vqa": upstream.easy_vqa_test,
}


def build_mirror(folder: Path, suite: SuiteConfig) -> dict[str, Any]:
    """Write the data sets of a suite, or leave a mirror that holds them already.

    Built beside `folder` and then renamed, so that a reader never sees a part. A mirror of another request is replaced.

    Args:
        folder: the mirror; the working directory of an evaluation.
        suite: its tasks, sizes and seed.

    Returns:
        The content of mirror.json: `tasks` maps each task to `repo`, `files` (hash by relative path), `data_source`,
        `num_docs` and `references` (fractions `majority` and `blind`; none for the probe). Beside each task's data lies
        `documents_file(task)`: a `DocumentRecord` per document.

    Raises:
        ConfigError: a task has no embedded data, asks for more pictures than there are, or claims another source.
        DataError: a file of the mirror is missing or damaged, easy-VQA is, or the folder can't be written.
    """
    check_suite(suite)
    request = request_hash(suite)
    if (folder / MANIFEST).exists():
        manifest = _read_manifest(folder)
        if manifest["request"] == request:
            verify(folder, manifest)
            return manifest
    elif folder.exists() and any(folder.iterdir()):
        raise DataError(f"{folder}: not empty and without {MANIFEST}; delete it or name another folder")
    partial = folder.with_name(f".{folder.name}.partial")
    try:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        manifest = {"format": FORMAT, "request": request, "tasks": _write_tasks(partial, suite)}
        write_json(partial / MANIFEST, manifest)
        if folder.exists():
            shutil.rmtree(folder)
        partial.rename(folder)
    except (OSError, StoreError) as error:
        shutil.rmtree(partial, ignore_errors=True)
        reason = getattr(error, "strerror", None) or error
        raise DataError(
            f"{folder}: the mirror can't be written ({reason}); make room or choose another folder"
        ) from error
    return manifest


def verify(folder: Path, manifest: dict[str, Any]) -> None:
    """Check every file of a mirror against its manifest.

    Raises:
        DataError: a file is missing or its content has changed.
    """
    for entry in manifest["tasks"].values():
        for name, expected in entry["files"].items():
            path = folder / name
            try:
                found = file_hash(path)
            except OSError as error:
                raise DataError(f"{path}: {error.strerror}; delete {folder} to build it again") from error
            if found != expected:
                raise DataError(
                    f"{path}: damaged (hash {found}, {MANIFEST} has {expected}); delete {folder} to build it again"
                )


def request_hash(suite: SuiteConfig) -> str:
    """Return a hash of all that decides a mirror's content."""
    tasks = [(t.task, t.num_images, t.questions_per_image) for t in suite.tasks]
    probe = suite.probe and (suite.probe.task, suite.probe.num_train, suite.probe.num_val, suite.probe.num_test)
    version = importlib.metadata.version("easy-vqa")
    return content_hash([FORMAT, suite.mirror_seed, tasks, probe, version])


def check_suite(suite: SuiteConfig) -> None:
    """Refuse a suite that the embedded mirror can't serve, before anything is computed.

    Raises:
        ConfigError: a task has no embedded data, asks for more pictures than there are, or claims another source.
    """
    for task in suite.tasks:
        where = f"suite {suite.name}: task {task.task!r}"
        if task.task not in BUILDERS:
            raise ConfigError(f"{where} has no embedded data{did_you_mean(task.task, BUILDERS)}")
        source = "real" if task.task == "prebench_easy_vqa" else "generated"
        if task.data_source != source:
            raise ConfigError(f"{where}: the embedded mirror's data are {source}; set data_source: {source}")
        if task.num_images is None:
            raise ConfigError(f"{where}: the embedded mirror holds no whole benchmark; set num_images")
        available = len(easy_vqa.load("test").image_paths) if source == "real" else upstream.SCENES_PER_TASK
        if task.num_images > available:
            raise ConfigError(f"{where}: num_images is {task.num_images}, but there are {available} pictures")


def _read_manifest(folder: Path) -> dict[str, Any]:
    try:
        manifest = read_json(folder / MANIFEST)
    except StoreError as error:
        raise DataError(f"{folder / MANIFEST}: damaged; delete {folder} to build it again") from error
    if not isinstance(manifest, dict) or not {"request", "tasks"} <= manifest.keys():
        raise DataError(f"{folder / MANIFEST}: damaged; delete {folder} to build it again")
    return manifest


def _write_tasks(folder: Path, suite: SuiteConfig) -> dict[str, Any]:
    entries = {}
    for task in suite.tasks:
        benchmark = BUILDERS[task.task](task, suite.mirror_seed)
        prior = _easy_vqa_prior() if benchmark.data_source == "real" else _scenes_prior(suite.mirror_seed)
        references = prior.references(benchmark.documents)
        known = _known_documents(benchmark, prior)
        entries[task.task] = {**_write(folder, benchmark, task.task, known), "references": references}
    if suite.probe is not None:
        benchmark = upstream.visual_probe(suite.probe, suite.mirror_seed)
        entries[suite.probe.task] = {**_write(folder, benchmark, suite.probe.task, []), "references": {}}
    return entries


def _known_documents(benchmark: upstream.Benchmark, prior: TextPrior) -> list[DocumentRecord]:
    pairs = zip(benchmark.documents, prior.blind_scores(benchmark.documents), strict=True)
    return [DocumentRecord(number, document.question.type, score) for number, (document, score) in enumerate(pairs)]


def _write(folder: Path, benchmark: upstream.Benchmark, task: str, known: list[DocumentRecord]) -> dict[str, Any]:
    """Write one data set: a Parquet file per config, the README that declares the configs, and what is known beside."""
    import pyarrow.parquet as pq
    from datasets import Dataset, Features, Image

    root = folder / benchmark.repo
    configs = []
    for table in benchmark.tables:
        name = f"{table.config}/{table.split}.parquet"
        path = root / name
        path.parent.mkdir(parents=True)
        inferred = Dataset.from_list([{k: v for k, v in row.items() if k not in table.images} for row in table.rows])
        features = Features({k: Image() if k in table.images else inferred.features[k] for k in table.rows[0]})
        # The Arrow schema carries the features, so that `datasets` decodes pictures without a word in the README.
        pq.write_table(Dataset.from_list(table.rows, features=features).data.table, path)
        configs.append({"config_name": table.config, "data_files": [{"split": table.split, "path": name}]})
    front = yaml.safe_dump({"configs": configs}, sort_keys=False)
    readme = f"---\n{front}---\n{_README[benchmark.data_source]}\n"
    (root / "README.md").write_text(readme, encoding="utf-8")
    if known:
        write_jsonl(root / documents_file(task), known)
    files = sorted(path for path in root.rglob("*") if path.is_file())
    return {
        "repo": benchmark.repo,
        "data_source": benchmark.data_source,
        "num_docs": benchmark.num_docs,
        "files": {path.relative_to(folder).as_posix(): file_hash(path) for path in files},
    }


_README = {
    "generated": "Generated scenes in the schema of this data set, written by prebench. Not the data set itself.",
    "real": "Test pictures and questions of easy-VQA (https://github.com/vzhou842/easy-VQA), written by prebench.",
}


@cache
def _scenes_prior(seed: int) -> TextPrior:
    """Return the prior of training scenes with the test scenes' object counts (`upstream.benchmark_scene`)."""

    def questions() -> list[Question]:
        import numpy as np

        found = []
        for index in range(PRIOR_SCENES):
            scene = upstream.benchmark_scene(seed, "train", index)
            found += ask(scene, np.random.default_rng([seed, index]), PRIOR_QUESTIONS)
        return found

    return TextPrior(questions())


@cache
def _easy_vqa_prior() -> TextPrior:
    return TextPrior(
        Question(easy_vqa.question_type(text), text, answer)
        for pairs in easy_vqa.load("train").questions.values()
        for text, answer in pairs
    )
