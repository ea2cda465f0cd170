"""The order in which a run sees examples from files: by position, the same for every variant of a seed.

A position's example is a pure function of (data, seed, stage, position), so a run goes on at any position, and workers
that load ahead change nothing.
"""

from __future__ import annotations

import numpy as np

from prebench.data.collator import ExampleOrder
from prebench.data.conversations import ConversationData, StageData
from prebench.data.examples import Example, TrainingData
from prebench.errors import DataError
from prebench.runtime import derive_seed
from prebench.schema import StageConfig

MEGA_BATCHES = 50
"""Batches whose examples are sorted by length together, as in transformers' and LLaVA's samplers."""


def data_order(
    data: TrainingData | ConversationData, stage: StageConfig, stage_name: str, seed: int
) -> ExampleOrder | ConversationOrder:
    """Return the order of one stage of one run.

    Raises:
        DataError: the stage has no examples, or no captions where it wants some.
    """
    kind = ConversationOrder if isinstance(data, ConversationData) else ExampleOrder
    return kind(data, stage, stage_name, seed)  # type: ignore[arg-type]


class ConversationOrder:
    """The examples of one stage of one run, by position; every epoch in an order of its own.

    With grouping, an epoch consists of whole batches: examples that do not fill one stay out of it, other ones each
    epoch.
    """

    def __init__(self, data: ConversationData, stage: StageConfig, stage_name: str, seed: int) -> None:
        self.data = data
        self.stage = stage
        self._examples: StageData = data.stage(stage_name)
        if not len(self._examples):
            raise DataError(f"data.{stage_name}: no examples for this stage")
        self._seed = derive_seed("order", stage_name, seed)
        grouped = data.config.group_by != "none" and len(self._examples) >= stage.batch_size
        self._group_by = data.config.group_by if grouped else "none"
        self._epoch = -1
        self._order = np.empty(0, dtype=np.int64)

    def __getitem__(self, position: int) -> Example:
        """Return the example at a position of the stage."""
        example: Example = self._examples[self.index(position)]
        return example

    def index(self, position: int) -> int:
        """Return which of the stage's examples stands at a position."""
        size = len(self._examples)
        if self._group_by != "none":
            size -= size % self.stage.batch_size
        epoch, offset = divmod(position, size)
        if epoch != self._epoch:
            self._epoch, self._order = epoch, self._permutation(epoch)
        return int(self._order[offset])

    def _permutation(self, epoch: int) -> np.ndarray:
        rng = np.random.default_rng([self._seed, epoch])
        order = rng.permutation(len(self._examples))
        if self._group_by == "none":
            return order
        size = self.stage.batch_size
        order = order[: len(order) - len(order) % size]
        with_images = self._examples.has_images[order]
        by_modality = self._group_by == "modality_length"
        parts = [order[with_images], order[~with_images]] if by_modality else [order]
        # What does not fill a batch of one modality shares the last batches with the other.
        whole = [part[: len(part) - len(part) % size] for part in parts]
        rest = [part[len(part) - len(part) % size :] for part in parts]
        batches = [self._by_length(part) for part in [*whole, np.concatenate(rest)] if len(part)]
        grouped = np.concatenate(batches).reshape(-1, size)
        return grouped[rng.permutation(len(grouped))].ravel()

    def _by_length(self, order: np.ndarray) -> np.ndarray:
        """Sort within runs of MEGA_BATCHES batches: neighbours are of like length, and epochs still differ."""
        run = MEGA_BATCHES * self.stage.batch_size
        parts = [order[first : first + run] for first in range(0, len(order), run)]
        return np.concatenate([part[np.argsort(-self._examples.lengths[part], kind="stable")] for part in parts])
