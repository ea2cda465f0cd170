"""Questions per second of prebench's engine, of lmms-eval's `llava_hf`, and of plain batched `model.generate`.

    python benchmarks/evaluation.py                              the newest exported model under results/
    python benchmarks/evaluation.py --architecture smollm2       random weights of SmolLM2-135M's architecture

The same checkpoint and documents; each system in a process of its own, with the settings that it makes there, as its
users run it (the engine's would change the others' speed). Rounds are interleaved, so that a load of the machine meets
all systems, and ratios are taken within a round. Every round asks about pictures that no round before has shown.
Results go to docs/evaluation_speed.md and docs/figures/, each run into a part of its own.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from contextlib import ExitStack
from pathlib import Path

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import torch
from documents import export_smollm2
from report import Measurement, Run, write_report
from systems import ENGINE, PLAIN, SYSTEMS, Settings, SystemProcess

from prebench.errors import ModelError, PrebenchError
from prebench.runtime import choose_device, data_dir

ROOT = Path(__file__).resolve().parent.parent


def main() -> None:
    """Run the benchmark and write the report."""
    args = _arguments()
    try:
        with tempfile.TemporaryDirectory(prefix="prebench-benchmark-") as folder:
            model_dir = _model(args, Path(folder))
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
    parser.add_argument("--rounds", type=int, help="rounds per number of questions; default 3")
    parser.add_argument("--questions", type=int, help="questions per round and system; default 2048, smollm2: 128")
    parser.add_argument("--batch-size", type=int, help="of plain generate; default 32, smollm2: 16")
    parser.add_argument("--max-new-tokens", type=int, help="default 16; smollm2, which never ends an answer: 4")
    parser.add_argument("--output", type=Path, default=ROOT / "docs", help="folder of the report")
    args = parser.parse_args()
    small = args.architecture is None
    for name, value in {
        "rounds": 3,
        "questions": 2048 if small else 128,
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


def _measure(args: argparse.Namespace, model_dir: Path) -> Run:
    settings = Settings(str(model_dir), args.device, args.max_new_tokens, args.batch_size)
    with ExitStack() as stack:
        systems = {name: stack.enter_context(SystemProcess(name, settings)) for name in SYSTEMS}
        for system in systems.values():
            system.answer(2, 4, 1_000_000)  # the first call is slow for reasons of its own
        memory = {name: system.memory(max(1, args.questions // 32), 32, 2_000_000) for name, system in systems.items()}
        measurements = []
        scene = 0
        for questions in args.questions_per_image:
            for round_number in range(args.rounds):
                num_images = max(1, args.questions // questions)
                measurements.append(_round(systems, round_number, num_images, questions, scene))
                scene += num_images
                _say(measurements[-1])
    return Run(
        title=args.architecture or "embedded",
        model=model_dir.name if args.architecture is None else "random weights",
        device=args.device,
        threads=torch.get_num_threads(),
        batch_size=args.batch_size,
        max_new_tokens=args.max_new_tokens,
        measurements=measurements,
        memory=memory,
    )


def _round(
    systems: dict[str, SystemProcess], round_number: int, num_images: int, questions: int, first_scene: int
) -> Measurement:
    """Let the systems answer the same documents one after the other, another one first in each round."""
    names = list(systems)
    start = round_number % len(names)
    found = {name: systems[name].answer(num_images, questions, first_scene) for name in names[start:] + names[:start]}
    expected = found[ENGINE].answers
    same = {
        name: sum(a == b for a, b in zip(expected, found[name].answers, strict=True))
        for name in names
        if name != ENGINE
    }
    seconds = {name: answered.seconds for name, answered in found.items()}
    return Measurement(questions, len(expected), found[PLAIN].new_tokens, seconds, same)


def _say(found: Measurement) -> None:
    speeds = ", ".join(f"{name} {found.questions / seconds:.1f}" for name, seconds in found.seconds.items())
    same = ", ".join(f"{name} {count}" for name, count in found.same.items())
    sys.stderr.write(
        f"{found.questions_per_image:2} per image: questions/s: {speeds}; of {found.questions} answers equal: {same}\n"
    )


if __name__ == "__main__":
    main()
