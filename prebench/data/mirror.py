"""The local mirror: a folder in which `datasets` finds a suite's data sets under their names on the Hub.

`datasets.load_dataset("lmms-lab-encoder/GQA")` reads the folder of that name in the working directory, where there is
one; its configs stand in the README's front matter, as on the Hub. So upstream tasks run unmodified and offline.

A study makes the mirror of its embedded data by itself (`build_mirror`). Real benchmarks are fetched once into a folder
of the user's (`prebench mirror`, `prebench.data.download`), which any number of studies read (`open_mirror`).
"""

from __future__ import annotations

import importlib.metadata
import shlex
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import yaml

from prebench.config import list_configs
from prebench.data import easy_vqa, upstream
from prebench.data.questions import Question, ask
from prebench.data.references import TextPrior
from prebench.errors import ConfigError, DataError, StoreError, did_you_mean
from prebench.progress import ProgressLine
from prebench.records import DocumentRecord, content_hash, documents_file
from prebench.runtime import file_sha256
from prebench.schema import SuiteConfig, TaskConfig
from prebench.store import read_json, write_json, write_jsonl

MANIFEST = "mirror.json"
FORMAT = 3
"""Raised with every change of what the same request yields."""
PRIOR_SCENES = 2000
"""Training scenes whose questions give the scores without a picture."""
PRIOR_QUESTIONS = 8
"""Questions per training scene for those scores."""
EASY_VQA = "prebench_easy_vqa"

Builder = Callable[[TaskConfig, int], upstream.Benchmark]

BUILDERS: dict[str, Builder] = {
    "gqa": upstream.gqa,
    "vqav2_val": upstream.vqav2,
    "pope": upstream.pope,
    "mmbench_en_dev_static": upstream.mmbench,
    EASY_VQA: upstream.easy_vqa_test,
}


def build_mirror(folder: Path, suite: SuiteConfig) -> dict[str, Any]:
    """Write the embedded data sets of a suite, or leave a mirror that holds them already.

    Built beside `folder` and then renamed, so that a reader never sees a part. A mirror of another request is replaced.

    Args:
        folder: the mirror; the working directory of an evaluation.
        suite: its tasks, sizes and seed.

    Returns:
        The content of mirror.json: `tasks` maps each task to `repo`, `files` (`sha256` and `size` by relative path),
        `data_source`, `num_docs` and `references` (fractions `majority` and `blind`; none for the probe). Beside each
        task's data lies `documents_file(task)`: a `DocumentRecord` per document.

    Raises:
        ConfigError: a task has no embedded data, asks for more pictures than there are, or claims another source.
        DataError: a file of the mirror is missing or damaged, easy-VQA is, or the folder can't be written.
    """
    check_suite(suite)
    requests = {name: part_request(suite, name) for name in suite.task_names}
    if (folder / MANIFEST).exists():
        manifest = read_manifest(folder, f"delete {folder} to build it again")
        if {name: entry.get("request") for name, entry in manifest["tasks"].items()} == requests:
            for problem in damage(folder, all_files(manifest)):
                raise DataError(f"{problem}; delete {folder} to build it again")
            return manifest
    elif folder.exists() and any(folder.iterdir()):
        raise DataError(f"{folder}: not empty and without {MANIFEST}; delete it or name another folder")
    partial = folder.with_name(f".{folder.name}.partial")
    try:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        manifest = {"format": FORMAT, "tasks": {name: write_part(partial, suite, name) for name in requests}}
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


def open_mirror(
    folder: Path, suite: SuiteConfig, names: Sequence[str], trusted: dict[str, Any] | None = None
) -> dict[str, Any]:
    """Return the manifest of a user's mirror, after a check that it serves tasks of a suite; writes nothing.

    Args:
        folder: made by `prebench mirror`.
        suite: the study's.
        names: the tasks that will be evaluated.
        trusted: files that were hashed before (see `damage`); None looks at names and sizes alone.

    Raises:
        DataError: there is no mirror, a task is missing, or a file is missing or damaged; the message has the command
            that mends it.
    """
    command = mirror_command(suite, folder)
    if not (folder / MANIFEST).is_file():
        raise DataError(f"{folder}: no mirror here (no {MANIFEST}); `{command}` makes one (needs a network)")
    manifest = read_manifest(folder, f"`{command}` into another folder makes it again")
    missing = [name for name in names if name not in manifest["tasks"]]
    for name in names:
        if name not in missing:
            check_entry(folder, suite, name, manifest["tasks"][name])
    if missing:
        raise DataError(f"{folder}: this mirror has no {', '.join(missing)}; `{command}` fetches what is missing")
    needed = {"tasks": {name: manifest["tasks"][name] for name in names}}
    problems = list(damage(folder, all_files(needed), trusted, sizes_only=trusted is None))
    if problems:
        more = f" (and {len(problems) - 1} more files)" if len(problems) > 1 else ""
        raise DataError(f"{problems[0]}{more}; `{command}` fetches it again")
    return manifest


