"""Whose tokens `prebench doctor --data` counts: the preset's own where its files are here; else it says whose."""

from __future__ import annotations

import json
import shutil
import socket
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result
from huggingface_hub import constants

from prebench.cli import main
from prebench.config import dump_yaml
from prebench.data.data_report import inspect
from prebench.errors import ModelError
from prebench.model.builder import model_processor
from prebench.model.local_files import local_folder, local_processor
from prebench.schema import PresetConfig
from tests.model.published_parts import tiny_preset

NAME = "siglip2-qwen25-0.5b"
HUB_ID, REVISION = "someone/a-model", "a" * 40


@pytest.fixture
def preset(tmp_path: Path) -> PresetConfig:
    return tiny_preset(NAME, tmp_path)


@pytest.fixture(autouse=True)
def no_network(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def refuse(*_args: Any) -> None:
        raise AssertionError("a connection is opened")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))


def published(preset: PresetConfig) -> PresetConfig:
    """Return the preset with a language model that is named as on the Hub."""
    block = preset.model.language_model.model_copy(update={"pretrained": HUB_ID, "revision": REVISION})
    return preset.model_copy(update={"model": preset.model.model_copy(update={"language_model": block})})


def doctor(preset: PresetConfig, tmp_path: Path) -> tuple[Result, list[dict[str, Any]]]:
    path, report = tmp_path / "preset.yaml", tmp_path / "report.json"
    path.write_text(dump_yaml(preset))
    result = CliRunner().invoke(main, ["doctor", "--data", str(path), "--json", str(report)])
    assert result.exit_code == 0, result.output
    return result, json.loads(report.read_text())


def test_a_presets_own_tokenizer_counts(preset, tmp_path):
    result, sources = doctor(preset, tmp_path)
    assert result.stdout.splitlines()[0] == f"tokens are those of preset {NAME}"
    expected = inspect(preset.data, model_processor(preset.model), lambda path, done, total: None)
    assert [tuple(source["lengths"]) for source in sources] == [report.lengths for report in expected]
    assert all(source["tokenizer"] == f"preset {NAME}" for source in sources)


def test_another_tokenizer_is_named_where_the_presets_is_not_here(preset, tmp_path):
    here = doctor(preset, tmp_path)[1]
    result, sources = doctor(published(preset), tmp_path)
    (first, *_) = result.stdout.splitlines()
    assert first.startswith("tokens are those of the embedded preset") and f"{HUB_ID} are not on this machine" in first
    assert sources[1]["lengths"] != here[1]["lengths"] and HUB_ID in sources[0]["tokenizer"]


def test_the_hubs_cache_counts_as_here(preset, tmp_path):
    assert local_folder(HUB_ID, REVISION) is None and local_processor(published(preset).model) is None
    snapshot = tmp_path / "hub" / "models--someone--a-model" / "snapshots" / REVISION
    shutil.copytree(tmp_path / "language", snapshot)
    assert local_folder(HUB_ID, REVISION) == snapshot
    assert doctor(published(preset), tmp_path)[0].stdout.startswith(f"tokens are those of preset {NAME}")
    (snapshot / "tokenizer.json").unlink()
    assert local_processor(published(preset).model) is None


def test_files_that_are_here_and_damaged_are_an_error(preset, tmp_path):
    (tmp_path / "language" / "tokenizer.json").write_text("{")
    with pytest.raises(ModelError, match="the tokenizer can't be read"):
        local_processor(preset.model)
