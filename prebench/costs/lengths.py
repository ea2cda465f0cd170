"""How long a preset's examples are: measured where data and tokenizer are on this machine, else assumed and said."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from prebench.data.chat_templates import chat_template
from prebench.data.collator import Collator
from prebench.data.conversations import open_source
from prebench.data.encoding import IGNORE_INDEX, encode_example
from prebench.data.examination import truncate
from prebench.data.examples import TrainingData
from prebench.data.order import data_order
from prebench.data.visual_tokens import image_tokens
from prebench.errors import DataError
from prebench.model.builder import build_processor, build_tokenizer
from prebench.schema import PresetConfig, SourceConfig, StageConfig

SAMPLE = 512
"""Examples that are encoded."""
ASSUMED_TEXT = {"plain": (30, 128), "chat": (250, 1024)}
"""Text tokens of an example, mean and longest, where nothing can be measured: `plain` are captions."""


@dataclass(frozen=True)
class Lengths:
    """Tokens of a stage's examples."""

    tokens: float
    """Mean, visual tokens included."""
    longest: int
    """Of the longest example, cut off at data.max_length."""
    targets: float
    """Mean number of target tokens."""
    most_targets: int
    """Of the example that has most."""
    pictures: float
    """Mean number of pictures per example."""
    most_pictures: int
    source: str
    """Where the numbers come from."""


def stage_lengths(preset: PresetConfig, name: str, processor: Any | None, text_tokens: float | None) -> Lengths:
    """Return how long the examples of a stage are.

    Args:
        preset: its data and recipe.
        name: align or instruct.
        processor: the preset's own; None where its tokenizer is not here.
        text_tokens: the mean number of text tokens per example, instead of measuring.

    Raises:
        DataError: a file is here and can't be read.
    """
    if text_tokens is not None:
        return _assumed(preset, name, text_tokens, f"{text_tokens:g} text tokens by --text-tokens")
    here = processor is not None
    if not preset.data.from_files:
        other = processor or build_processor(preset.model.vision_tower, build_tokenizer())
        return _generated(preset, name, other, "" if here else " with the embedded tokenizer: the preset's is not here")
    if not here:
        return _assumed(preset, name, None, "assumed: the preset's tokenizer is not on this machine")
    blocks: Sequence[SourceConfig] = getattr(preset.data, name)
    try:
        return _of_files(preset, blocks, processor)
    except DataError as error:
        if "no such file" not in str(error):
            raise
        return _assumed(preset, name, None, "assumed: the preset's data are not on this machine")


def _assumed(preset: PresetConfig, name: str, mean: float | None, source: str) -> Lengths:
    """Return one picture per example, and everything behind it a target: upper bounds but for the mean text."""
    visual = preset.model.vision_tower.num_tokens
    blocks: Sequence[SourceConfig] = getattr(preset.data, name)
    plain = bool(blocks) and all(block.prompt == "plain" for block in blocks)
    text: float
    text, longest = ASSUMED_TEXT["plain" if plain else "chat"]
    if mean is not None:
        text, longest = mean, round(longest / text * mean)
    limit = preset.data.max_length
    if limit is not None:
        longest = min(longest, limit - visual) if plain else limit - visual
    longest = max(longest, round(text))
    return Lengths(visual + text, visual + longest, text, longest, 1.0, 1, source)


def _generated(preset: PresetConfig, name: str, processor: Any, remark: str) -> Lengths:
    """Measure the examples that a run with seed 0 sees first."""
    stage: StageConfig = getattr(preset.train, name)
    data = TrainingData(preset.data)
    order = data_order(data, stage, name, seed=0)
    encode = Collator(processor, data).encode
    number = min(SAMPLE, stage.steps * stage.batch_size)
    rows = []
    for position in range(number):
        found = encode(order[position])
        rows.append((len(found.input_ids), _targets(found.labels), len(found.image_ids)))
    return _measured(rows, f"measured on the first {number} examples{remark}")


def _of_files(preset: PresetConfig, blocks: Sequence[SourceConfig], processor: Any) -> Lengths:
    """Measure records at even distances, without their pictures; what is malformed is left out here."""
    rows: list[tuple[int, int, int]] = []
    sources = [open_source(block) for block in blocks]
    total = sum(map(len, sources))
    for block, source in zip(blocks, sources, strict=True):
        template = chat_template(processor, block.prompt)
        number = max(1, round(SAMPLE * len(source) / total))
        for index in np.unique(np.linspace(0, len(source) - 1, number).round().astype(int)):
            try:
                record = source.record(int(index))
                encoded = encode_example(processor, record.messages, image_tokens(processor), template)
                ids, labels = truncate(*encoded, preset.data.max_length, processor.image_token_id)
            except DataError:
                continue
            rows.append((len(ids), _targets(labels), len(record.images)))
    if not rows:
        raise DataError(f"{blocks[0].path}: none of the examples that were looked at is well-formed")
    return _measured(rows, f"measured on {len(rows)} of {total:,} examples")


def _targets(labels: Sequence[int]) -> int:
    return sum(label != IGNORE_INDEX for label in labels[1:])


def _measured(rows: Sequence[tuple[int, int, int]], source: str) -> Lengths:
    tokens, targets, pictures = np.array(rows).T
    return Lengths(
        tokens=float(tokens.mean()),
        longest=int(tokens.max()),
        targets=float(targets.mean()),
        most_targets=int(targets.max()),
        pictures=float(pictures.mean()),
        most_pictures=int(pictures.max()),
        source=source,
    )
