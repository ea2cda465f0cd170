"""A user's mirror: a suite's real benchmarks from the Hub, checked and decoded once, and its embedded data beside them.

Every revision is resolved to a commit once and written down before anything is downloaded, so that a mirror that was
interrupted goes on with the same data. A task enters mirror.json when all of it is there; until then nothing reads it.
"""

from __future__ import annotations

import fcntl
import importlib.metadata
import os
import re
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from prebench.config import read_yaml
from prebench.data.hub import README, Hub, Listing, Table, image_columns, narrowed_readme
from prebench.data.mirror import (
    FORMAT,
    MANIFEST,
    all_files,
    check_embedded,
    check_entry,
    damage,
    file_record,
    read_manifest,
    write_part,
)
from prebench.data.quarantine import find_unreadable, replace
from prebench.errors import ConfigError, DataError
from prebench.progress import ProgressLine, say
from prebench.runtime import versions
from prebench.schema import SuiteConfig
from prebench.store import write_json, write_text

PARTIAL = ".partial"
ORIGINALS = "unreadable"
"""Holds the bytes of unreadable pictures by task."""
JOINED = {"gqa": ("testdev_balanced_images", "testdev")}
"""Config and split that a task's code loads beside the table that its YAML names; it takes the pictures from there."""
MEGABYTE = 1_000_000


@dataclass(frozen=True)
class HubTask:
    """Where lmms-eval's definition of a task finds its data."""

    task: str
    repo: str
    config: str | None
    split: str
    revision: str | None = None
    """Asked for by the definition; None: the main branch."""

    @property
    def tables(self) -> list[tuple[str | None, str]]:
        """Return config and split of everything that the task loads, the evaluated table first."""
        joined = JOINED.get(self.task)
        return [(self.config, self.split), *([joined] if joined else [])]


@dataclass(frozen=True)
class Download:
    """What a task needs from the Hub."""

    task: HubTask
    listing: Listing
    tables: tuple[Table, ...]
    readme: str

    @property
    def names(self) -> list[str]:
        """Return the files with rows."""
        return list(dict.fromkeys(name for table in self.tables for name in table.files))

    @property
    def size(self) -> int:
        """Return their bytes."""
        return sum(self.listing.files[name].size for name in self.names)


def plan_downloads(hub: Hub, tasks: Sequence[HubTask], revisions: Mapping[str, str]) -> list[Download]:
    """Resolve revisions and find the files that tasks need; writes nothing.

    Args:
        hub: where from.
        tasks: in the suite's order.
        revisions: by data set; the others are taken as their main branch stands.
    """
    listings: dict[str, Listing] = {}
    downloads = []
    for task in tasks:
        if task.repo not in listings:
            listings[task.repo] = hub.listing(task.repo, revisions.get(task.repo, task.revision))
        tables, readme = hub.tables(listings[task.repo], task.tables)
        downloads.append(Download(task, listings[task.repo], tuple(tables), readme))
    return downloads


def read_revisions(path: Path, repos: Iterable[str]) -> dict[str, str]:
    """Read the commits of data sets from another mirror's mirror.json, or from a YAML mapping of name to commit.

    Raises:
        ConfigError: the file is no such mapping, or lacks a data set.
    """
    values = read_yaml(path)
    values = values.get("revisions", values) if isinstance(values.get("revisions", {}), dict) else {}
    wanted = list(dict.fromkeys(repos))
    for repo in wanted:
        if not re.fullmatch("[0-9a-f]{40}", str(values.get(repo))):
            raise ConfigError(f"{path}: names no commit of data set {repo}; write `{repo}: COMMIT` (40 hex digits)")
    return {repo: values[repo] for repo in wanted}


def fill_mirror(
    folder: Path,
    suite: SuiteConfig,
    names: Sequence[str],
    tasks: Sequence[HubTask],
    revisions: Mapping[str, str],
    argument: str,
    hub: Hub | None = None,
) -> dict[str, Any]:
    """Put what is missing of a suite's data into a folder; what is there and intact is left alone.

    Args:
        folder: the mirror, new or begun by an earlier call.
        suite: its tasks.
        names: which of them.
        tasks: the definitions of those whose data come from the Hub.
        revisions: of data sets, where others than the main branch are wanted.
        argument: name or file of the suite, which a later check names in the command that repairs.
        hub: where from; HF_ENDPOINT by default.

    Returns:
        The content of mirror.json.

    Raises:
        ConfigError: an embedded task that no builder can serve.
        DataError: the folder holds other data or another revision, a download failed, or there is no room.
    """
    check_embedded(suite)
    with mirror_lock(folder):
        manifest = _begin(folder, suite, names, argument)
        _require_revisions(folder, manifest, revisions)
        todo = [name for name in names if not _is_complete(folder, suite, name, manifest, tasks)]
        for name in todo:
            manifest["tasks"].pop(name, None)
        fetched = [task for task in tasks if task.task in todo]
        _require_no_mix(folder, manifest, {task.repo for task in fetched})
        if fetched:
            hub = hub or Hub()
            pinned = {**revisions, **manifest["revisions"]}
            downloads = plan_downloads(hub, fetched, pinned)
            manifest["revisions"] |= {download.listing.repo: download.listing.commit for download in downloads}
            write_json(folder / MANIFEST, manifest)
            _fetch_all(hub, folder, manifest, downloads)
        for name in todo:
            if name not in {task.task for task in tasks}:
                _add_part(folder, suite, name, manifest)
        shutil.rmtree(folder / PARTIAL, ignore_errors=True)
    return manifest


