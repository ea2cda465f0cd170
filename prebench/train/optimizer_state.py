"""An optimizer's state as one flat mapping of tensors, which safetensors can hold."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor


def flatten_state(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Return the state of every parameter, as "<index of the parameter>.<name>"; nothing before the first step."""
    entries = optimizer.state_dict()["state"]
    return {f"{index}.{name}": value for index, entry in entries.items() for name, value in entry.items()}


def restore_state(
    optimizer: torch.optim.Optimizer, flat: Mapping[str, Tensor], groups: list[dict[str, Any]] | None = None
) -> None:
    """Put a flat state back, in copies of its tensors.

    Args:
        optimizer: over the same parameters, in the same order.
        flat: what `flatten_state` returned.
        groups: `param_groups` as JSON gave them back; None keeps the optimizer's own.
    """
    entries: dict[int, dict[str, Tensor]] = {}
    for key, value in flat.items():
        index, _, name = key.partition(".")
        entries.setdefault(int(index), {})[name] = value.clone()
    if groups is None:
        groups = optimizer.state_dict()["param_groups"]
    groups = [group | {"betas": tuple(group["betas"])} for group in groups]  # JSON knows no tuples
    optimizer.load_state_dict({"state": entries, "param_groups": groups})
