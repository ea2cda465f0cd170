"""Every picture is decoded once, when a mirror is made; a marker takes the place of each that can't be read."""

from __future__ import annotations

import datasets
import numpy as np
import pyarrow.parquet as pq
import pytest

from prebench.data.download import HubTask, fill_mirror
from prebench.data.hub import Hub
from prebench.data.mirror import verify_mirror
from prebench.data.quarantine import find_unreadable
from prebench.images import marked_reason
from prebench.runtime import file_sha256
from tests import hub_server
from tests.published import GQA, fill, load, picture, spoil, suite


def test_unreadable_pictures_become_markers_and_all_else_stays(hub, folders, tmp_path):
    published = tmp_path / "published"
    published.mkdir()
    source = folders[GQA] / "testdev_balanced_images.parquet"
    content = source.read_bytes()
    path = published / source.name
    path.write_bytes(content)
    whole = picture(path, 2)
    spoil(path, {0: b"", 2: whole[: len(whole) // 2], 4: b"no picture", 5: None})
    hub.publish(GQA, folders[GQA], **{source.name: path.read_bytes()})
    folder = tmp_path / "mirror"
    entry = fill(folder, hub, "gqa")["tasks"]["gqa"]
    assert [(r["row"], r["column"], r["split"]) for r in entry["unreadable"]] == [
        (r, "image", "testdev") for r in (0, 2, 4, 5)
    ]
    reasons = [record["reason"] for record in entry["unreadable"]]
    for reason, part in zip(reasons, ("empty (0 bytes)", "truncated", "cannot identify", "no bytes"), strict=True):
        assert part in reason and "0x" not in reason
    rows = load(folder, GQA, "testdev_balanced_images", cache=tmp_path / "cache")["testdev"]
    before = pq.read_table(path).to_pylist()
    for number, (row, old) in enumerate(zip(rows, before, strict=True)):
        assert row["id"] == old["id"]
        reason = marked_reason(row["image"].convert("RGB"))
        assert reason == (reasons[(0, 2, 4, 5).index(number)] if number in (0, 2, 4, 5) else None)
    record = entry["files"][f"{GQA}/{source.name}"]
    assert record["hub_sha256"] == file_sha256(path) != record["sha256"]
    kept = folder / "unreadable" / "gqa" / entry["unreadable"][1]["sha256"]
    assert kept.read_bytes() == whole[: len(whole) // 2]
    assert verify_mirror(folder) == ([], [])


@pytest.mark.slow
def test_processes_side_by_side_find_what_one_finds(folders, tmp_path, monkeypatch):
    path = tmp_path / "pictures.parquet"
    path.write_bytes((folders[GQA] / "testdev_balanced_images.parquet").read_bytes())
    spoil(path, {1: b"", 5: b"BM"})  # in two row groups
    done: list[int] = []
    alone = find_unreadable([path], {"image": False}, False, done.append)
    assert done == [4, 6] and [picture.row for picture in alone[path]] == [1, 5]
    monkeypatch.setattr("prebench.data.quarantine.POOL_ROWS", 1)
    monkeypatch.setattr("prebench.data.quarantine.available_cores", lambda: 2)
    assert find_unreadable([path], {"image": False}, False, done.append) == alone


def test_a_picture_among_several_is_replaced_alone(hub, tmp_path):
    image = datasets.Image()
    bad = {"bytes": b"GIF89a", "path": None}
    good = image.encode_example(np.zeros((4, 4, 3), dtype=np.uint8))
    rows = [{"images": [good, bad], "second": None}, {"images": [], "second": good}, {"images": [good], "second": bad}]
    features = datasets.Features({"images": datasets.List(image), "second": image})
    path = tmp_path / "several.parquet"
    pq.write_table(datasets.Dataset.from_list(rows, features=features).data.table, path)
    hub.repos["me/several"] = hub_server.Repo()
    hub.repos["me/several"].commit({"data/test-0.parquet": path.read_bytes()})
    task = HubTask("several", "me/several", None, "test")
    entry = fill_mirror(tmp_path / "m", suite("several"), ["several"], [task], {}, "s", Hub(hub.url))["tasks"][
        "several"
    ]
    found = [(r["row"], r["column"], r["item"]) for r in entry["unreadable"]]
    assert found == [(0, "images", 1), (2, "second", None)]
    loaded = load(tmp_path / "m", "me/several", cache=tmp_path / "cache")["test"]
    marked = [[marked_reason(i.convert("RGB")) is not None for i in row["images"]] for row in loaded]
    assert marked == [[False, True], [], [False]]
    assert [row["second"] and row["second"].size == (4, 4) for row in loaded] == [None, True, False]
