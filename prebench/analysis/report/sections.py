"""The page's tables: scores and differences with the records behind them, and the study's CSV files as printed."""

from __future__ import annotations

from collections.abc import Sequence

from prebench.analysis.compare import HIGHER, LOWER, Comparison, TaskComparison, compare, points, references
from prebench.analysis.join import Study
from prebench.analysis.render import NOT_DEFINED, interval, marked, p_value, percent
from prebench.analysis.report.charts import Interval, forest
from prebench.analysis.report.parts import Cell, Figure, Group, Section, Table, from_csv, source
from prebench.analysis.tables import SPREAD_IMAGES, SPREAD_SEEDS, Made, score
from prebench.errors import ComparisonError

_REFERENCE = "tables/main.csv: needs no image and no model; from the generator of the questions"


def benchmarks(study: Study) -> Section:
    """Return the main table, every variant against the baseline, and what could not be compared."""
    if not study.tasks:
        return Section(notes=("No benchmark was evaluated yet: `prebench evaluate` does that.",))
    compared, notes = _comparisons(study)
    tables = [_scores(study)]
    if compared:
        tables.append(_differences(study, compared))
    notes += dict.fromkeys(note for found in compared for note in found.notes)
    ends = [(row.difference, row.low, row.high) for found in compared for row in found.tasks]
    scale = [100 * end for row in ends for end in row if end is not None]
    figures = [_forest(study, found, scale) for found in compared]
    heading = f"Differences from {study.baseline}, in points, with 95% intervals"
    groups = (Group(heading, figures, "Filled: a difference after Holm's correction."),) if figures else ()
    return Section(groups, tables, tuple(dict.fromkeys(notes)))


def _comparisons(study: Study) -> tuple[list[Comparison], list[str]]:
    found, notes = [], []
    for variant in study.variants:
        if study.baseline in (None, variant):
            continue
        try:
            found.append(compare(study, str(study.baseline), variant))
        except ComparisonError as error:
            notes.append(f"{variant} is not compared with {study.baseline}: {error}")
    return [comparison for comparison in found if comparison.tasks], notes


def _scores(study: Study) -> Table:
    rows, n_seeds = [], 0
    for task in study.tasks:
        cells = [Cell(marked(task.label, task.data_source))]
        cells += [Cell(percent(value), _REFERENCE, "aside") for value in references(study, task.task)]
        for variant in study.variants:
            found = score(study, variant, task.task)
            n_seeds = max(n_seeds, found.n_seeds if found else 0)
            spread = f" ± {percent(found.spread)}" if found and found.spread is not None else ""
            cells.append(Cell(percent(found.mean if found else None) + spread, _records(study, variant, task.task)))
        rows.append(cells)
    spread = SPREAD_SEEDS if n_seeds > 1 else SPREAD_IMAGES
    caption = f"Scores in %, ± {spread}. Majority and blind (the question's text alone) need no image."
    files = (source(study, "tables/main.csv"), source(study, "scores.csv"))
    return Table("scores", caption, ["Benchmark", "majority", "blind", *study.variants], rows, files)


def _records(study: Study, variant: str, task: str) -> str:
    """Return what a mean is made of: score, weights and data of each run."""
    parts = []
    for run in study.of_variant(variant):
        record = run.tasks.get(task)
        if record is not None:
            parts.append(
                f"runs/{run.folder.name}/eval/{task}.json: {percent(record.score, digits=2)} (n {record.n}, failed "
                f"{record.n_errors}, weights {_hash(record.hashes, 'weights')}, data {_hash(record.hashes, 'data')})"
            )
    return "\n".join(parts)


def _hash(hashes: dict[str, str], name: str) -> str:
    return hashes.get(name) or "unknown"


def _differences(study: Study, compared: Sequence[Comparison]) -> Table:
    header = ["Benchmark", "Variant", "Difference [95% interval]", "Verdict", "p (Holm)", "p", "p equiv.", "MDD"]
    header += ["Documents", "Images", "Seeds", "Dropped"]
    rows = []
    for task in study.tasks:
        for found in compared:
            row = next((row for row in found.tasks if row.task == task.task), None)
            if row is not None:
                rows.append(_difference_cells(study, found, row))
    caption = (
        f"Differences from {study.baseline}, in points, paired by document. MDD: the smallest difference that would be "
        f"found with 80% power; p equiv.: of a difference of {points(compared[0].tasks[0].margin)} or more (two "
        "one-sided tests, Holm's correction). Dropped: documents that failed in a run and were left out of all. "
        "The command `prebench compare` prints the same numbers."
    )
    return Table("differences", caption, header, rows, (source(study, "scores.csv"),), heads=2, words=("Verdict",))


def _difference_cells(study: Study, found: Comparison, row: TaskComparison) -> list[Cell]:
    title = _pairs(study, found, row)
    decided = row.verdict in (HIGHER, LOWER)
    counts = (row.n_documents, row.n_images, row.n_seeds, row.n_dropped)
    return [
        Cell(marked(row.label, row.data_source)),
        Cell(found.b),
        Cell(_with_interval(row), f"{title}\nthe interval is about {row.estimand}"),
        Cell(row.verdict, mark="decided" if decided else ""),
        Cell(p_value(row.p_holm), f"over {len(found.tasks)} tasks\n{title}"),
        Cell(p_value(row.p), f"{row.test}\n{title}"),
        Cell(p_value(row.p_equivalence_holm), f"smaller than {points(row.margin)} either way?\n{title}"),
        Cell(percent(row.mdd), title),
        *(Cell(str(count), title) for count in counts),
    ]


