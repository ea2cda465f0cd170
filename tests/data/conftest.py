"""A Hub on this machine with three data sets."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests import hub_server
from tests.published import POPE, write_data_sets


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The data sets as they lie on the Hub."""
    root = tmp_path_factory.mktemp("published")
    found = write_data_sets(root)
    (found[POPE] / "README.md").write_text("---\nlicense: mit\n---\nObjects, by folders alone.\n")
    (found[POPE] / "data").mkdir()
    (found[POPE] / "default.parquet").rename(found[POPE] / "data" / "test-00000-of-00001.parquet")
    (found[POPE] / "data" / "train-00000-of-00001.parquet").write_bytes(b"PAR1 that nobody needs" * 100)
    return found


@pytest.fixture
def hub(folders: dict[str, Path]) -> Iterator[hub_server.Hub]:
    with hub_server.running() as server:
        for repo, folder in folders.items():
            server.publish(repo, folder)
        yield server
