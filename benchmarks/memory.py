"""Peak memory (PSS of the process tree) of the engine on an iterator of documents, for more and more documents.

    python benchmarks/memory.py [--documents 500 5000 50000] [--model DIR]

Every number of documents is answered in a process of its own; its memory is looked at ten times per second. Without a
model a small random one is made. Pictures are drawn as they are asked for, four questions about each.

The libraries' pages are shared with every other process that has loaded them, so that the whole PSS also tells how many
of those there are. What the engine itself keeps is anonymous memory, which has a column of its own. Linux only.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import psutil

QUESTIONS_PER_IMAGE = 4
INTERVAL = 0.1


def main() -> None:
    """Measure and print a table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--documents", type=int, nargs="+", default=[500, 5000, 50_000])
    parser.add_argument("--model", type=Path)
    parser.add_argument("--answer", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--make", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.make is not None:
        _small_model(args.make)
        return
    if args.answer is not None:
        _answer(args.model, args.answer)
        return
    with tempfile.TemporaryDirectory(prefix="prebench-benchmark-") as folder:
        model_dir = args.model or Path(folder)
        if args.model is None:  # in a process that ends: this one would share torch's pages with those it looks at
            subprocess.run([sys.executable, __file__, "--make", folder], check=True)  # noqa: S603
        print("| documents | peak PSS in MB | anonymous alone | seconds |\n| ---: | ---: | ---: | ---: |", flush=True)
        for number in args.documents:
            start = time.perf_counter()
            whole, anonymous = _peak([sys.executable, __file__, "--model", str(model_dir), "--answer", str(number)])
            seconds = time.perf_counter() - start
            print(f"| {number} | {whole / 1e6:.1f} | {anonymous / 1e6:.1f} | {seconds:.0f} |", flush=True)


def _peak(command: list[str]) -> tuple[int, int]:
    """Run a command; return the largest PSS of it and its children, in bytes: of all pages, of anonymous ones alone."""
    child = subprocess.Popen(command)  # noqa: S603
    process, peaks = psutil.Process(child.pid), [0, 0]
    while child.poll() is None:
        with contextlib.suppress(psutil.Error, OSError):  # one has ended meanwhile
            found = [_pss(one.pid) for one in (process, *process.children(recursive=True))]
            peaks = [max(peak, sum(values)) for peak, values in zip(peaks, zip(*found, strict=True), strict=True)]
        time.sleep(INTERVAL)
    if child.returncode:
        sys.exit(f"benchmarks/memory.py: {command} failed with code {child.returncode}")
    return peaks[0], peaks[1]


def _pss(pid: int) -> tuple[int, int]:
    """Return the PSS of a process, and that of its anonymous pages, in bytes."""
    lines = Path(f"/proc/{pid}/smaps_rollup").read_text(encoding="utf-8").splitlines()[1:]
    sizes = {name: int(size.split()[0]) * 1024 for name, size in (line.split(":") for line in lines)}
    return sizes["Pss"], sizes["Pss_Anon"]


def _small_model(folder: Path) -> None:
    from prebench.model.builder import build_model, build_processor, build_tokenizer
    from prebench.schema import ModelConfig

    tower = {"pretrained": None, "hidden_size": 32, "num_hidden_layers": 1, "intermediate_size": 64, "image_size": 96}
    language_model = {"pretrained": None, "hidden_size": 32, "num_hidden_layers": 2, "intermediate_size": 64}
    config = ModelConfig.model_validate({"vision_tower": tower | {"patch_size": 16}, "language_model": language_model})
    tokenizer = build_tokenizer()
    build_model(config, tokenizer, seed=0).save_pretrained(folder)
    build_processor(config.vision_tower, tokenizer).save_pretrained(folder)


def _answer(model_dir: Path, num_documents: int) -> None:
    from prebench.evaluation.engine import Engine

    engine = Engine(model_dir, device="cpu", dtype="float32")
    answered = sum(answer.error is None for answer in engine.generate(_requests(num_documents)))
    if answered != num_documents:
        sys.exit(f"{num_documents - answered} of {num_documents} documents failed")
    os._exit(0)  # what libraries load to shut themselves down is no part of answering


def _requests(num_documents: int) -> Iterator:
    from prebench.data.scenes import generate_scene, render
    from prebench.evaluation.generation import GenerationRequest

    for number in range(num_documents):
        if number % QUESTIONS_PER_IMAGE == 0:
            picture = render(generate_scene(0, "test", number // QUESTIONS_PER_IMAGE))[0]
        content = [{"type": "image", "image": picture}, {"type": "text", "text": f"what is number {number}?"}]
        yield GenerationRequest(number, [{"role": "user", "content": content}], 8)


if __name__ == "__main__":
    main()
