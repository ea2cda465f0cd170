"""A comparison as text, CSV, LaTeX or JSON, and the number formats that all outputs share."""

from __future__ import annotations

import dataclasses
import io
import json
import re
import textwrap
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import pandas as pd
from rich import box
from rich.console import Console
from rich.markup import escape as escape_markup
from rich.measure import Measurement
from rich.table import Table

from prebench.errors import ComparisonError, did_you_mean

if TYPE_CHECKING:
    from prebench.analysis.compare import Comparison, TaskComparison

NOT_DEFINED = "n/a"
WIDTH = 100

_LATEX = str.maketrans(
    {
        "\\": r"\textbackslash{}",
        "&": r"\&",
        "%": r"\%",
        "$": r"\$",
        "#": r"\#",
        "_": r"\_",
        "{": r"\{",
        "}": r"\}",
        "~": r"\textasciitilde{}",
        "^": r"\textasciicircum{}",
        "[": "{[}",  # at the start of a row it would be an argument of the line break before
        "<": "$<$",
        ">": "$>$",
        "|": "$|$",  # LaTeX's first font encoding has a dash in its place
        "±": r"$\pm$",
        "−": "$-$",
        "ρ": r"$\rho$",
        "Δ": r"$\Delta$",
        "λ": r"$\lambda$",
    }
)


def escape_latex(text: str) -> str:
    """Return text that pdfLaTeX prints as it stands, without any package."""
    return text.translate(_LATEX)


def percent(value: float | None, signed: bool = False, digits: int = 1) -> str:
    """Return a fraction in per cent (a difference in points); "n/a" for None or NaN."""
    if value is None or pd.isna(value):
        return NOT_DEFINED
    text = f"{100 * value:{'+' if signed else ''}.{digits}f}"
    # A difference that rounds to nothing has no sign.
    text = text.lstrip("+-") if float(text) == 0 else text
    return text.replace("-", "−")


def interval(low: float | None, high: float | None) -> str:
    """Return an interval of differences in points."""
    if low is None or high is None or pd.isna(low) or pd.isna(high):
        return NOT_DEFINED
    return f"[{percent(low, signed=True)}, {percent(high, signed=True)}]"


def p_value(p: float | None) -> str:
    """Return a p value with three decimals."""
    if p is None or pd.isna(p):
        return NOT_DEFINED
    return "<.001" if p < 0.0005 else f"{p:.3f}".lstrip("0") if p < 0.9995 else "1"


def marked(label: str, data_source: str) -> str:
    """Return a column title that can't be mistaken for the benchmark itself."""
    return f"{label} (generated)" if data_source == "generated" else label


def text_table(title: str, header: Sequence[str], rows: Sequence[Sequence[str]], width: int = WIDTH) -> str:
    """Return a plain-text table, or one paragraph per row where the width is too short for a readable table.

    Numbers are never broken; the first and the last column may wrap between words.
    """
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False)
    for i, name in enumerate(header):
        flexible = i in (0, len(header) - 1)
        table.add_column(name, justify="left" if i == 0 else "right", no_wrap=not flexible)
    for row in rows:
        table.add_row(*(escape_markup(cell) for cell in row))
    stream = io.StringIO()
    console = Console(file=stream, width=width, force_terminal=False, color_system=None)
    if Measurement.get(console, console.options.update(max_width=10 * width), table).minimum > width:
        body = "\n".join(_paragraph(header, row, width) for row in rows)
    else:
        console.print(table)
        body = stream.getvalue().strip("\n")
    lines = [*textwrap.wrap(title, width), *(line.rstrip() for line in body.splitlines())]
    return "\n".join(lines) + "\n"


def _paragraph(header: Sequence[str], row: Sequence[str], width: int) -> str:
    cells = "; ".join(f"{name} {cell}" for name, cell in zip(header[1:], row[1:], strict=True))
    return textwrap.fill(f"{row[0]}: {cells}", width, subsequent_indent="  ", break_on_hyphens=False)


_LATEX_FIT = (
    "% needs \\usepackage{booktabs}; with \\usepackage{graphicx} a table wider than the line is scaled to fit\n"
    "\\providecommand{\\resizebox}[3]{#3}\n"
    "\\resizebox{\\ifdim\\width>\\linewidth\\linewidth\\else\\width\\fi}{!}{%\n"
)


def latex_table(frame: pd.DataFrame, caption: str, label: str) -> str:
    """Return a booktabs table of text cells that never leaves the line where graphicx is loaded.

    Everything is escaped here, so cells may hold any character.
    """
    cells = frame.map(lambda cell: escape_latex(str(cell)))
    cells.columns = pd.Index([escape_latex(str(name)) for name in frame.columns])
    text = cells.style.hide(axis="index").to_latex(
        hrules=True,
        caption=escape_latex(caption),
        label=re.sub(r"[^A-Za-z0-9:-]+", "-", label),
        position_float="centering",
        column_format="l" + "r" * (len(frame.columns) - 1),
    )
    start, end = r"\begin{tabular}", r"\end{tabular}"
    return text.replace(start, _LATEX_FIT + start).replace(end, end + "}").rstrip("\n") + "\n"