def _begin(folder: Path, suite: SuiteConfig, names: Sequence[str], argument: str) -> dict[str, Any]:
    if (folder / MANIFEST).is_file():
        manifest = read_manifest(folder, "name another folder")
        if manifest.get("format") != FORMAT or "revisions" not in manifest:
            raise DataError(f"{folder}: not a mirror that this version of `prebench mirror` made; name another folder")
    elif any(path.name not in (".lock", PARTIAL) for path in folder.iterdir()):
        raise DataError(f"{folder}: not empty and without {MANIFEST}; name another folder")
    else:
        manifest = {"format": FORMAT, "revisions": {}, "suites": {}, "tasks": {}}
    known = manifest["suites"].get(suite.name, {"tasks": []})["tasks"]
    manifest["suites"][suite.name] = {"argument": argument, "tasks": list(dict.fromkeys([*known, *names]))}
    return manifest


def _require_revisions(folder: Path, manifest: Mapping[str, Any], revisions: Mapping[str, str]) -> None:
    for repo, revision in revisions.items():
        held = manifest["revisions"].get(repo, revision)
        if held != revision:
            raise DataError(
                f"{folder}: holds {repo} at {held}, but {revision} is asked for; name another folder for that one"
            )


def _require_no_mix(folder: Path, manifest: Mapping[str, Any], repos: Iterable[str]) -> None:
    """Refuse to put a data set where generated data of its schema lie."""
    for name, entry in manifest["tasks"].items():
        if "revision" not in entry and entry["repo"] in repos:
            raise DataError(f"{folder}: holds generated data of {entry['repo']} for {name}; name another folder")


def _is_complete(
    folder: Path, suite: SuiteConfig, name: str, manifest: Mapping[str, Any], tasks: Sequence[HubTask]
) -> bool:
    entry = manifest["tasks"].get(name)
    if entry is None:
        return False
    check_entry(folder, suite, name, entry)
    if any(task.task == name and task.repo != entry["repo"] for task in tasks):
        return False
    problems = list(damage(folder, entry["files"]))
    for problem in problems:
        say(f"{problem}; made again")
    if not problems:
        say(f"{name}: complete")
    return not problems


def _missing(folder: Path, download: Download) -> int:
    """Return the bytes that are still to come."""
    held = 0
    for name in download.names:
        for path in (folder / download.task.repo / name, folder / PARTIAL / download.task.repo / name):
            held += path.stat().st_size if path.is_file() else 0
    return max(0, download.size - held)


def _require_room(folder: Path, needed: int) -> None:
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise DataError(
            f"{folder}: {needed / 1e9:.1f} GB are needed, but {free / 1e9:.1f} GB are free; make room or name another "
            "folder"
        )


def _fetch_all(hub: Hub, folder: Path, manifest: dict[str, Any], downloads: Sequence[Download]) -> None:
    from pyarrow import ArrowInvalid

    total = sum(_missing(folder, download) for download in downloads)
    _require_room(folder, total)
    done = 0
    with ProgressLine("download", _megabytes(total), "megabyte") as line:
        for download in downloads:

            def report(size: int, task: str = download.task.task) -> None:
                nonlocal done
                done += size
                line.update(_megabytes(done), task)

            files = _fetch_files(hub, folder, manifest, download, report)
            try:
                unreadable = _replace_unreadable(folder, manifest, download, files)
                _enter(folder, manifest, download, files, unreadable)
            except ArrowInvalid as error:
                raise DataError(f"data set {download.task.repo}: a Parquet file can't be read ({error})") from error


