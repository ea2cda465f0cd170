"""Questions per second of prebench's engine, of lmms-eval's `llava_hf`, and of plain batched `model.generate`.

    python benchmarks/evaluation.py                              the newest exported model under results/
    python benchmarks/evaluation.py --architecture smollm2       random weights of SmolLM2-135M's architecture

The same checkpoint, documents and process; rounds are interleaved, so that a load of the machine meets all systems, and
ratios are taken within a round. Every round asks about pictures that no round before has shown. Peak memory is that of
a process with one system alone. Results go to docs/evaluation_speed.md and docs/figures/, each run into a part of its
own.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import torch
from documents import documents, export_smollm2
from report import Measurement, Run, write_report
from systems import PlainGenerate, System, engine_system, llava_hf_system

from prebench.errors import ModelError, PrebenchError
from prebench.runtime import choose_device, data_dir

ROOT = Path(__file__).resolve().parent.parent
ENGINE, LLAVA_HF, PLAIN = "prebench", "llava_hf", "plain generate"


def main() -> None:
    """Run the benchmark and write the report."""
    args = _arguments()
    try:
        with tempfile.TemporaryDirectory(prefix="prebench-benchmark-") as folder:
            model_dir = _model(args, Path(folder))
            if args.memory_of:
                print(json.dumps(_peak_memory(args, model_dir)))
                return
            run = _measure(args, model_dir)
        print(write_report(run, args.output))
    except PrebenchError as error:
        sys.exit(f"benchmarks/evaluation.py: {error}")


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--model", type=Path, help="exported folder; default: the newest under results/")
    parser.add_argument("--architecture", choices=["smollm2"], help="random weights of this architecture instead")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--questions-per-image", type=int, nargs="+", default=[1, 4, 32])
    parser.add_argument("--rounds", type=int, help="rounds per number of questions; default 5, smollm2: 3")
    parser.add_argument("--questions", type=int, help="questions per round and system; default 512, smollm2: 64")
    parser.add_argument("--batch-size", type=int, help="of plain generate; default 32, smollm2: 16")
    parser.add_argument("--max-new-tokens", type=int, help="default 16; smollm2, which never ends an answer: 4")
    parser.add_argument("--output", type=Path, default=ROOT / "docs", help="folder of the report")
    parser.add_argument("--memory-of", choices=[ENGINE, LLAVA_HF, PLAIN], help=argparse.SUPPRESS)
    args = parser.parse_args()
    small = args.architecture is None
    for name, value in {
        "rounds": 5 if small else 3,
        "questions": 512 if small else 64,
        "batch_size": 32 if small else 16,
        "max_new_tokens": 16 if small else 4,
    }.items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    args.device = str(choose_device(args.device))
    return args


def _model(args: argparse.Namespace, folder: Path) -> Path:
    """Return the model's folder.

    Raises:
        ModelError: there is no exported model under results/.
    """
    if args.model is not None:
        return args.model
    if args.architecture is not None:
        export_smollm2(folder)
        args.model = folder
        return folder
    results = data_dir("configs").parent / "results"
    found = sorted(results.glob("*/runs/*/model/model.safetensors"), key=lambda path: path.stat().st_mtime)
    if not found:
        raise ModelError(f"{results}: no exported model; `prebench run` makes one, or name a folder with --model")
    args.model = found[-1].parent
    return args.model


def _systems(args: argparse.Namespace, model_dir: Path) -> dict[str, Callable[[], System]]:
    limit = args.max_new_tokens
    return {
        ENGINE: lambda: engine_system(model_dir, args.device, limit),
        LLAVA_HF: lambda: llava_hf_system(model_dir, args.device, limit),
        PLAIN: lambda: PlainGenerate(model_dir, args.device, limit, args.batch_size),
    }


def _measure(args: argparse.Namespace, model_dir: Path) -> Run:
    systems = {name: load() for name, load in _systems(args, model_dir).items()}
    plain = systems[PLAIN]
    assert isinstance(plain, PlainGenerate)
    for system in systems.values():
        system(documents(2, 4, first_scene=1_000_000))  # the first call is slow for reasons of its own
    measurements = []
    scene = 0
    for questions in args.questions_per_image:
        for round_number in range(args.rounds):
            num_images = max(1, args.questions // questions)
            rows = documents(num_images, questions, scene)
            scene += num_images
            seconds, answers = {}, {}
            names = list(systems)
            for name in names[round_number % 3 :] + names[: round_number % 3]:
                start = time.perf_counter()
                answers[name] = systems[name](rows)
                seconds[name] = time.perf_counter() - start
            same = {
                name: sum(a == b for a, b in zip(answers[ENGINE], answers[name], strict=True))
                for name in names
                if name != ENGINE
            }
            measurements.append(Measurement(questions, len(rows), plain.new_tokens, seconds, same))
            _say(measurements[-1])
    return Run(
        title=args.architecture or "embedded",
        model=model_dir.name if args.architecture is None else "random weights",
        device=args.device,
        threads=torch.get_num_threads(),
        batch_size=args.batch_size,
        max_new_tokens=args.max_new_tokens,
        measurements=measurements,
        memory={name: _memory_in_child(args, name, model_dir) for name in systems},
    )


def _memory_in_child(args: argparse.Namespace, system: str, model_dir: Path) -> dict[str, float]:
    """Return MB before and at the peak of one round with 32 questions per image, in a process of its own."""
    command = [sys.executable, __file__, "--memory-of", system, "--model", str(model_dir), "--device", args.device]
    for name in ("questions", "batch_size", "max_new_tokens"):
        command += [f"--{name.replace('_', '-')}", str(getattr(args, name))]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)  # noqa: S603
    return json.loads(done.stdout.splitlines()[-1])


def _peak_memory(args: argparse.Namespace, model_dir: Path) -> dict[str, float]:
    system = _systems(args, model_dir)[args.memory_of]()
    rows = documents(max(1, args.questions // 32), 32)
    if not args.device.startswith("cuda"):
        Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")  # what loading took is no part of the peak
    before = _peak(args.device)
    system(rows)
    return {"loaded": before, "peak": _peak(args.device)}


def _peak(device: str) -> float:
    if device.startswith("cuda"):
        return torch.cuda.max_memory_allocated() / 1e6
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()  # getrusage counts the parent, too
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) / 1e3


def _say(found: Measurement) -> None:
    speeds = ", ".join(f"{name} {found.questions / seconds:.1f}" for name, seconds in found.seconds.items())
    same = ", ".join(f"{name} {count}" for name, count in found.same.items())
    sys.stderr.write(
        f"{found.questions_per_image:2} per image: questions/s: {speeds}; of {found.questions} answers equal: {same}\n"
    )


if __name__ == "__main__":
    main()