def render(comparison: Comparison, form: str, width: int = WIDTH) -> str:
    """Render a comparison.

    Args:
        comparison: what to show.
        form: text, csv, latex or json. Text and LaTeX print per cent, CSV and JSON hold fractions.
        width: characters per line of the text form.

    Raises:
        ComparisonError: the format is unknown.
    """
    renderers: dict[str, Callable[[Comparison], str]] = {
        "text": lambda found: _text(found, width),
        "csv": _csv,
        "latex": _latex,
        "json": _json,
    }
    if form not in renderers:
        raise ComparisonError(f"unknown format {form!r}{did_you_mean(form, renderers)}")
    return renderers[form](comparison)


def _score_cells(row: TaskComparison) -> list[str]:
    values = [row.majority, row.blind, row.score_a, row.score_b]
    return [marked(row.label, row.data_source), *(percent(value) for value in values)]


def _test_cells(row: TaskComparison) -> list[str]:
    return [
        percent(row.difference, signed=True),
        interval(row.low, row.high),
        p_value(row.p),
        p_value(row.p_holm),
        p_value(row.p_equivalence_holm),
        percent(row.mdd),
    ]


def _text(comparison: Comparison, width: int) -> str:
    a, b = comparison.a, comparison.b
    scores = text_table(
        f"{comparison.study}: scores in %, over paired documents",
        ["task", "majority", "blind", a, b, "docs", "images", "seeds", "dropped"],
        [
            [*_score_cells(row), *(str(n) for n in (row.n_documents, row.n_images, row.n_seeds, row.n_dropped))]
            for row in comparison.tasks
        ],
        width,
    )
    tests = text_table(
        f"{b} − {a}, in points; MDD: smallest difference found with 80% power",
        ["task", "difference", "95% interval", "p", "p (Holm)", "p equiv.", "MDD", "verdict"],
        [[_score_cells(row)[0], *_test_cells(row), row.verdict] for row in comparison.tasks],
        width,
    )
    parts = [scores, tests] if comparison.tasks else []
    if comparison.degradation:
        parts.append(_degradation_text(comparison, width))
    parts.append("".join(f"{line}\n" for note in comparison.notes for line in textwrap.wrap(note, width)))
    return "\n".join(parts)


def _degradation_text(comparison: Comparison, width: int) -> str:
    first = comparison.degradation[0]
    title = f"Degradation of {first.attribute!r}: encoder ({percent(first.reference)}%) minus layers, in points"
    return text_table(
        title,
        ["layers", comparison.a, comparison.b, "reduction", "95% interval", "seeds"],
        [
            [
                row.layers,
                percent(row.degradation_a, signed=True),
                percent(row.degradation_b, signed=True),
                percent(row.reduction, signed=True),
                interval(row.low, row.high),
                str(row.n_seeds),
            ]
            for row in comparison.degradation
        ],
        width,
    )


def _csv(comparison: Comparison) -> str:
    rows = [
        {"study": comparison.study, "a": comparison.a, "b": comparison.b, "kind": "task", **dataclasses.asdict(row)}
        for row in comparison.tasks
    ]
    rows += [
        {
            "study": comparison.study,
            "a": comparison.a,
            "b": comparison.b,
            "kind": "degradation",
            "task": row.layers,
            "label": f"degradation of {row.attribute}, layers {row.layers}",
            "metric": "accuracy",
            "score_a": row.degradation_a,
            "score_b": row.degradation_b,
            # As for tasks the difference is b - a; the reduction is its negative.
            "difference": -row.reduction,
            "low": None if row.high is None else -row.high,
            "high": None if row.low is None else -row.low,
            "n_seeds": row.n_seeds,
        }
        for row in comparison.degradation
    ]
    return to_csv(pd.DataFrame(rows))


def to_csv(frame: pd.DataFrame) -> str:
    """Return CSV text in which equal content gives equal bytes: six decimals, `\\n` line ends."""
    integers = [name for name in frame.columns if name.startswith("n_")]
    whole = frame.astype(dict.fromkeys(integers, "Int64"))
    return whole.to_csv(index=False, float_format="%.6f", lineterminator="\n")


def _latex(comparison: Comparison) -> str:
    a, b = comparison.a, comparison.b
    header = ["Task", "Majority", "Blind", a, b, "Difference", "95% interval", "p", "p (Holm)"]
    header += ["p equiv.", "MDD", "Seeds"]
    rows = [[*_score_cells(row), *_test_cells(row), str(row.n_seeds)] for row in comparison.tasks]
    caption = f"{b} against {a} (study {comparison.study}); scores in %, differences in points. " + " ".join(
        comparison.notes
    )
    return latex_table(pd.DataFrame(rows, columns=header), caption, f"tab:{a}-{b}")


def _json(comparison: Comparison) -> str:
    return json.dumps(dataclasses.asdict(comparison), indent=2, ensure_ascii=False, allow_nan=False) + "\n"
