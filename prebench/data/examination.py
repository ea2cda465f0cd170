"""Every example of a source looked at once, before training: lengths, pictures, and what has to be left out.

What is found is kept in a file, so that a second run does not look again. An example that is left out is listed with
its reason; more of them than the preset allows is an error.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from prebench.data import image_files
from prebench.data.chat_templates import chat_template
from prebench.data.encoding import IGNORE_INDEX, encode_example
from prebench.data.records import Record, Source
from prebench.errors import DataError, StoreError
from prebench.images import whole_images
from prebench.records import content_hash
from prebench.runtime import available_cores
from prebench.schema import DataConfig, SourceConfig
from prebench.store import read_json, write_json

VERSION = 1
CHUNK = 512
"""Examples looked at between two reports."""


@dataclass(frozen=True)
class Finding:
    """What is known of one example."""

    index: int
    """In its source."""
    tokens: int
    """Before truncation, visual tokens included."""
    targets: int
    """Tokens that carry loss, after truncation."""
    images: int
    turns: int
    """Answers."""
    digest: str
    """Content hash of its texts and pictures."""


@dataclass(frozen=True)
class Examination:
    """What was found in one source."""

    findings: tuple[Finding, ...]
    """The examples that can be trained on."""
    bad: tuple[tuple[int, str], ...]
    """Index and reason of those that can't."""

    @property
    def total(self) -> int:
        """Return the number of examples."""
        return len(self.findings) + len(self.bad)

    def require_few_bad(self, source: Source, limit: float) -> None:
        """Refuse a source of which too much has to be left out.

        Raises:
            DataError: more than `limit` of the examples, or all of them, are bad; the first is named.
        """
        if len(self.bad) > limit * self.total or not self.findings:
            index, reason = self.bad[0]
            raise DataError(
                f"{source.where(index)}: {reason}; {len(self.bad)} of {self.total} examples are bad, more than "
                f"data.max_bad_share {limit:g}; `prebench doctor --data` lists them"
            )


def examine(
    source: Source,
    config: SourceConfig,
    data: DataConfig,
    processor: Any,
    num_image_tokens: int,
    folder: Path | None = None,
    report: Callable[[int, int], None] = lambda done, total: None,
) -> Examination:
    """Look at every example of a source, or read what an earlier look found.

    Args:
        source: the examples.
        config: the source's block.
        data: length limit and how pictures are checked.
        processor: tokenizer and chat template.
        num_image_tokens: visual tokens of a picture.
        folder: where findings are kept; None keeps none.
        report: called with examples done and in all.
    """
    settings = [VERSION, config.model_dump(mode="json"), data.max_length, data.check_images, source.key]
    tokenizer = processor.tokenizer.backend_tokenizer.to_str()
    template = chat_template(processor, config.prompt)
    key = content_hash([settings, tokenizer, template, num_image_tokens])
    path = None if folder is None else folder / f"examined-{key}.json"
    known = None if path is None else _read(path)
    if known is None:
        look = _Look(source, config, data, processor, num_image_tokens)
        known = look.all(report)
        if path is not None:
            values = {"findings": [list(asdict(f).values()) for f in known.findings], "bad": known.bad}
            write_json(path, values)
    return known


def _read(path: Path) -> Examination | None:
    """Return earlier findings; None where there are none, or they are damaged (they can be found again)."""
    if not path.is_file():
        return None
    try:
        values = read_json(path)
        bad = tuple((int(index), str(reason)) for index, reason in values["bad"])
        return Examination(tuple(Finding(*row) for row in values["findings"]), bad)
    except (StoreError, KeyError, TypeError, ValueError):
        return None


@dataclass
class _Look:
    source: Source
    config: SourceConfig
    data: DataConfig
    processor: Any
    num_image_tokens: int

    def all(self, report: Callable[[int, int], None]) -> Examination:
        findings: list[Finding] = []
        bad: list[tuple[int, str]] = []
        total = len(self.source)
        # Threads suffice: decoding pictures takes most of the time, and releases Python's lock.
        with whole_images(), ThreadPoolExecutor(available_cores()) as pool:
            for first in range(0, total, CHUNK):
                for found in pool.map(self._one, range(first, min(first + CHUNK, total))):
                    findings.append(found) if isinstance(found, Finding) else bad.append(found)
                report(min(first + CHUNK, total), total)
        return Examination(tuple(findings), tuple(bad))

    def _one(self, index: int) -> Finding | tuple[int, str]:
        try:
            record = self.source.record(index)
            template = chat_template(self.processor, self.config.prompt)
            input_ids, labels = encode_example(self.processor, record.messages, self.num_image_tokens, template)
            kept = truncate(input_ids, labels, self.data.max_length, self.processor.image_token_id)[1]
            targets = sum(label != IGNORE_INDEX for label in kept[1:])
            if not targets:
                raise DataError(f"nothing to learn is left of {len(input_ids)} tokens at max_length")
            digests = [self._picture(index, name) for name in record.images]
        except DataError as error:
            return index, str(error)
        digest = content_hash([record.messages, digests])
        return Finding(index, len(input_ids), targets, len(record.images), _turns(record), digest)

    def _picture(self, index: int, name: str) -> str:
        content = self.source.image(index, name)
        return image_files.check(content, name, self.data.check_images == "decode")


def truncate(
    input_ids: list[int], labels: list[int], max_length: int | None, image_token_id: int
) -> tuple[list[int], list[int]]:
    """Return (input_ids, labels) cut off at a length.

    Raises:
        DataError: the cut would take visual tokens.
    """
    if max_length is None or len(input_ids) <= max_length:
        return input_ids, labels
    if image_token_id in input_ids[max_length:]:
        raise DataError(f"max_length {max_length} would cut off visual tokens ({len(input_ids)} tokens)")
    return input_ids[:max_length], labels[:max_length]


def combined(parts: Sequence[Examination]) -> str:
    """Return one content hash of all examples."""
    digest = hashlib.sha256()
    for part in parts:
        for finding in part.findings:
            digest.update(finding.digest.encode())
        digest.update(b"\n")
    return digest.hexdigest()[:16]


def _turns(record: Record) -> int:
    return sum(message["role"] == "assistant" for message in record.messages)
