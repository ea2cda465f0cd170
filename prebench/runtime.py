"""Seeds, determinism, device choice, logging and versions: what every stage sets up in the same way."""

from __future__ import annotations

import contextlib
import gc
import hashlib
import importlib.metadata
import logging
import os
import platform
import random
import signal
import subprocess
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

PACKAGES = ("torch", "transformers", "accelerate", "datasets", "lmms_eval", "pandas", "pillow", "numpy")

MALLOC_PARAMETERS = {
    "M_MMAP_THRESHOLD": (-3, 32 << 20),
    "M_TRIM_THRESHOLD": (-1, 128 << 20),
    "M_TOP_PAD": (-2, 16 << 20),
    "M_ARENA_MAX": (-8, 1),
}
"""Numbers in glibc's malloc.h, and bytes. One arena: with one per thread, what one frees another can't take."""

LAUNCHER_VARIABLES = ("WORLD_SIZE", "RANK", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")

logger = logging.getLogger("prebench")


def data_dir(name: str) -> Path:
    """Return the folder of shipped files `tasks` or `configs`.

    In a wheel they lie under `prebench/_data`; in a checkout at the top level.
    """
    package = Path(__file__).resolve().parent
    shipped = package / "_data" / name
    return shipped if shipped.is_dir() else package.parent / name


def derive_seed(*parts: object) -> int:
    """Return a 63-bit seed that depends on every part, so that two uses never share a random stream."""
    digest = hashlib.sha256("/".join(str(part) for part in parts).encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


def available_cores() -> int:
    """Return the cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def seed_everything(seed: int) -> None:
    """Seed Python, NumPy and torch, and ask torch for deterministic kernels."""
    import numpy as np
    import torch

    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read at CUDA's first product; else torch warns
    torch.use_deterministic_algorithms(True, warn_only=True)
    # Else torch writes NaN into every new tensor before a kernel fills it.
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]


def prepare_cpu(num_threads: int | None = None) -> None:
    """Set this process up to compute: torch, the C library's memory, tokenizers and transformers' bars.

    Denormals are flushed (a slow path on CPUs), and tokenizers fork no threads.

    Args:
        num_threads: threads of torch's CPU kernels; None leaves torch's choice.
    """
    import torch
    from transformers.utils import logging as transformers_logging

    if num_threads is not None:
        torch.set_num_threads(num_threads)
    torch.set_flush_denormal(True)
    _keep_freed_memory()
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    transformers_logging.disable_progress_bar()


def _keep_freed_memory() -> None:
    """Let the C library keep freed memory for the next tensors (Linux with glibc; nothing happens elsewhere).

    By default it hands large blocks back to the system at once; the page faults that follow took a third of a small
    model's time in evaluation and a tenth in training on two threads. The process' peak stays what it was.
    """
    import ctypes

    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if platform.libc_ver()[0] == "glibc" else None
    if mallopt is not None:
        for parameter, value in MALLOC_PARAMETERS.values():
            mallopt(parameter, value)


def num_processes() -> int:
    """Return how many processes a launcher (torchrun, accelerate) started for one training run; 1 without one."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def process_index() -> int:
    """Return which of them this is; process 0 writes files."""
    return int(os.environ.get("RANK", "0"))


def leave_launcher() -> None:
    """Forget the launcher's variables, so that what this process starts next is alone."""
    for name in list(os.environ):
        if name in LAUNCHER_VARIABLES or name.startswith("TORCHELASTIC_"):
            del os.environ[name]


class _Sigterm:
    """Whether SIGTERM came since a block of `sigterm_noted` was entered."""

    came = False

    @classmethod
    def note(cls, _number: int, _frame: object) -> None:
        cls.came = True


@contextlib.contextmanager
def sigterm_noted() -> Iterator[Callable[[], bool]]:
    """Note SIGTERM inside the block instead of dying of it; yields a function that tells whether it came.

    Blocks may lie inside each other. Outside the main thread, where Python takes no signals, nothing is noted.
    """
    if threading.current_thread() is not threading.main_thread():
        yield lambda: False
        return
    before = signal.getsignal(signal.SIGTERM)
    if before == _Sigterm.note:
        yield lambda: _Sigterm.came
        return
    _Sigterm.came = False
    signal.signal(signal.SIGTERM, _Sigterm.note)
    try:
        yield lambda: _Sigterm.came
    finally:
        signal.signal(signal.SIGTERM, before)


@contextlib.contextmanager
def loading() -> Iterator[None]:
    """Load something large that stays: Python's garbage collector does not look through it again and again afterwards.

    A look through the objects of torch and transformers takes 0.3 s. What an earlier loading left is freed first.
    """
    gc.unfreeze()
    gc.collect()
    yield
    gc.freeze()


def choose_device(name: str = "auto") -> torch.device:
    """Return the device that `name` asks for; `auto` takes CUDA where there is one.

    Raises:
        ConfigError: `cuda` was asked for and there is none.
    """
    import torch

    from prebench.errors import ConfigError

    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    device = torch.device(name)
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ConfigError("device: 'cuda' was asked for, but torch sees no CUDA device; use 'auto' or 'cpu'")
    return device


def visible_gpus() -> list[str]:
    """Return the GPUs that this process may use, as CUDA_VISIBLE_DEVICES would name each."""
    import torch

    named = os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")
    count = torch.cuda.device_count()
    return named[:count] if len(named) >= count and all(named) else [str(number) for number in range(count)]


def choose_dtype(name: str, device: torch.device) -> torch.dtype:
    """Return the compute dtype: `auto` is bfloat16 on CUDA and float32 on a CPU (bf16 is far slower there)."""
    import torch

    if name == "auto":
        return torch.bfloat16 if device.type == "cuda" else torch.float32
    return {"float32": torch.float32, "bfloat16": torch.bfloat16}[name]


def file_sha256(path: Path) -> str:
    """Return a file's SHA-256 in hex digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def file_hash(path: Path) -> str:
    """Return the first 16 hex digits of a file's SHA-256."""
    return file_sha256(path)[:16]


def versions() -> dict[str, str]:
    """Return the versions of Python, prebench and the packages that decide a number."""
    from prebench import __version__

    found = {"python": platform.python_version(), "prebench": __version__}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = "not installed"
    return found


def git_commit() -> str:
    """Return the commit of the checkout that holds this package, or "" outside a checkout."""
    root = Path(__file__).resolve().parent.parent
    if not (root / ".git").exists():
        return ""
    try:
        result = subprocess.run(
            ["git", "rev-parse", "HEAD"],  # noqa: S607
            cwd=root,
            capture_output=True,
            text=True,
            timeout=10,
            check=False,
        )
    except OSError:
        return ""
    return result.stdout.strip()


def hardware() -> dict[str, str]:
    """Return what the numbers were computed on."""
    import torch

    return {
        "machine": platform.machine(),
        "cpus": str(os.cpu_count()),
        "gpu": torch.cuda.get_device_name(0) if torch.cuda.is_available() else "none",
    }
