"""What `prebench doctor` prints: the machine, a line per setting, the flips, and what to do about them."""

from __future__ import annotations

import dataclasses
import shutil
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

from prebench.errors import one_line
from prebench.evaluation.doctor import Flip, Report
from prebench.runtime import git_commit, hardware, versions

SHOWN_FLIPS = 10
SHOWN_CHARACTERS = 60
CONTEXT = 20
"""Characters before the first difference of two answers that are shown."""
ROUNDING = {"float32": 1e-3, "bfloat16": 1.0}
"""Margins up to this are explained by rounding: logits of 10 to 30, a hundred layers, the number's precision."""


def machine() -> dict[str, Any]:
    """Return what a report about an error needs: versions, hardware, free memory and disk, lmms-eval's view of us."""
    import psutil

    here = Path.cwd()
    return {
        "versions": versions(),
        "commit": git_commit(),
        "hardware": hardware(),
        "memory_available": int(psutil.virtual_memory().available),
        "disk_free": int(shutil.disk_usage(here).free),
        "disk": str(here),
        "lmms_eval_models": lmms_eval_models(),
    }


def lmms_eval_models() -> dict[str, str]:
    """Return, for each name that prebench registers with lmms-eval, "" or why lmms-eval can't load it."""
    names = [entry.name for entry in entry_points(group="lmms_eval.models") if entry.value.startswith("prebench.")]
    if not names:
        return {"prebench": "not registered; install prebench again (pip install -e .)"}
    found = {}
    for name in sorted(names):
        try:
            from lmms_eval.models import get_model

            get_model(name)
            found[name] = ""
        except (ImportError, AttributeError, ValueError, KeyError, RuntimeError) as error:
            found[name] = one_line(error)
    return found


def as_json(report: Report, model_dir: Path, about: dict[str, Any]) -> dict[str, Any]:
    """Return everything as plain JSON types."""
    values = dataclasses.asdict(report)
    return {"model": str(model_dir), "machine": about, **values, "advice": advice(report)}


def render(report: Report, model_dir: Path, about: dict[str, Any]) -> str:
    """Return the report for people."""
    packages = ", ".join(f"{name} {version}" for name, version in about["versions"].items())
    threads = f"{report.threads} thread{'s' * (report.threads > 1)}"
    kinds = ", ".join(f"{number} {kind}" for kind, number in report.kinds.items() if number)
    broken = [f"{name}: {reason}" for name, reason in about["lmms_eval_models"].items() if reason]
    resolved = [name for name, reason in about["lmms_eval_models"].items() if not reason]
    lines = [
        f"model       {model_dir}",
        f"versions    {packages}" + (f", commit {about['commit'][:12]}" * bool(about["commit"])),
        f"device      {report.device} ({about['hardware']['machine']}, {about['hardware']['cpus']} CPUs, {threads}), "
        f"{report.dtype}",
        f"free        memory {_gigabytes(about['memory_available'])}, disk {_gigabytes(about['disk_free'])} "
        f"({about['disk']})",
        f"lmms-eval   finds {', '.join(resolved) or 'no model of prebench'}",
        *(f"            does not find {line}" for line in broken),
        f"documents   {sum(report.kinds.values())}: {kinds}",
        *(f"            {line}" for line in report.left_out),
        "",
        *_table(report),
        "",
        *_flips(report),
        *advice(report),
    ]
    return "\n".join(lines)


def advice(report: Report) -> list[str]:
    """Return what to do, in sentences."""
    flips = report.flips
    total = sum(report.kinds.values())
    if not flips:
        bound = 1 - 0.05 ** (1 / total)
        return [
            f"No flips: in {report.dtype} on this device, answers depend neither on batch size nor order nor "
            f"processes, and they are those of model.generate. With {total} documents, a share of flips above "
            f"{bound:.2%} would have shown (95% confidence)."
        ]
    documents = len({flip.document for flip in flips})
    largest = max(flip.margin for flip in flips)
    share = f"{documents} of {total} answers depend on how they are computed (largest margin {largest:.2g})."
    if largest > ROUNDING.get(report.dtype, 0.0):
        return [
            share,
            f"This is more than rounding in {report.dtype}: please report it, with the file that --json writes. Until "
            "it is mended, ask one question at a time: lmms-eval --model_args ...,token_budget=1.",
        ]
    if report.dtype == "float32":
        return [share, "Their two best tokens are tied within float32's rounding; a score moves by that share at most."]
    return [
        share,
        f"Rounding in {report.dtype} decides where two tokens are nearly tied. Evaluate in float32 (lmms-eval "
        "--model_args ...,dtype=float32; check it with prebench doctor --dtype float32), or compare only models that "
        "were evaluated on one kind of device with one batch size, and expect differences of that share.",
    ]


def _table(report: Report) -> list[str]:
    width = max(len(result.setting) for result in report.results)
    rows = [f"{'setting':<{width}}  answers  answers/s  flips  largest margin"]
    for result in report.results:
        rate = f"{result.documents / result.seconds:.1f}" if result.seconds else ""
        margin = f"{max(flip.margin for flip in result.flips):.2g}" if result.flips else ""
        number = len(result.flips)
        rows.append(f"{result.setting:<{width}}  {result.documents:>7}  {rate:>9}  {number:>5}  {margin:>14}".rstrip())
    return rows


def _flips(report: Report) -> list[str]:
    by_document: dict[int, list[Flip]] = {}
    for flip in report.flips:
        by_document.setdefault(flip.document, []).append(flip)
    lines = []
    for flip, *others in list(by_document.values())[:SHOWN_FLIPS]:
        also = f" and {len(others)} more" if others else ""
        pairs = enumerate(zip(flip.expected, flip.found, strict=False))
        shared = next((place for place, (a, b) in pairs if a != b), min(len(flip.expected), len(flip.found)))
        lines += [
            f"document {flip.document}: {_short(flip.question)}, margin {flip.margin:.2g} ({flip.setting}{also})",
            f"  expected {_short(flip.expected, shared)}",
            f"  found    {_short(flip.found, shared)}",
        ]
    more = len(by_document) - SHOWN_FLIPS
    if more > 0:
        lines.append(f"... and {more} more documents (--json writes all)")
    return [*lines, ""] if lines else []


def _short(text: str, place: int = 0) -> str:
    """Quote a text's characters from a little before a place."""
    start = max(0, place - CONTEXT)
    cut = text[start : start + SHOWN_CHARACTERS]
    return repr("..." * (start > 0) + cut + "..." * (start + len(cut) < len(text)))


def _gigabytes(number: int) -> str:
    return f"{number / 1e9:.1f} GB"
