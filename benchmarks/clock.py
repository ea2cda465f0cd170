"""The time that training takes, step by step, and what part of it runs inside the model."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any
from unittest import mock

import torch

from prebench.train.objective import Objective

PARTS = ("forward", "backward", "optimiser")


@dataclass
class Block:
    """One block of steps of one system."""

    seconds: float
    """Per step, without the first."""
    parts: dict[str, float] = field(default_factory=dict)
    """Share of the step's time in the forward pass (losses included), the backward pass and the optimisers."""


class Clock:
    """Counts the time of steps and of the parts inside them, from the end of the first step on."""

    def __init__(self, now: Callable[[], float]) -> None:
        self._now = now
        self._marks: list[float] = []
        self._spent = dict.fromkeys(PARTS, 0.0)
        self._at_first: dict[str, float] = {}

    def step_ended(self) -> None:
        """Note the end of an optimiser step."""
        self._marks.append(self._now())
        if len(self._marks) == 1:
            self._at_first = dict(self._spent)

    def block(self, steps: int) -> Block:
        """Return the block of so many steps, the first included."""
        total = self._marks[-1] - self._marks[0]
        parts = {name: (self._spent[name] - self._at_first[name]) / total for name in PARTS}
        return Block(total / (steps - 1), parts)

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Time the objective's forward pass, backward passes and AdamW's steps inside the block."""
        with (
            timed(Objective, "forward", self._now, partial(self._spend, "forward")),
            timed(torch.Tensor, "backward", self._now, partial(self._spend, "backward")),
            timed(torch.optim.AdamW, "step", self._now, partial(self._spend, "optimiser")),
        ):
            yield

    def _spend(self, part: str, seconds: float) -> None:
        self._spent[part] += seconds


@contextmanager
def timed(owner: type, name: str, now: Callable[[], float], spent: Callable[[float], None]) -> Iterator[None]:
    """Tell `spent` the seconds of every call of a class's method inside the block."""
    method = getattr(owner, name)

    def call(*args: Any, **kwargs: Any) -> Any:
        start = now()
        try:
            return method(*args, **kwargs)
        finally:
            spent(now() - start)

    with mock.patch.object(owner, name, call):
        yield
