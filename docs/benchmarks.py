"""Rewrite the table of docs/benchmarks.md from the declared protocols: `python docs/benchmarks.py`."""

from __future__ import annotations

import sys
from pathlib import Path

from prebench.evaluation.protocols import PAPER, PROTOCOLS, UPSTREAM, Protocol
from prebench.store import write_text

PAGE = Path(__file__).parent / "benchmarks.md"
BEGIN = "<!-- protocols: begin -->"
END = "<!-- protocols: end -->"
HEADER = (
    "Benchmark, task",
    "Data set, split, documents",
    "Primary metric",
    "A document's score",
    "Upstream's aggregate of these scores",
    "Cluster",
    "Category",
    "Prompt ends with",
    "OCR tokens",
    "Parser",
    "LLaVA-1.5-7B in print",
    "Why that differs",
    "Upstream's defects, and what is done",
)


def block() -> str:
    """Return the table, markers included, as Markdown."""
    rows = [HEADER, ("---",) * len(HEADER), *(_cells(PROTOCOLS[name]) for name in PAPER)]
    lines = ["| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in rows]
    return "\n".join([BEGIN, f"Seen with lmms-eval {UPSTREAM}.", "", *lines, END])


def _cells(protocol: Protocol) -> tuple[str, ...]:
    ocr = {None: "none in the data", False: "not shown", True: "shown"}[protocol.ocr_tokens]
    cluster = f"`{protocol.image_id}`" if protocol.image_id else f"content of `{protocol.picture}`"
    if protocol.question_column:
        cluster += f" of the question's first document (question: `{protocol.question_column}`)"
    return (
        f"**{protocol.benchmark}** `{protocol.task}`",
        f"`{protocol.data_set}` {protocol.split}, {protocol.num_docs:,}",
        f"`{protocol.metric}`",
        protocol.score,
        protocol.aggregate,
        cluster,
        f"`{protocol.category}`" if protocol.category else "",
        " / ".join(protocol.prompt) or "nothing more",
        ocr,
        protocol.parser,
        protocol.published or "",
        protocol.difference,
        protocol.deviation or "none known",
    )


def rewritten(text: str) -> str:
    """Return the page with its table replaced."""
    before, rest = text.split(BEGIN)
    return before + block() + rest.split(END)[1]


def main() -> int:
    """Rewrite the page."""
    write_text(PAGE, rewritten(PAGE.read_text(encoding="utf-8")))
    return 0


if __name__ == "__main__":
    sys.exit(main())
