"""The random state of one process as tensors, so that a checkpoint needs no pickle."""

from __future__ import annotations

import random

import numpy as np
import torch
from torch import Tensor


def random_state(device: torch.device) -> dict[str, Tensor]:
    """Return the state of Python's, NumPy's and torch's global generators, and of the device's own."""
    version, words, gauss = random.getstate()
    mersenne = np.random.get_state(legacy=False)
    state = {
        "torch": torch.get_rng_state(),
        "python": torch.tensor([version, *words], dtype=torch.int64),
        "python_gauss": torch.tensor([] if gauss is None else [gauss], dtype=torch.float64),
        "numpy": torch.tensor(
            [*mersenne["state"]["key"].tolist(), mersenne["state"]["pos"], mersenne["has_gauss"]], dtype=torch.int64
        ),
        "numpy_gauss": torch.tensor([mersenne["gauss"]], dtype=torch.float64),
    }
    if device.type == "cuda":
        state["cuda"] = torch.cuda.get_rng_state(device)
    return state


def restore_random_state(state: dict[str, Tensor], device: torch.device) -> None:
    """Set all generators to a state that `random_state` returned."""
    torch.set_rng_state(state["torch"])
    version, *words = state["python"].tolist()
    gauss = state["python_gauss"].tolist()
    random.setstate((version, tuple(words), gauss[0] if gauss else None))
    *keys, position, has_gauss = state["numpy"].tolist()
    np.random.set_state(("MT19937", np.array(keys, dtype=np.uint32), position, has_gauss, state["numpy_gauss"].item()))
    if device.type == "cuda":
        torch.cuda.set_rng_state(state["cuda"], device)
