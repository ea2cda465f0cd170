"""What a stage trains on: the micro-batches of one process, in the order that seed and step alone decide."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from accelerate import Accelerator
from torch.utils.data import DataLoader, Dataset, Subset

from prebench.data.collator import Batch, ExampleOrder, encode_example, pad
from prebench.data.examples import TrainingData
from prebench.errors import TrainingError
from prebench.train.features import FeatureCache


@dataclass(frozen=True)
class TrainingInputs:
    """What every run of a study shares."""

    data: TrainingData
    processor: Any
    features: FeatureCache | None
    """The frozen tower's outputs; None computes them in every step."""
    external: Mapping[str, FeatureCache] = field(default_factory=dict)
    """Features of external anchors, by `anchor_model`."""


class MicroBatches(Dataset[Batch]):
    """The micro-batches of one process, in order: item k is accumulation part k % A of optimiser step k // A.

    The examples of a step are sorted by length before they are shared out, so that little is padded; `by_length` false
    leaves them as they were drawn. Over a whole step both are the same examples.
    """

    def __init__(
        self, order: ExampleOrder, inputs: TrainingInputs, accelerator: Accelerator, by_length: bool = True
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
        size = inputs.processor.image_processor.size["height"] // inputs.processor.patch_size
        self._num_image_tokens = size * size
        self._by_length = by_length
        self._step = -1
        self._encoded: list[tuple[str, tuple[list[int], list[int]]]] = []

    def __len__(self) -> int:
        return self.order.stage.steps * self.order.stage.gradient_accumulation_steps

    def __getitem__(self, index: int) -> Batch:
        step, part = divmod(index, self.order.stage.gradient_accumulation_steps)
        if step != self._step:
            self._step, self._encoded = step, self._encode(step)
        first = (part * self._processes + self._rank) * self._size
        return self._collate(self._encoded[first : first + self._size])

    def _encode(self, step: int) -> list[tuple[str, tuple[list[int], list[int]]]]:
        """Return (image_id, (input_ids, labels)) of a step's examples, in the order in which they are shared out."""
        processor = self.inputs.processor
        examples = self.order.batch(step)
        encoded = [(e.image_id, encode_example(processor, e.messages, self._num_image_tokens)) for e in examples]
        return sorted(encoded, key=lambda item: len(item[1][0])) if self._by_length else encoded

    def _collate(self, encoded: list[tuple[str, tuple[list[int], list[int]]]]) -> Batch:
        processor = self.inputs.processor
        input_ids, attention_mask, labels = pad([item for _, item in encoded], processor.tokenizer.pad_token_id)
        image_ids = tuple(image_id for image_id, _ in encoded)
        features = pixel_values = None
        if self.inputs.features is not None:
            features = self.inputs.features.get(image_ids)
        else:
            images = [self.inputs.data.image(i) for i in image_ids]
            pixel_values = processor.image_processor(images, return_tensors="pt")["pixel_values"]
        return Batch(input_ids, attention_mask, labels, image_ids, pixel_values, features)


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
    loader = iter(DataLoader(rest, batch_size=None, shuffle=False))
    loader_started()

    def grouped() -> Iterator[tuple[int, list[Batch]]]:
        for step in range(first, micro_batches.order.stage.steps):
            yield step, [next(loader) for _ in range(accumulation)]

    return grouped()