def check_entry(folder: Path, suite: SuiteConfig, name: str, entry: Mapping[str, Any]) -> None:
    """Refuse a mirror's task whose data are not those that a suite asks for.

    Raises:
        DataError: generated instead of real, or of another size or seed.
    """
    from_hub = name in {task.task for task in hub_tasks(suite)}
    if from_hub != ("revision" in entry):
        held, asked = ("generated", "real") if from_hub else ("real", "generated")
        raise DataError(
            f"{folder}: holds {held} data for {name}, but suite {suite.name} asks for {asked} ones; name another folder"
        )
    if not from_hub and entry["request"] != part_request(suite, name):
        raise DataError(
            f"{folder}: holds {name} of another suite's size or seed than suite {suite.name} asks for; name another "
            f"folder, such as in `{mirror_command(suite, folder.with_name(folder.name + '-' + suite.name))}`"
        )


def hub_tasks(suite: SuiteConfig) -> list[TaskConfig]:
    """Return the tasks whose data come from the Hub; the data of all others ship with prebench."""
    return [task for task in suite.tasks if task.num_images is None and task.task != EASY_VQA]


def mirror_command(suite: SuiteConfig, folder: Path | str) -> str:
    """Return the command line that fetches what a suite needs."""
    return _command(suite.name if suite.name in list_configs("suites") else f"{suite.name}.yaml", folder)


def _command(suite: str, folder: Path | str) -> str:
    return shlex.join(["prebench", "mirror", "--suite", suite, "--to", str(folder)])