def _with_interval(row: TaskComparison) -> str:
    return f"{percent(row.difference, signed=True)} {interval(row.low, row.high)}"


def _pairs(study: Study, found: Comparison, row: TaskComparison) -> str:
    """Return the exact difference, and the weights of every pair of runs that it comes from."""
    lines = [f"{found.b} {row.score_b:.6f} − {found.a} {row.score_a:.6f} = {row.difference:+.6f}"]
    for seed in study.common_seeds(found.a, found.b, row.task):
        hashes = [study.runs[name, seed].tasks[row.task].hashes for name in (found.b, found.a)]
        weights = " − ".join(_hash(known, "weights") for known in hashes)
        lines.append(f"seed {seed}: weights {weights}, data {_hash(hashes[0], 'data')}")
    return "\n".join(lines)


def _forest(study: Study, found: Comparison, scale: Sequence[float]) -> Figure:
    rows = []
    for row in found.tasks:
        shown = _with_interval(row)
        low, high = (None if end is None else 100 * end for end in (row.low, row.high))
        label = marked(row.label, row.data_source)
        title = f"{label}: {shown}, {row.verdict}\n{_pairs(study, found, row)}"
        decided = row.verdict in (HIGHER, LOWER)
        rows.append(Interval(label, shown, 100 * row.difference, low, high, title, decided))
    title = f"{found.b} against {found.a}"
    return Figure(title, forest(f"f-{found.b}", title, rows, scale))


# --- tables as the CSV files have them -----------------------------------------------------------------------


def question_types(study: Study, made: Made) -> Table | None:
    """Return accuracy by question type beside guessing from the text; None where no type is known."""
    if made[1].empty:
        return None
    numbers = set(made[0].columns)

    def columns(title: str) -> list[str]:
        fixed = {"n": ["n_documents"], "Images": ["n_images"], "Failed": ["n_failed"]}
        fixed |= {"Blind": ["blind", "blind_low", "blind_high"]}
        ends = (f"n_seeds {title}", title, f"{title} ±", f"{title} low", f"{title} high", f"{title} above_blind")
        return fixed.get(title) or [name for name in ends if name in numbers]

    return from_csv(study, "question_types", made, columns, heads=2)


def degradation(study: Study, made: Made) -> Table | None:
    """Return degradation and its reduction by attribute; None without a probe."""
    if made[1].empty:
        return None
    shown = {
        "Seeds": ["n_seeds"],
        "R": ["reference"],
        "D": ["degradation", "low_degradation", "high_degradation"],
        "Reduction": ["reduction", "low", "high"],
        "Without regularised layers": ["reduction_excluded", "low_excluded", "high_excluded", "excluded_layers"],
    }
    return from_csv(study, "degradation", made, lambda title: shown.get(title, []), heads=2)


def seeds(study: Study, made: Made) -> Table:
    """Return one row per trained model."""
    shown = {"D": ["degradation"], "D without": ["degradation_excluded"], "Reduction": ["reduction"]}

    def columns(title: str) -> list[str]:
        return [*shown.get(title, [title.lower(), title, f"{title} gain"]), "weights_hash"]

    return from_csv(study, "seeds", made, columns, heads=2)


def probes(study: Study, made: Made) -> Table | None:
    """Return every probe value by variant and layer; None without a probe."""
    if made[1].empty:
        return None
    names = {"D": "degradation", "ratio": "contrast_ratio", "centred diff.": "centred_difference", "AUC": "auc"}

    def columns(title: str) -> list[str]:
        return [names.get(title, title), f"accuracy_{title.replace(' ', '_')}", "n_seeds"]

    return from_csv(study, "probes", made, columns, heads=2)


def correlation(study: Study, made: Made) -> Table | None:
    """Return the correlation of every task; None without tasks."""
    if made[1].empty:
        return None
    shown = {"n": ["n_models"], "95% interval": ["low", "high"], "ρ": ["rho"]}
    shown["One left out"] = ["without_low", "without_high"]
    found = from_csv(study, "correlation", made, lambda title: shown.get(title, [title]), words=("Note",))
    return None if all(row[1].text in ("0", NOT_DEFINED) for row in found.rows) else found


def matched(study: Study, made: Made | None) -> Table | None:
    """Return accuracy at equal validation lm_loss; None without validation."""
    if made is None:
        return None
    shown = {
        "Change": ["change_last_quarter", "plateau"],
        "Seeds": ["n_seeds"],
        "Level": ["level"],
        "Baseline": ["accuracy_baseline"],
        "Accuracy": ["accuracy"],
        "Difference": ["difference"],
        "95% interval": ["low", "high"],
    }
    return from_csv(study, "matched", made, lambda title: shown.get(title, []))
