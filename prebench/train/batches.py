"""What a stage trains on: the micro-batches of one process, in the order that seed and step alone decide."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from accelerate import Accelerator
from torch.utils.data import DataLoader, Dataset, Subset

from prebench.data.collator import Batch, Collator, ExampleOrder
from prebench.data.conversations import ConversationData
from prebench.data.examples import TrainingData
from prebench.data.order import ConversationOrder
from prebench.errors import DataError, TrainingError
from prebench.train.features import FeatureCache


@dataclass(frozen=True)
class TrainingInputs:
    """What every run of a study shares."""

    data: TrainingData | ConversationData
    processor: Any
    features: FeatureCache | None
    """The frozen tower's outputs; None computes them in every step."""
    external: Mapping[str, FeatureCache] = field(default_factory=dict)
    """Features of external anchors, by `anchor_model`."""
    validation: FeatureCache | None = None
    """The frozen tower's outputs for the pictures of the learning curves; None computes them in every run."""


class MicroBatches(Dataset[Batch]):
    """The micro-batches of one process, in order: item k is accumulation part k % A of optimiser step k // A.

    The examples of a step are shared out as they were drawn, not by length: no padding is computed (`packing`).
    """

    def __init__(
        self, order: ExampleOrder | ConversationOrder, inputs: TrainingInputs, accelerator: Accelerator
    ) -> None:
        self.order = order
        self.inputs = inputs
        stage = order.stage
        parts = stage.gradient_accumulation_steps * accelerator.num_processes
        if stage.batch_size % parts:
            raise TrainingError(
                f"batch_size {stage.batch_size} is no multiple of accumulation steps x processes = {parts}"
            )
        self._size = stage.batch_size // parts
        self._rank = accelerator.process_index
        self._processes = accelerator.num_processes
        self._collate = Collator(inputs.processor, inputs.data, inputs.features)

    def __len__(self) -> int:
        return self.order.stage.steps * self.order.stage.gradient_accumulation_steps

    def __getitem__(self, index: int) -> Batch:
        step, part = divmod(index, self.order.stage.gradient_accumulation_steps)
        first = step * self.order.stage.batch_size + (part * self._processes + self._rank) * self._size
        examples = (self.order[position] for position in range(first, first + self._size))
        return self._collate([self._collate.encode(example) for example in examples])


def optimiser_steps(
    micro_batches: MicroBatches, first: int, loader_started: Callable[[], None]
) -> Iterator[tuple[int, list[Batch]]]:
    """Return an iterator over (step, its micro-batches) from step `first` on.

    Args:
        micro_batches: those of a stage.
        first: steps that are done.
        loader_started: called after torch's loader has drawn from the global random state, before the first batch.
    """
    accumulation = micro_batches.order.stage.gradient_accumulation_steps
    rest = Subset(micro_batches, range(first * accumulation, len(micro_batches)))
    workers = micro_batches.inputs.data.config.num_workers
    loader = iter(DataLoader(rest, batch_size=None, shuffle=False, num_workers=workers))
    loader_started()

    def grouped() -> Iterator[tuple[int, list[Batch]]]:
        for step in range(first, micro_batches.order.stage.steps):
            yield step, [_next(loader) for _ in range(accumulation)]

    return grouped()


def _next(loader: Iterator[Batch]) -> Batch:
    """Return the next batch; what failed in a worker is told as if it had failed here.

    Raises:
        DataError: an example can't be read.
        TrainingError: a worker is gone.
    """
    try:
        return next(loader)
    except DataError as error:
        # torch puts the worker's traceback in front of the message.
        last = str(error).strip().splitlines()[-1]
        raise DataError(last.removeprefix(f"{DataError.__module__}.{DataError.__name__}: ")) from error
    except RuntimeError as error:
        if "DataLoader worker" not in str(error):
            raise
        reason = " ".join(str(error).split())
        raise TrainingError(f"a process that loads batches is gone ({reason}); the same command goes on") from error
