"""Table and plot of a benchmark run, written into the run's part of docs/evaluation_speed.md."""

from __future__ import annotations

import io
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import matplotlib
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure

from prebench.analysis.plots import STYLE
from prebench.runtime import hardware, versions
from prebench.store import write_bytes, write_text

ENGINE = "prebench"
COLOURS = {"prebench": "#0072B2", "llava_hf": "#D55E00", "plain generate": "#009E73"}
HEADING = """# Speed of the evaluation

Made by `python benchmarks/evaluation.py` (the newest exported model) and
`python benchmarks/evaluation.py --architecture smollm2` (random weights of SmolLM2-135M's architecture, 196 visual
tokens, a small vision tower); see there for what is compared. Each system runs in a process of its own, with the
settings that it makes there. Ratios are taken within a round, in which all systems answer the same documents one after
the other: median, and the smallest and largest round in brackets. Questions per second are medians over rounds.
"""


@dataclass(frozen=True)
class Measurement:
    """One round: all systems on the same documents."""

    questions_per_image: int
    questions: int
    new_tokens: int
    """Tokens of all answers, ends included."""
    seconds: dict[str, float]
    same: dict[str, int]
    """Per other system: answers that equal the engine's."""


@dataclass(frozen=True)
class Run:
    """A whole run of the benchmark."""

    title: str
    model: str
    device: str
    threads: int
    batch_size: int
    max_new_tokens: int
    measurements: list[Measurement]
    memory: dict[str, dict[str, float]]

    @property
    def systems(self) -> list[str]:
        """Return the systems' names."""
        return list(self.measurements[0].seconds)

    def rounds(self, questions_per_image: int) -> list[Measurement]:
        """Return the rounds with this number of questions per image."""
        return [found for found in self.measurements if found.questions_per_image == questions_per_image]


def write_report(run: Run, folder: Path) -> str:
    """Write the run's part of evaluation_speed.md and its plot, and return the part.

    Args:
        run: what was measured.
        folder: `docs`.
    """
    path = folder / "evaluation_speed.md"
    figure = Path("figures") / f"evaluation_speed_{run.title}.svg"
    part = _part(run, figure)
    begin, end = f"<!-- {run.title}: begin -->\n", f"<!-- {run.title}: end -->\n"
    text = path.read_text(encoding="utf-8") if path.is_file() else HEADING
    if begin in text:
        before, rest = text.split(begin)
        text = before + begin + part + end + rest.split(end)[1]
    else:
        text = f"{text}\n{begin}{part}{end}"
    (folder / figure).parent.mkdir(parents=True, exist_ok=True)
    write_bytes(folder / figure, _plot(run))
    write_text(path, text)
    return part


def _part(run: Run, figure: Path) -> str:
    found = versions()
    machine = hardware()
    first = run.measurements[0]
    repeats = len(run.rounds(first.questions_per_image))
    where = machine["gpu"] if run.device.startswith("cuda") else f"{run.threads} threads of {machine['machine']}"
    lines = [
        f"## {run.title} ({run.model})",
        "",
        f"float32 on {run.device} ({where}); at most {run.max_new_tokens} new tokens; plain generate in batches of "
        f"{run.batch_size}; {repeats} rounds of {first.questions} questions each; "
        f"torch {found['torch']}, transformers {found['transformers']}, lmms-eval {found['lmms_eval']}.",
        "",
        "| questions per image | system | questions/s | new tokens/s | prebench is faster by | equal answers |",
        "| ---: | --- | ---: | ---: | ---: | ---: |",
    ]
    for questions in sorted({m.questions_per_image for m in run.measurements}):
        rounds = run.rounds(questions)
        for system in run.systems:
            speed = median(m.questions / m.seconds[system] for m in rounds)
            tokens = median(m.new_tokens / m.seconds[system] for m in rounds)
            ratios = [m.seconds[system] / m.seconds[ENGINE] for m in rounds]
            ratio = "" if system == ENGINE else f"{median(ratios):.1f} [{min(ratios):.1f}, {max(ratios):.1f}]"
            same = "" if system == ENGINE else f"{_total(rounds, system)} of {sum(m.questions for m in rounds)}"
            lines.append(f"| {questions} | {system} | {speed:.1f} | {tokens:.0f} | {ratio} | {same} |")
    memory = "; ".join(f"{name} {mb['peak']:.0f} ({mb['loaded']:.0f} loaded)" for name, mb in run.memory.items())
    lines += [
        "",
        f"Peak memory in MB, in a process with one system, 32 questions per image: {memory}.",
        "",
        f"![Questions per second]({figure})",
        "",
    ]
    return "\n".join(lines)


def _total(rounds: list[Measurement], system: str) -> int:
    return sum(found.same[system] for found in rounds)


def _plot(run: Run) -> bytes:
    """Return questions per second over questions per image, both logarithmic; bars span the rounds."""
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(4.2, 2.8), layout="constrained")
        axes = figure.subplots()
        asked = sorted({m.questions_per_image for m in run.measurements})
        for system in run.systems:
            speeds = [[m.questions / m.seconds[system] for m in run.rounds(questions)] for questions in asked]
            middle = [median(values) for values in speeds]
            spread = [
                [mid - min(values) for mid, values in zip(middle, speeds, strict=True)],
                [max(values) - mid for mid, values in zip(middle, speeds, strict=True)],
            ]
            axes.errorbar(asked, middle, yerr=spread, marker="o", capsize=2, color=COLOURS[system], label=system)
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        axes.set_xticks(asked, [str(questions) for questions in asked])
        axes.set_xlabel("questions per image")
        axes.set_title(f"questions per second, {run.title}")
        axes.legend(frameon=False)
        buffer = io.BytesIO()
        FigureCanvasSVG(figure).print_svg(buffer, metadata={"Date": None})
    return buffer.getvalue()
