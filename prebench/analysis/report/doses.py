"""The page's ablation table and dose-response: curves over weight and layer, and whether they rise or fall."""

from __future__ import annotations

from prebench.analysis import dose
from prebench.analysis.dose import Family
from prebench.analysis.join import Study
from prebench.analysis.report.charts import Panel, Series, lines
from prebench.analysis.report.curves import mean_points
from prebench.analysis.report.parts import Figure, Group, Section, Table, from_csv, source
from prebench.analysis.tables import Made


def dose_response(study: Study, made: dict[str, Made]) -> Section:
    """Return reduction and gains against the weight or the layer, where variants differ in that alone."""
    groups, notes = [], []
    for field in dose.FIELDS:
        families = dose.families(study, field)
        groups += [group for family in families if (group := _group(study, family)) is not None]
        if not families:
            notes.append(
                f"No dose-response over the {field}: it needs at least two variants whose regularizer blocks (weight "
                f"above 0) differ in the {field} alone, run and compared with the baseline."
            )
    tables = tuple(_table(study, name, made[name]) for name in ("dose_trend", "dose_response") if name in made)
    if groups:
        notes.insert(
            0,
            "Against the baseline of the same seed, so that weight 0 stands at 0. Line: mean, band: lowest to highest "
            "seed.",
        )
    return Section(groups, tables, notes, (source(study, "tables/seeds.csv"),) if groups else ())


def ablation(study: Study, made: Made | None) -> Table | None:
    """Return every variant's block, gains and reduction beside the paper's rows; None where there is no ablation."""
    if made is None:
        return None
    numbers = set(made[0].columns)

    def columns(title: str) -> list[str]:
        fixed = {"Seeds": ["n_seeds"], "Reduction": ["reduction", "reduction low", "reduction high"]}
        ends = (title, f"{title} gain", f"{title} gain low", f"{title} gain high")
        return fixed.get(title) or [name for name in ends if name in numbers]

    return from_csv(study, "ablation", made, columns, words=("Block",))


def _table(study: Study, name: str, made: Made) -> Table:
    shown = {"n": ["n_models"], "Seeds": ["n_seeds"], "Doses": ["n_doses"], "p (Holm)": ["p_holm"], "Dose": ["dose"]}
    shown |= {"Difference": ["mean"], "95% interval": ["low", "high"]}
    words = ("Verdict", "Variant")
    return from_csv(study, name, made, lambda title: shown.get(title, [title]), heads=2, words=words)


def _group(study: Study, family: Family) -> Group | None:
    """Return a figure per outcome; None where nothing was compared with the baseline at two doses."""
    known, figures = dose.points(study, family), []
    first = next(iter(family.doses))
    for i, (outcome, found) in enumerate(known.groupby("outcome", sort=False)):
        values = found.rename(columns={"dose": "x", "value": "y"})
        marks = mean_points(values, 100.0, family.field)
        if len(marks) < 2:
            continue
        title = f"{outcome}, points (n = {len(found)} trained models)"
        series = [Series(study.variants.index(first), f"variants by {family.field}", marks)]
        name = f"d-{family.field}-{i}-{first}"
        steps = family.field == "layer"
        figures.append(
            Figure(title, lines(Panel(name, title, family.field, series, least_span=1.0, whole_steps=steps)))
        )
    return Group(f"By {family.field}: {family.name}", figures) if figures else None