def _megabytes(size: int) -> int:
    return -(-size // MEGABYTE)


def _fetch_files(
    hub: Hub, folder: Path, manifest: Mapping[str, Any], download: Download, report: Callable[[int], None]
) -> dict[str, Any]:
    """Return the records of a task's files, fetching those that no other task brought."""
    held = all_files({"tasks": {n: e for n, e in manifest["tasks"].items() if e["repo"] == download.task.repo}})
    files = {}
    for name in download.names:
        path = f"{download.task.repo}/{name}"
        if path in held and not list(damage(folder, {path: held[path]})):
            files[path] = held[path]
            continue
        digest = hub.fetch(download.listing, name, folder / path, folder / PARTIAL / path, report)
        files[path] = {"sha256": digest, "size": download.listing.files[name].size}
    return files


def _replace_unreadable(
    folder: Path, manifest: Mapping[str, Any], download: Download, files: dict[str, Any]
) -> list[dict[str, Any]]:
    """Decode every picture, put markers in the place of those that can't be read, and return what was replaced.

    The records of files that change are brought up to date; `hub_sha256` keeps the Hub's checksum.
    """
    import pyarrow.parquet as pq

    task, repo = download.task.task, download.task.repo
    held = {path for entry in manifest["tasks"].values() for path in entry["files"]}
    entries = [entry for entry in manifest["tasks"].values() if entry["repo"] == repo]
    replaced = [record for entry in entries for record in entry.get("unreadable", []) if record["file"] in files]
    replaced = list({(r["file"], r["row"], r["column"], r["item"]): r for r in replaced}.values())
    for table, wanted in zip(download.tables, download.task.tables, strict=True):
        paths = [folder / repo / name for name in table.files if name.endswith(".parquet")]
        new = [path for path in paths if path.relative_to(folder).as_posix() not in held]
        columns = image_columns(new[0], table.image_columns) if new else {}
        if not columns:
            continue
        rows = {path: pq.read_metadata(path).num_rows for path in paths}
        with ProgressLine(f"{task}: decoding images", sum(rows[path] for path in new), "row") as line:
            found = find_unreadable(new, columns, wanted == JOINED.get(task), line.update)
        for path, pictures in found.items():
            name = path.relative_to(folder).as_posix()
            first = sum(rows[earlier] for earlier in paths[: paths.index(path)])
            partial = folder / PARTIAL / name
            partial.parent.mkdir(parents=True, exist_ok=True)
            replace(path, pictures, partial, folder / ORIGINALS / task)
            partial.replace(path)
            files[name] = {**file_record(path), "hub_sha256": files[name]["sha256"]}
            place = {"file": name, "config": table.config, "split": table.split}
            replaced += [{**place, **asdict(picture), "row": first + picture.row} for picture in pictures]
    for digest in {record["sha256"] for record in replaced if record["sha256"]}:
        original = folder / ORIGINALS / task / digest
        if original.is_file():
            files[original.relative_to(folder).as_posix()] = file_record(original)
    return replaced


def _enter(
    folder: Path, manifest: dict[str, Any], download: Download, files: dict[str, Any], unreadable: list[dict[str, Any]]
) -> None:
    """Write a task into mirror.json: from here on it counts as complete."""
    import pyarrow.parquet as pq

    task, repo = download.task.task, download.task.repo
    rows = [folder / repo / name for name in download.tables[0].files]
    whole = all(path.suffix == ".parquet" for path in rows)
    manifest["tasks"][task] = {
        "repo": repo,
        "revision": download.listing.commit,
        "data_source": "real",
        "num_docs": sum(pq.read_metadata(path).num_rows for path in rows) if whole else None,
        "references": {},
        "tables": [{"config": t.config, "split": t.split, "files": list(t.files)} for t in download.tables],
        "unreadable": unreadable,
        "files": files,
        "fetched": datetime.now(UTC).isoformat(timespec="seconds"),
        "versions": {**versions(), "huggingface_hub": importlib.metadata.version("huggingface_hub")},
    }
    entries = [entry for entry in manifest["tasks"].values() if entry["repo"] == repo]
    write_text(
        folder / repo / README,
        narrowed_readme(download.readme, [table for entry in entries for table in entry["tables"]]),
    )
    for entry in entries:
        entry["files"][f"{repo}/{README}"] = file_record(folder / repo / README)
    write_json(folder / MANIFEST, manifest)
    if unreadable:
        say(f"{task}: {len(unreadable)} images can't be read, their documents will be errors; {MANIFEST} says why")


def _add_part(folder: Path, suite: SuiteConfig, name: str, manifest: dict[str, Any]) -> None:
    """Write embedded data, such as the visual probe."""
    root = folder / PARTIAL / "parts" / name
    shutil.rmtree(root, ignore_errors=True)
    root.mkdir(parents=True)
    entry = write_part(root, suite, name)
    repo = entry["repo"]
    if any(other["repo"] == repo for other in manifest["tasks"].values()):
        raise DataError(f"{folder}: holds the real data of {repo}, so that {name} can't be added; name another folder")
    shutil.rmtree(folder / repo, ignore_errors=True)
    (folder / repo).parent.mkdir(parents=True, exist_ok=True)
    (root / repo).rename(folder / repo)
    manifest["tasks"][name] = entry
    write_json(folder / MANIFEST, manifest)
    say(f"{name}: written")


@contextmanager
def mirror_lock(folder: Path) -> Iterator[None]:
    """Hold a mirror for one process.

    Raises:
        DataError: another process fills it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    handle = os.open(folder / ".lock", os.O_RDWR | os.O_CREAT, 0o644)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    except BlockingIOError as error:
        raise DataError(f"{folder}: another `prebench mirror` fills this folder; wait for it") from error
    finally:
        os.close(handle)
