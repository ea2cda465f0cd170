"""Real benchmarks fetched into a mirror: from a Hub on this machine, with what can go wrong on the way."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import yaml
from click.testing import CliRunner

from prebench.cli import main
from prebench.config import load_suite
from prebench.data.download import HubTask, fill_mirror, mirror_lock, plan_downloads, read_revisions
from prebench.data.hub import Hub
from prebench.data.mirror import open_mirror, verify_mirror
from prebench.errors import ConfigError, DataError
from prebench.evaluation.request import find_task
from prebench.runtime import file_sha256
from prebench.store import read_json, write_json
from tests import hub_server
from tests.evaluation.paper_mirror import DATA_SETS, write_paper_mirror
from tests.published import GQA, MMSTAR, POPE, TASKS, fill, load, parquet, suite


def test_what_tasks_need_is_fetched_at_one_commit_and_nothing_else(hub, folders, tmp_path):
    folder = tmp_path / "mirror"
    manifest = fill(folder, hub, "gqa", "pope", "mmstar")
    assert manifest == read_json(folder / "mirror.json")
    assert manifest["revisions"] == {repo: hub.repos[repo].branches["main"] for repo in folders}
    assert not hub.asked("train-00000")
    assert sorted(p.name for p in folder.iterdir()) == [".lock", "Lin-Chen", "lmms-lab-encoder", "mirror.json"]
    for task, entry in manifest["tasks"].items():
        assert entry["revision"] == manifest["revisions"][entry["repo"]]
        for name, record in entry["files"].items():
            assert (file_sha256(folder / name), (folder / name).stat().st_size) == (record["sha256"], record["size"])
            source = folders[entry["repo"]] / Path(name).relative_to(entry["repo"])
            assert name.endswith("README.md") or source.read_bytes() == (folder / name).read_bytes(), (task, name)
    assert manifest["tasks"]["gqa"]["num_docs"] == 24 and len(manifest["tasks"]["gqa"]["tables"]) == 2
    open_mirror(folder, suite("gqa", "pope", "mmstar"), ["gqa", "pope", "mmstar"], {})
    assert verify_mirror(folder) == ([], [])


def test_a_data_set_whose_splits_are_declared_by_folders_resolves_offline(hub, tmp_path):
    fill(tmp_path / "mirror", hub, "pope")
    loaded = load(tmp_path / "mirror", POPE, cache=tmp_path / "cache")
    assert list(loaded) == ["test"] and len(loaded["test"]) == 6
    readme = (tmp_path / "mirror" / POPE / "README.md").read_text()
    assert "license: mit" in readme and "Objects, by folders alone." in readme and "train" not in readme


def test_splits_that_the_description_counts_are_not_missed(hub, folders, tmp_path):
    front = {
        "configs": [
            {"config_name": "default", "data_files": [{"split": s, "path": f"data/{s}-*"} for s in ("test", "train")]}
        ],
        "dataset_info": {
            "features": [{"name": "answer", "dtype": "string"}],
            "splits": [
                {"name": "test", "num_bytes": 1, "num_examples": 6},
                {"name": "train", "num_bytes": 1, "num_examples": 5},
            ],
        },
    }
    readme = f"---\n{yaml.safe_dump(front)}---\nCounted.\n".encode()
    only = {"data/test-1.parquet": parquet({"answer": ["yes"] * 6}), "README.md": readme}
    hub.repos[POPE].commit({**only, "data/train-1.parquet": b"x"})
    fill(tmp_path / "mirror", hub, "pope")
    assert load(tmp_path / "mirror", POPE, cache=tmp_path / "cache")["test"]["answer"] == ["yes"] * 6


def test_a_second_call_fetches_nothing_and_needs_no_network(hub, tmp_path):
    first = fill(tmp_path / "mirror", hub, "gqa", "pope")
    hub.requests.clear()
    assert fill(tmp_path / "mirror", hub, "gqa", "pope") == first
    assert not hub.requests


def test_a_new_task_is_added_and_the_others_stay(hub, tmp_path):
    fill(tmp_path / "mirror", hub, "gqa")
    before = (tmp_path / "mirror" / GQA / "README.md").stat().st_mtime_ns
    hub.requests.clear()
    manifest = fill(tmp_path / "mirror", hub, "gqa", "mmstar")
    assert set(manifest["tasks"]) == {"gqa", "mmstar"} and not hub.asked("GQA")
    assert (tmp_path / "mirror" / GQA / "README.md").stat().st_mtime_ns == before


def test_two_splits_of_one_data_set_share_its_folder(hub, folders, tmp_path):
    rows = parquet({"answer": ["no"] * 5})
    hub.publish(POPE, folders[POPE], **{"data/train-00000-of-00001.parquet": rows})
    tasks = [TASKS["pope"], HubTask("pope_train", POPE, None, "train")]
    both, one = suite("pope", "pope_train"), suite("pope")
    fill_mirror(tmp_path / "m", one, ["pope"], tasks[:1], {}, "mine.yaml", Hub(hub.url))
    fill_mirror(tmp_path / "m", both, ["pope", "pope_train"], tasks, {}, "mine.yaml", Hub(hub.url))
    loaded = load(tmp_path / "m", POPE, cache=tmp_path / "cache")
    assert {split: len(data) for split, data in loaded.items()} == {"test": 6, "train": 5}
    assert len(hub.asked("test-00000-of-00001.parquet")) == 2  # its redirect and its content, once
    assert verify_mirror(tmp_path / "m") == ([], [])


def test_revisions_of_another_mirror_are_repeated_after_the_branch_moved(hub, folders, tmp_path):
    first = fill(tmp_path / "first", hub, "pope", "mmstar")
    hub.publish(POPE, folders[POPE], **{"data/test-00001.parquet": b"new"})
    pins = read_revisions(tmp_path / "first" / "mirror.json", [POPE, MMSTAR])
    second = fill(tmp_path / "second", hub, "pope", "mmstar", revisions=pins)
    hashes = [
        {t: {n: r["sha256"] for n, r in e["files"].items()} for t, e in m["tasks"].items()} for m in (first, second)
    ]
    assert hashes[0] == hashes[1]
    assert second["revisions"] == first["revisions"] != {repo: hub.repos[repo].branches["main"] for repo in pins}
    with pytest.raises(DataError, match=r"holds lmms-lab-encoder/POPE at .*name another folder"):
        fill(tmp_path / "first", hub, "pope", revisions={POPE: hub.repos[POPE].branches["main"]})


@pytest.mark.parametrize("text", ["[1, 2]", f"{POPE}: main", f"{MMSTAR}: {'0' * 40}", "revisions: 3"])
def test_a_bad_file_of_revisions_is_refused(tmp_path, text):
    (tmp_path / "r.yaml").write_text(text)
    with pytest.raises(ConfigError, match=r"r\.yaml: "):
        read_revisions(tmp_path / "r.yaml", [POPE])


def test_a_connection_that_breaks_off_goes_on_where_it_was(hub, folders, tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.DOWNLOAD_CHUNK_SIZE", 50_000)  # what it hands on at a time
    content = np.random.default_rng(0).bytes(400_000)
    hub.publish(POPE, folders[POPE], **{"data/test-00001.bin": content})
    name = "data/test-00001.bin"
    hub.cut[name] = [100_000, 150_000]
    client = Hub(hub.url)
    listing = client.listing(POPE, None)
    # As a killed process leaves it: a part of the file, then two connections that break off.
    (tmp_path / "partial").write_bytes(content[:50_000])
    came: list[int] = []
    client.fetch(listing, name, tmp_path / "whole.bin", tmp_path / "partial", came.append)
    assert (tmp_path / "whole.bin").read_bytes() == content and not (tmp_path / "partial").exists()
    assert sum(came) == hub.sent("test-00001.bin") == 350_000
    ranges = [request.range for request in hub.asked("test-00001.bin") if request.sent]
    assert ranges == ["bytes=50000-", "bytes=150000-", "bytes=300000-"]


@pytest.mark.parametrize("name", ["data/test-00000-of-00001.parquet", "README.md"])
def test_a_wrong_checksum_leaves_nothing_that_looks_complete(hub, tmp_path, name):
    content = hub.repos[POPE].commits[hub.repos[POPE].branches["main"]][name]
    hub.instead[name] = content[:-1] + bytes([content[-1] ^ 1])
    with pytest.raises(DataError, match=f"{name} at .*checksum .*start again"):
        fill(tmp_path / "mirror", hub, *(("mmstar", "pope") if "parquet" in name else ("pope",)))
    folder = tmp_path / "mirror"
    assert not [path for path in folder.rglob("*") if path.is_file() and POPE in str(path)]
    if (folder / "mirror.json").exists():
        assert "pope" not in read_json(folder / "mirror.json")["tasks"]
    hub.instead.clear()
    assert set(fill(folder, hub, "mmstar", "pope")["tasks"]) == {"mmstar", "pope"}


def test_a_data_set_that_is_gone(hub, tmp_path):
    del hub.repos[POPE]
    with pytest.raises(DataError, match=f"data set {POPE}: not found at {hub.url}; .*`hf auth login`"):
        fill(tmp_path / "mirror", hub, "pope")


def test_a_gated_data_set_says_what_to_do_and_takes_a_token(hub, tmp_path, monkeypatch):
    hub.repos[POPE].gated = True
    monkeypatch.delenv("HF_TOKEN", raising=False)
    with pytest.raises(DataError, match=f"accept the terms at {hub.url}/datasets/{POPE}, log in with `hf auth login`"):
        fill(tmp_path / "mirror", hub, "pope")
    monkeypatch.setenv("HF_TOKEN", hub_server.TOKEN)
    fill(tmp_path / "mirror", hub, "pope")
    stored = hub.asked("/cdn/")
    assert stored and all(request.token is None and request.host.startswith("localhost") for request in stored)


def test_a_commit_that_is_not_there(hub, tmp_path):
    with pytest.raises(DataError, match=f"data set {POPE}: has no revision {'0' * 40}"):
        fill(tmp_path / "mirror", hub, "pope", revisions={POPE: "0" * 40})


def test_a_split_that_is_not_there(hub):
    wanted = [HubTask("pope", POPE, None, "dev"), HubTask("gqa", GQA, "dev_instructions", "testdev")]
    with pytest.raises(DataError, match=f"{POPE} at .*: no split 'dev'"):
        plan_downloads(Hub(hub.url), wanted[:1], {})
    with pytest.raises(DataError, match=f"{GQA} at .*: no config 'dev_instructions' with split 'testdev'"):
        plan_downloads(Hub(hub.url), wanted[1:], {})


def test_a_file_name_that_leads_elsewhere_is_refused(hub, tmp_path):
    hub.repos[POPE].commit({"../../etc/evil.parquet": b"x"})
    with pytest.raises(DataError, match="unsafe name"):
        fill(tmp_path / "mirror", hub, "pope")


def test_no_server(tmp_path):
    with pytest.raises(DataError, match=r"http://127\.0\.0\.1:9 can't be reached .*start again"):
        Hub("http://127.0.0.1:9").listing(POPE, None)


def test_a_disk_without_room_is_refused_before_the_download(hub, tmp_path, monkeypatch):
    monkeypatch.setattr("shutil.disk_usage", lambda _: SimpleNamespace(free=10))
    with pytest.raises(DataError, match=r"GB are needed, but 0\.0 GB are free"):
        fill(tmp_path / "mirror", hub, "mmstar")
    assert not hub.asked("/cdn/")


def test_foreign_folders_and_other_data_are_left_alone(hub, tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("mine")
    with pytest.raises(DataError, match=r"not empty and without mirror\.json"):
        fill(tmp_path / "mine", hub, "pope")
    folder = tmp_path / "mirror"
    probe = {"attributes": [{"name": "fill", "kind": "unasked"}], "reference_attribute": "fill"}
    sizes = {"num_train": 4, "num_val": 2, "num_test": 2}
    small = suite(probe=probe | sizes)
    fill_mirror(folder, small, small.task_names, [], {}, "small.yaml")
    assert not hub.requests
    other = suite(probe=probe | sizes | {"num_test": 3})
    with pytest.raises(DataError, match="another suite's size or seed"):
        fill_mirror(folder, other, other.task_names, [], {}, "other.yaml")
    with mirror_lock(folder), pytest.raises(DataError, match="another `prebench mirror` fills this folder"):
        fill_mirror(folder, small, small.task_names, [], {}, "small.yaml")
    with pytest.raises(DataError, match=r"this mirror has no pope; `prebench mirror --suite mine\.yaml --to"):
        open_mirror(folder, suite("pope"), ["pope"])


def test_the_benchmarks_of_the_suite_paper_are_found_by_their_definitions(tmp_path, monkeypatch):
    write_paper_mirror(tmp_path / "published")
    names = [task.task for task in load_suite("paper").tasks]
    with hub_server.running() as server:
        for repo in DATA_SETS:
            server.publish(repo, tmp_path / "published" / repo)
        monkeypatch.setattr(Hub.__init__, "__defaults__", (server.url,))
        arguments = ["mirror", "--suite", "paper", "--to", tmp_path / "mirror", "--tasks", ",".join(names)]
        result = CliRunner().invoke(main, [str(a) for a in arguments])
    assert result.exit_code == 0, result.output
    assert "still missing for suite paper: prebench_visual_probe\n" in result.stdout
    entries = read_json(tmp_path / "mirror" / "mirror.json")["tasks"]
    assert sorted(entries) == sorted(names)
    for name in names:
        source = find_task(name)
        chosen = [source.dataset_name] if source.dataset_name else []
        loaded = load(tmp_path / "mirror", source.dataset_path, *chosen, cache=tmp_path / "cache")
        assert {split: len(rows) for split, rows in loaded.items()} == {source.split: entries[name]["num_docs"]}
        assert entries[name]["unreadable"] == []


# --- the real command line ----------------------------------------------------------------------------------


def command(server: hub_server.Hub, *arguments: object) -> tuple[list[str], dict[str, str]]:
    environment = os.environ | {"HF_ENDPOINT": server.url, "OMP_NUM_THREADS": "1"}
    return [sys.executable, "-m", "prebench.cli", "mirror", *map(str, arguments)], environment


def prebench_mirror(server: hub_server.Hub, *arguments: object) -> subprocess.CompletedProcess[str]:
    line, environment = command(server, *arguments)
    return subprocess.run(line, env=environment, capture_output=True, text=True, check=False, timeout=300)


@pytest.mark.slow
def test_a_killed_mirror_goes_on_with_the_commit_that_it_began_with(hub, folders, tmp_path):
    folder, file = tmp_path / "mirror", tmp_path / "mine.yaml"
    file.write_text(yaml.safe_dump(suite("mmstar", "pope").model_dump(mode="json")))
    blob = np.random.default_rng(0).bytes(30_000_000)
    big = parquet({"question": ["?"], "blob": [blob]})
    hub.publish(POPE, folders[POPE], **{"data/test-00001-of-00002.parquet": big})
    hub.seconds_per_chunk = 0.002
    line, environment = command(hub, "--suite", file, "--to", folder)
    with subprocess.Popen(line, env=environment, stderr=subprocess.PIPE) as process:
        while hub.sent("test-00001-of-00002.parquet") < 18_000_000 and process.poll() is None:
            time.sleep(0.02)
        assert process.poll() is None, process.stderr.read()
        process.send_signal(signal.SIGKILL)
    hub.seconds_per_chunk = 0.0
    manifest = read_json(folder / "mirror.json")
    assert set(manifest["tasks"]) == {"mmstar"} and set(manifest["revisions"]) == {MMSTAR, POPE}
    verified = prebench_mirror(hub, "--verify", folder)
    assert verified.returncode == 2
    assert "pope is not complete yet" in verified.stdout
    assert f"`prebench mirror --suite {file} --to {folder}` repairs" in verified.stderr

    # The branch moves in between; the mirror goes on with the commit that it began with.
    begun = hub.repos[POPE].branches["main"]
    hub.publish(POPE, folders[POPE], **{"data/test-00001-of-00002.parquet": b"moved"})
    hub.requests[:] = hub.asked("test-00001-of-00002.parquet")
    done = prebench_mirror(hub, "--suite", file, "--to", folder)
    assert done.returncode == 0, done.stderr
    assert read_json(folder / "mirror.json")["tasks"]["pope"]["revision"] == begun
    assert not hub.asked("mmstar")
    # huggingface_hub hands on 10 MiB at a time: no more than that, and what was under way, is sent twice.
    assert len(big) <= hub.sent("test-00001-of-00002.parquet") <= len(big) + 12 * 2**20
    assert not (folder / ".partial").exists()
    assert verify_mirror(folder) == ([], [])


def test_damaged_and_missing_files_are_named_and_fetched_again(hub, tmp_path):
    folder = tmp_path / "mirror"
    fill(folder, hub, "mmstar", "pope")
    damaged = next((folder / MMSTAR).glob("*.parquet"))
    content = bytearray(damaged.read_bytes())
    content[100] ^= 1
    damaged.write_bytes(content)
    missing = folder / POPE / "data" / "test-00000-of-00001.parquet"
    missing.unlink()
    problems, commands = verify_mirror(folder)
    assert [line.split(" (")[0] for line in problems] == [f"{damaged}: damaged", f"{missing}: missing"]
    assert commands == [f"prebench mirror --suite mine.yaml --to {folder}"]
    names = ["mmstar", "pope"]
    with pytest.raises(DataError, match=f"{missing}: missing .*; `prebench mirror --suite mine.yaml --to {folder}`"):
        open_mirror(folder, suite(*names), names)
    with pytest.raises(DataError, match=rf"{damaged}: damaged .* \(and 1 more files\); `prebench mirror"):
        open_mirror(folder, suite(*names), names, {})
    fill(folder, hub, *names)
    assert verify_mirror(folder) == ([], [])


def test_files_are_read_once_per_study(hub, tmp_path, monkeypatch):
    folder = tmp_path / "mirror"
    fill(folder, hub, "pope")
    read: list[Path] = []
    monkeypatch.setattr("prebench.data.mirror.file_sha256", lambda path: read.append(path) or file_sha256(path))
    hashed: dict = {}
    for _ in range(2):
        open_mirror(folder, suite("pope"), ["pope"], hashed)
    assert len(read) == len(set(read)) == 2
    os.utime(read[0], ns=(1, 1))
    open_mirror(folder, suite("pope"), ["pope"], hashed)
    assert len(read) == 3


def test_a_dry_run_lists_files_and_writes_nothing(hub, folders, tmp_path, monkeypatch):
    monkeypatch.setattr(Hub.__init__, "__defaults__", (hub.url,))
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump(suite("gqa", "pope").model_dump(mode="json")))
    arguments = ["mirror", "--suite", tmp_path / "mine.yaml", "--to", tmp_path / "mirror", "--dry-run"]
    result = CliRunner().invoke(main, [str(a) for a in arguments])
    assert result.exit_code == 0, result.output
    file = folders[POPE] / "data" / "test-00000-of-00001.parquet"
    assert f"pope: {POPE}@{hub.repos[POPE].branches['main']}, 1 file, {file.stat().st_size:,} bytes" in result.stdout
    assert f"{file.stat().st_size:>14,}  data/{file.name}" in result.stdout
    assert f"gqa: {GQA}@" in result.stdout and "testdev_balanced_images.parquet" in result.stdout
    assert not (tmp_path / "mirror").exists() and not hub.asked("/cdn/")


def test_commands_that_lack_something(tmp_path):
    def refused(*arguments: object) -> str:
        result = CliRunner().invoke(main, [str(a) for a in arguments])
        assert result.exit_code == 2, result.output
        (line,) = [line for line in result.stderr.splitlines() if line.startswith("prebench:")]
        return line

    assert "`prebench mirror --suite NAME --to DIR`" in refused("mirror", "--suite", "paper")
    assert "stands alone" in refused("mirror", "--suite", "paper", "--verify", tmp_path)
    assert "no mirror here" in refused("mirror", "--verify", tmp_path)
    assert "did you mean 'gqa'" in refused("mirror", "--suite", "paper", "--to", tmp_path / "m", "--tasks", "gqaa")
    assert "`prebench mirror --suite paper --to DIR`" in refused("run", "--suite", "paper", "--results", tmp_path / "r")
    write_json(tmp_path / "mirror.json", {"format": 3, "tasks": {}, "revisions": {}})
    line = refused("run", "--suite", "paper", "--results", tmp_path / "r", "--mirror", tmp_path)
    assert "has no vqav2_val, gqa, " in line and f"`prebench mirror --suite paper --to {tmp_path}` fetches" in line
    assert not (tmp_path / "r").exists()
    assert json.loads((tmp_path / "mirror.json").read_text())["tasks"] == {}
