"""Training examples from files: LLaVA's JSON and tables, as the examples that generated data give.

Every example is looked at once before training (`prebench.data.examination`). What is bad is left out and listed;
a picture that fails later, in training, is an error: nothing takes its place silently.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from prebench.data import image_files
from prebench.data.examination import Examination, combined, examine
from prebench.data.examples import Example, TrainingData, ValidationQuestion
from prebench.data.llava_json import LlavaJson
from prebench.data.records import Source
from prebench.data.visual_tokens import image_tokens
from prebench.errors import ConfigError, DataError
from prebench.records import content_hash
from prebench.schema import DataConfig, LlavaJsonConfig, SourceConfig
from prebench.store import write_jsonl

QUARANTINE = "quarantine.jsonl"

Report = Callable[[str, int, int], None]


@dataclass(frozen=True)
class OpenedSource:
    """One block of the preset: its records and what was found in them."""

    config: SourceConfig
    source: Source
    found: Examination


def open_source(config: SourceConfig) -> Source:
    """Open the files that a block of the preset names.

    Raises:
        DataError: they can't be read.
    """
    if isinstance(config, LlavaJsonConfig):
        return LlavaJson(config)
    from prebench.data.tables import Table  # the import of `datasets` takes a second

    return Table(config)


def open_sources(
    config: DataConfig, processor: Any, cache: Path | None, report: Report = lambda title, done, total: None
) -> list[OpenedSource]:
    """Open and examine every source of a preset; a block that both stages name is examined once.

    Args:
        config: the preset's data.
        processor: tokenizer, chat template and image processor.
        cache: where findings are kept.
        report: called with a source's path, the examples done and in all.

    Raises:
        DataError: a source can't be read.
    """
    opened = []
    for block in dict.fromkeys((*config.align, *config.instruct)):
        source = open_source(block)
        path = block.path

        def progress(done: int, total: int, path: str = path) -> None:
            report(path, done, total)

        found = examine(source, block, config, processor, image_tokens(processor), cache, progress)
        opened.append(OpenedSource(block, source, found))
    return opened


class ConversationData:
    """The training data of a preset whose examples come from files.

    Args:
        config: the preset's data.
        processor: the study's.
        cache: the study's folder for what can be computed again; None keeps nothing.
        report: called with a source's path, the examples done and in all.

    Raises:
        DataError: a source can't be read, or too many of its examples are bad.
    """

    def __init__(
        self,
        config: DataConfig,
        processor: Any,
        cache: Path | None = None,
        report: Report = lambda title, done, total: None,
    ) -> None:
        self.config = config
        self.sources = open_sources(config, processor, cache, report)
        for opened in self.sources:
            opened.found.require_few_bad(opened.source, config.max_bad_share)
        self._color: tuple[int, int, int] | None = None
        if config.pad_to_square:
            mean = processor.image_processor.image_mean
            self._color = (int(mean[0] * 255), int(mean[1] * 255), int(mean[2] * 255))

    @cached_property
    def image_ids(self) -> list[str]:
        """Names of all pictures, for `image`."""
        return [name for number in range(len(self.sources)) for name in self._image_ids(number)]

    def stage(self, name: str) -> StageData:
        """Return the examples of a stage, `align` or `instruct`."""
        blocks = getattr(self.config, name)
        return StageData(self, [n for n, opened in enumerate(self.sources) if opened.config in blocks])

    def example(self, source: int, index: int) -> Example:
        """Return an example by the number of its source and its index in it.

        Raises:
            DataError: it changed since it was looked at.
        """
        opened = self.sources[source]
        record = opened.source.record(index)
        names = tuple(f"{source}:{index}:{name}" for name in record.images)
        return Example(names, record.messages, "questions", opened.config.prompt)

    def image(self, image_id: str) -> Image.Image:
        """Read a picture (RGB; a square where the preset pads).

        Raises:
            DataError: it can't be read.
        """
        number, index, name = image_id.split(":", 2)
        source = self.sources[int(number)].source
        try:
            image = image_files.decode(source.image(int(index), name), name)
        except DataError as error:
            raise DataError(f"{source.where(int(index))}: {error}") from error
        return image if self._color is None else image_files.pad_to_square(image, self._color)

    def validation(self, _num_images: int) -> list[ValidationQuestion]:
        """Refuse: files have no held-out questions.

        Raises:
            ConfigError: always.
        """
        raise ConfigError("train.validate_every: only generated data have held-out questions; set it to 0")

    def fingerprint(self) -> str:
        """Return a hash of the configuration and of all texts and pictures."""
        return content_hash([self.config.model_dump(mode="json"), combined([o.found for o in self.sources])])

    def write_quarantine(self, path: Path) -> int:
        """List the examples that are left out, with their reasons, in a file; return their number."""
        lines = [
            {"source": opened.config.path, "index": index, "where": opened.source.where(index), "reason": reason}
            for opened in self.sources
            for index, reason in opened.found.bad
        ]
        if lines:
            write_jsonl(path, lines)
        return len(lines)

    def _image_ids(self, source: int) -> list[str]:
        opened = self.sources[source]
        with_images = (finding.index for finding in opened.found.findings if finding.images)
        return [f"{source}:{i}:{name}" for i in with_images for name in opened.source.record(i).images]


class StageData(Sequence[Example]):
    """The examples of one stage, those of its sources one after the other."""

    def __init__(self, data: ConversationData, sources: Sequence[int]) -> None:
        self._data = data
        findings = [data.sources[n].found.findings for n in sources]
        self._source = np.repeat(sources, [len(part) for part in findings])
        self._index = np.array([finding.index for part in findings for finding in part], dtype=np.int64)
        self.lengths = np.array([finding.tokens for part in findings for finding in part], dtype=np.int64)
        """[n] tokens, visual tokens included, cut at max_length."""
        if data.config.max_length is not None:
            self.lengths = self.lengths.clip(max=data.config.max_length)
        self.has_images = np.array([finding.images > 0 for part in findings for finding in part], dtype=bool)
        """[n]"""

    def __len__(self) -> int:
        return len(self._index)

    def __getitem__(self, position: Any) -> Any:
        """Return an example."""
        return self._data.example(int(self._source[position]), int(self._index[position]))


def open_data(
    config: DataConfig,
    processor: Any,
    cache: Path | None = None,
    report: Report = lambda title, done, total: None,
) -> TrainingData | ConversationData:
    """Return a preset's training data, generated or from files; arguments and errors: `ConversationData`."""
    if config.from_files:
        return ConversationData(config, processor, cache, report)
    return TrainingData(config)
