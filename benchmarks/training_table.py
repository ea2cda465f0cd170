"""The table that the training benchmark prints."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from clock import PARTS, Block
from scipy import stats

from prebench.runtime import hardware, versions
from prebench.schema import StageConfig


@dataclass
class Machine:
    """What the table says above its rows."""

    threads: int
    gemm_peak: float
    """FLOP/s."""
    flops: float
    """Of matrix products per step of `none`."""
    stage: StageConfig


def _ratio(above: list[Block], below: list[Block]) -> str:
    """Return the ratio of seconds per step, within rounds: geometric mean and 95% t interval."""
    logs = np.log([a.seconds / b.seconds for a, b in zip(above, below, strict=True)])
    mean = float(logs.mean())
    if len(logs) < 2:
        return f"{np.exp(mean):.3f}"
    half = float(stats.t.ppf(0.975, len(logs) - 1) * logs.std(ddof=1) / np.sqrt(len(logs)))
    return f"{np.exp(mean):.3f} [{np.exp(mean - half):.3f}, {np.exp(mean + half):.3f}]"


def _processor(device: str, threads: int) -> str:
    return hardware()["gpu"] if device == "cuda" else f"cpu ({threads} threads of {hardware()['machine']})"


def table(
    args: argparse.Namespace, machine: Machine, blocks: dict[str, list[Block]], pairs: Sequence[tuple[str, str]]
) -> str:
    """Return a row per system, and the ratio of each pair.

    Args:
        args: the command's options.
        machine: where it ran.
        blocks: of each system, one a round.
        pairs: systems to be set in relation.
    """
    stage, used = machine.stage, versions()
    software = ", ".join(f"{name} {used[name]}" for name in ("torch", "transformers") if name in used)
    lines = [
        f"## {args.architecture or 'embedded'}, {args.input}",
        "",
        f"{args.dtype} on {_processor(args.device, machine.threads)}; "
        f"{stage.batch_size} examples per step in {stage.gradient_accumulation_steps} micro-batches; {args.rounds} "
        f"rounds of {args.steps} steps; {machine.flops / 1e9:.1f} GFLOP of matrix products per step of `none`; "
        f"GEMM peak {machine.gemm_peak / 1e9:.1f} GFLOP/s; {software}.",
        "",
        "| system | samples/s | share of GEMM peak | forward + backward + optimiser | outside |",
        "| --- | ---: | ---: | ---: | ---: |",
    ]
    for name, found in blocks.items():
        seconds = float(np.median([block.seconds for block in found]))
        row = [name, f"{stage.batch_size / seconds:.2f}", f"{machine.flops / seconds / machine.gemm_peak:.1%}"]
        if sum(found[0].parts.values()) > 0:  # the trainers do not call what is timed
            inside = [float(np.median([block.parts[part] for block in found])) for part in PARTS]
            outside = float(np.median([1 - sum(block.parts.values()) for block in found]))
            row += [" + ".join(f"{share:.1%}" for share in inside), f"{outside:.1%}"]
        else:
            row += ["", ""]
        lines.append(f"| {' | '.join(row)} |")
    lines += ["", f"Seconds per step ({args.clock} time), ratio within rounds: "]
    told = [f"{a} / {b} {_ratio(blocks[a], blocks[b])}" for a, b in pairs if a in blocks and b in blocks]
    return "\n".join(lines) + "; ".join(told) + "."
