"""A report on training data: counts, lengths, truncations, text-only share, turns, and what has to be left out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from prebench.data.conversations import OpenedSource, Report, open_sources
from prebench.data.encoding import IGNORE_INDEX, encode_example
from prebench.data.examination import Examination, Finding
from prebench.data.examples import TrainingData
from prebench.data.records import Source
from prebench.data.visual_tokens import image_tokens
from prebench.schema import STAGES, DataConfig

SHOWN_BAD = 5
PERCENTILES = (0, 50, 95, 99, 100)
EMBEDDED_SEED = 0


@dataclass(frozen=True)
class SourceReport:
    """What is told of one source."""

    name: str
    stages: tuple[str, ...]
    examples: int
    bad: tuple[tuple[str, str], ...]
    """Where, and why."""
    text_only: int
    images: int
    turns: int
    truncated: int
    lengths: tuple[int, ...]
    """Tokens at PERCENTILES, before truncation."""
    targets: int

    def is_error(self, limit: float) -> bool:
        """Tell whether too much has to be left out."""
        return len(self.bad) > limit * self.examples or len(self.bad) == self.examples


def inspect(config: DataConfig, processor: Any, report: Report) -> list[SourceReport]:
    """Look at every example of a preset's data.

    Args:
        config: the preset's data.
        processor: tokenizer, chat template and image processor.
        report: called with a source's path, the examples done and in all.

    Raises:
        DataError: a source can't be read at all.
    """
    if config.from_files:
        return [_source_report(opened, config) for opened in open_sources(config, processor, None, report)]
    findings = _generated(TrainingData(config), processor)
    return [_tell("generated", STAGES, None, Examination(tuple(findings), ()), config)]


def _source_report(opened: OpenedSource, config: DataConfig) -> SourceReport:
    stages = tuple(name for name in STAGES if opened.config in getattr(config, name))
    return _tell(opened.config.path, stages, opened.source, opened.found, config)


def _tell(
    name: str, stages: Sequence[str], source: Source | None, found: Examination, config: DataConfig
) -> SourceReport:
    tokens = np.array([finding.tokens for finding in found.findings] or [0])
    limit = config.max_length
    return SourceReport(
        name=name,
        stages=tuple(stages),
        examples=found.total,
        bad=tuple((source.where(index), reason) for index, reason in found.bad) if source else (),
        text_only=sum(finding.images == 0 for finding in found.findings),
        images=sum(finding.images for finding in found.findings),
        turns=sum(finding.turns for finding in found.findings),
        truncated=0 if limit is None else int((tokens > limit).sum()),
        lengths=tuple(int(v) for v in np.percentile(tokens, PERCENTILES, method="nearest")),
        targets=sum(finding.targets for finding in found.findings),
    )


def _generated(data: TrainingData, processor: Any) -> list[Finding]:
    """Return what is known of each picture's questions, drawn once; they are drawn anew in training."""
    findings = []
    for index, image_id in enumerate(data.image_ids):
        messages = data.conversation(image_id, np.random.default_rng([EMBEDDED_SEED, index])).messages
        input_ids, labels = encode_example(processor, messages, image_tokens(processor))
        targets = sum(label != IGNORE_INDEX for label in labels[1:])
        findings.append(Finding(index, len(input_ids), targets, 1, len(messages) // 2, ""))
    return findings


def table(reports: Sequence[SourceReport], config: DataConfig) -> str:
    """Return the report as text."""
    lines = []
    for found in reports:
        good = found.examples - len(found.bad)
        per_good = max(1, good)
        lengths = ", ".join(
            f"{name} {value}" for name, value in zip(("min", "median", "95%", "99%", "max"), found.lengths, strict=True)
        )
        cut = "no limit" if config.max_length is None else f"{found.truncated} longer than {config.max_length} tokens"
        verdict = "ERROR: more than" if found.is_error(config.max_bad_share) else "at most"
        rows = {
            "examples": f"{found.examples:,} ({', '.join(found.stages)})",
            "text only": f"{found.text_only:,} ({found.text_only / per_good:.1%})",
            "pictures": f"{found.images:,}",
            "answers": f"{found.turns:,} ({found.turns / per_good:.1f} per example)",
            "tokens": lengths,
            "targets": f"{found.targets:,} ({found.targets / per_good:.1f} per example)",
            "truncated": cut,
            "left out": f"{len(found.bad):,} ({verdict} data.max_bad_share {config.max_bad_share:.2%})",
        }
        lines += [found.name, *(f"  {name:<10} {value}" for name, value in rows.items())]
        lines += [f"    {where}: {reason}" for where, reason in found.bad[:SHOWN_BAD]]
        if len(found.bad) > SHOWN_BAD:
            lines.append(f"    and {len(found.bad) - SHOWN_BAD} more (--json lists them)")
    return "\n".join(lines)


def as_json(reports: Sequence[SourceReport]) -> list[Mapping[str, Any]]:
    """Return the report for a file, every example that is left out included."""
    return [
        {**vars(found), "bad": [{"where": where, "reason": reason} for where, reason in found.bad]} for found in reports
    ]


def file_config(path: Path, image_root: Path | None, max_length: int | None) -> DataConfig:
    """Return the data block of a file alone: LLaVA's JSON, or a Parquet table in the schema that its columns tell.

    Raises:
        DataError: it is neither.
    """
    from prebench.errors import DataError

    if path.suffix in (".json", ".jsonl"):
        block: dict[str, Any] = {"type": "llava_json", "path": str(path)}
        if image_root is not None:
            block["image_root"] = str(image_root)
    elif path.suffix == ".parquet":
        import pyarrow as pa
        import pyarrow.parquet as pq

        try:
            columns = pq.read_schema(path).names
        except (OSError, pa.ArrowInvalid) as error:
            raise DataError(f"{path}: can't be read as Parquet ({' '.join(str(error).split())[:200]})") from error
        block = {"type": "messages" if "messages" in columns else "cauldron", "path": str(path)}
    else:
        raise DataError(f"{path}: a preset (.yaml), LLaVA's JSON (.json, .jsonl) or a table (.parquet) is expected")
    return DataConfig.model_validate({"instruct": [block], "max_length": max_length})
