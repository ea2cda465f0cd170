"""Where the page's numbers come from: configuration, versions, machines, and the hashes of every run and record."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from prebench.analysis.join import Run, Study
from prebench.analysis.render import NOT_DEFINED, percent
from prebench.analysis.report.parts import Cell, Table, source
from prebench.config import dump_yaml
from prebench.store import read_json

STUDY_FILE = "study.yaml"
MANIFEST = "manifest.json"
_HASHES = ("weights", "data", "prompts", "config")


@dataclass(frozen=True)
class Provenance:
    """Everything of the last section."""

    tables: tuple[Table, ...]
    study_yaml: str
    blocks: tuple[tuple[str, str], ...]
    """Every variant with its regularizer block, as YAML."""


def provenance(study: Study) -> Provenance:
    """Collect what made the study.

    Raises:
        StoreError: a manifest is no JSON.
    """
    tables = [table for table in (_places(study), _runs(study), _records(study)) if table is not None]
    blocks = tuple((variant.name, dump_yaml(variant).strip()) for variant in study.config.variants)
    return Provenance(tuple(tables), dump_yaml(study.config).strip(), blocks)


def _places(study: Study) -> Table | None:
    """One column per machine that worked on the study."""
    path = study.folder / MANIFEST
    found = read_json(path) if path.is_file() else []
    places = [entry for entry in found if isinstance(entry, dict)] if isinstance(found, list) else []
    if not places:
        return None
    flat = [_flat(entry) for entry in places]
    names = list(dict.fromkeys(name for entry in flat for name in entry))
    header = ["", *(f"place {i + 1}" for i in range(len(places)))] if len(places) > 1 else ["", "value"]
    rows = [[Cell(name), *(Cell(entry.get(name, NOT_DEFINED)) for entry in flat)] for name in names]
    return Table("places", "Code, machine and versions.", header, rows, (source(study, MANIFEST),), words=header[1:])


def _flat(entry: Mapping[str, Any]) -> dict[str, str]:
    values: dict[str, str] = {}
    for name, value in sorted(entry.items()):
        if isinstance(value, dict):
            values |= {f"{name}: {key}": str(part) for key, part in sorted(value.items())}
        else:
            values[name] = str(value)
    return values


def _runs(study: Study) -> Table:
    """One row per trained model: what its export and its probe say about themselves."""
    header = ["Run", "Training seed", "Minutes", "lm_loss", "Regularised layer", "dtype", "Commit"]
    header += ["Weights", "Training data", "Pretrained parts", "Config", "Probe data", "Probe weights"]
    rows = []
    for variant in study.variants:
        for run in study.of_variant(variant):
            rows.append(_run_cells(run))
    caption = "Trained models, by the hashes in their exports (model/prebench.json) and probes (probe.parquet)."
    return Table("runs", caption, header, rows, words=header[5:])


def _run_cells(run: Run) -> list[Cell]:
    path = run.folder / "model" / "prebench.json"
    values = read_json(path) if path.is_file() else {}
    known = values if isinstance(values, dict) else {}
    title = f"runs/{run.folder.name}/model/prebench.json"

    def cell(name: str, shown: str | None = None) -> Cell:
        return Cell(NOT_DEFINED if known.get(name) is None else shown or str(known[name]), title)

    seconds, loss = known.get("train_seconds"), known.get("lm_loss")
    layer = ", ".join(map(str, run.regularised_layers)) or "none"
    probed = run.probe_hashes or {}
    return [
        Cell(run.folder.name),
        cell("training_seed"),
        cell("train_seconds", f"{seconds / 60:.1f}" if isinstance(seconds, int | float) else None),
        cell("lm_loss", f"{loss:.4f}" if isinstance(loss, int | float) else None),
        Cell(layer, title),
        cell("dtype"),
        cell("git_commit", str(known.get("git_commit"))[:12]),
        cell("weights_hash"),
        cell("data_hash"),
        cell("parts_hash"),
        cell("config_hash"),
        Cell(probed.get("data", NOT_DEFINED), f"runs/{run.folder.name}/probe.parquet"),
        Cell(probed.get("weights", NOT_DEFINED), f"runs/{run.folder.name}/probe.parquet"),
    ]


def _records(study: Study) -> Table | None:
    """One row per run and task: the record that every mean goes back to."""
    header = ["Run", "Task", "Metric", "Score, %", "n", "Failed", "Seconds", *(name.title() for name in _HASHES)]
    rows = []
    for variant in study.variants:
        for run in study.of_variant(variant):
            for task, record in sorted(run.tasks.items()):
                title = f"runs/{run.folder.name}/eval/{task}.json"
                score = NOT_DEFINED if record.score is None else percent(record.score, digits=3)
                cells = [record.primary_metric, score, str(record.n), str(record.n_errors), f"{record.seconds:.1f}"]
                cells += [record.hashes.get(name, NOT_DEFINED) for name in _HASHES]
                rows.append([Cell(run.folder.name), Cell(task), *(Cell(text, title) for text in cells)])
    caption = "Records, runs/<run>/eval/<task>.json: every score goes back to these; the answers lie beside them."
    files = (source(study, "scores.csv"),)
    return Table("records", caption, header, rows, files, heads=2, words=["Metric", *header[7:]]) if rows else None