def all_files(manifest: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Return `sha256` and `size` of every file of a mirror by its path."""
    return {path: record for entry in manifest["tasks"].values() for path, record in entry["files"].items()}


def file_record(path: Path) -> dict[str, Any]:
    """Return a file's entry in a manifest."""
    return {"sha256": file_sha256(path), "size": path.stat().st_size}


def damage(
    folder: Path,
    files: Mapping[str, Mapping[str, Any]],
    trusted: dict[str, Any] | None = None,
    sizes_only: bool = False,
    report: Callable[[int], None] = lambda _: None,
) -> Iterator[str]:
    """Yield one line for every file that is missing or not what the manifest says.

    Args:
        folder: the mirror.
        files: `sha256` and `size` by path.
        trusted: size, time of change and hash by path, of files that were read before: they are not read again while
            size and time stay the same. Completed by those that are read now.
        sizes_only: read no file.
        report: called with the bytes that were looked at.
    """
    done = 0
    for name, expected in files.items():
        path = folder / name
        try:
            stat = path.stat()
            found = expected["sha256"]
            stamp = [stat.st_size, stat.st_mtime_ns, found]
            known = trusted is not None and trusted.get(str(path)) == stamp
            if stat.st_size == expected["size"] and not sizes_only and not known:
                found = file_sha256(path)
        except OSError as error:
            yield f"{path}: missing ({error.strerror})"
            continue
        if stat.st_size != expected["size"]:
            yield f"{path}: damaged ({stat.st_size:,} bytes, {MANIFEST} has {expected['size']:,})"
        elif found != expected["sha256"]:
            yield f"{path}: damaged (hash {found[:16]}, {MANIFEST} has {expected['sha256'][:16]})"
        elif trusted is not None:
            trusted[str(path)] = stamp
        done += expected["size"]
        report(done)


def verify_mirror(folder: Path) -> tuple[list[str], list[str]]:
    """Check every file of a mirror.

    Returns:
        A line per problem, and the commands that repair them.

    Raises:
        DataError: there is no mirror.
    """
    if not (folder / MANIFEST).is_file():
        raise DataError(
            f"{folder}: no mirror here (no {MANIFEST}); `prebench mirror --suite NAME --to {folder}` makes one"
        )
    manifest = read_manifest(folder, "`prebench mirror` into another folder makes the mirror again")
    suites = manifest.get("suites", {})
    problems, broken = [], set()
    total = sum(record["size"] for record in all_files(manifest).values())
    with ProgressLine("verify", _megabytes(total), "megabyte") as line:
        before = 0
        for name, entry in manifest["tasks"].items():

            def report(size: int, before: int = before) -> None:
                line.update(_megabytes(before + size))

            found = list(damage(folder, entry["files"], report=report))
            before += sum(record["size"] for record in entry["files"].values())
            problems += found
            broken |= {name} if found else set()
    for name in dict.fromkeys(name for suite in suites.values() for name in suite["tasks"]):
        if name not in manifest["tasks"]:
            problems.append(f"{folder}: {name} is not complete yet")
            broken.add(name)
    arguments = [suite["argument"] for suite in suites.values() if broken & set(suite["tasks"])]
    commands = [_command(argument, folder) for argument in arguments]
    return list(dict.fromkeys(problems)), commands


def _megabytes(size: int) -> int:
    return -(-size // 1_000_000)


def part_request(suite: SuiteConfig, name: str) -> str:
    """Return a hash of all that decides an embedded part's content."""
    version = importlib.metadata.version("easy-vqa")
    if suite.probe is not None and name == suite.probe.task:
        probe = suite.probe
        return content_hash([FORMAT, suite.mirror_seed, name, probe.num_train, probe.num_val, probe.num_test, version])
    (task,) = [task for task in suite.tasks if task.task == name]
    return content_hash([FORMAT, suite.mirror_seed, name, task.num_images, task.questions_per_image, version])


def check_suite(suite: SuiteConfig) -> None:
    """Refuse a suite that the embedded mirror can't serve, before anything is computed.

    Raises:
        ConfigError: a task needs a user's mirror, has no embedded data, asks for more pictures than there are, or
            claims another source.
    """
    real = hub_tasks(suite)
    if real:
        raise ConfigError(
            f"suite {suite.name}: real data are needed for {', '.join(task.task for task in real)}; fetch them once "
            f"with `{mirror_command(suite, 'DIR')}` (needs a network), then add --mirror DIR or set PREBENCH_MIRROR=DIR"
        )
    check_embedded(suite)


def check_embedded(suite: SuiteConfig) -> None:
    """Refuse embedded tasks of a suite that no builder can serve.

    Raises:
        ConfigError: a task has no embedded data, asks for more pictures than there are, or claims another source.
    """
    from_hub = hub_tasks(suite)
    for task in suite.tasks:
        if task in from_hub:
            continue
        where = f"suite {suite.name}: task {task.task!r}"
        if task.task not in BUILDERS:
            raise ConfigError(f"{where} has no embedded data{did_you_mean(task.task, BUILDERS)}")
        source = "real" if task.task == EASY_VQA else "generated"
        if task.data_source != source:
            raise ConfigError(f"{where}: the embedded mirror's data are {source}; set data_source: {source}")
        available = len(easy_vqa.load("test").image_paths) if source == "real" else upstream.SCENES_PER_TASK
        if (task.num_images or 0) > available:
            raise ConfigError(f"{where}: num_images is {task.num_images}, but there are {available} pictures")


def read_manifest(folder: Path, cure: str) -> dict[str, Any]:
    """Return the content of mirror.json.

    Raises:
        DataError: it is damaged; `cure` says what to do.
    """
    try:
        manifest = read_json(folder / MANIFEST)
    except StoreError as error:
        raise DataError(f"{folder / MANIFEST}: damaged; {cure}") from error
    if not isinstance(manifest, dict) or not isinstance(manifest.get("tasks"), dict):
        raise DataError(f"{folder / MANIFEST}: damaged; {cure}")
    return manifest


def write_part(folder: Path, suite: SuiteConfig, name: str) -> dict[str, Any]:
    """Write one embedded data set, and return its entry in the manifest."""
    request = part_request(suite, name)
    if suite.probe is not None and name == suite.probe.task:
        benchmark = upstream.visual_probe(suite.probe, suite.mirror_seed)
        return {**_write(folder, benchmark, name, []), "references": {}, "request": request}
    (task,) = [task for task in suite.tasks if task.task == name]
    benchmark = BUILDERS[name](task, suite.mirror_seed)
    prior = _easy_vqa_prior() if benchmark.data_source == "real" else _scenes_prior(suite.mirror_seed)
    references = prior.references(benchmark.documents)
    known = _known_documents(benchmark, prior)
    return {**_write(folder, benchmark, name, known), "references": references, "request": request}


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
        "files": {path.relative_to(folder).as_posix(): file_record(path) for path in files},
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
