"""Write report.html: one file without any network, equal records giving equal bytes."""

from __future__ import annotations

import base64
import hashlib
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from prebench.analysis import dynamics, learning_curves, tables, verdict
from prebench.analysis.join import Study
from prebench.analysis.render import marked
from prebench.analysis.report import curves, doses, loss_health, maps, movement, sections
from prebench.analysis.report.charts import swatch
from prebench.analysis.report.parts import source
from prebench.analysis.report.provenance import provenance
from prebench.analysis.report.samples import samples
from prebench.store import write_text

PAGE = Path(__file__).parent / "page"
FILE = "report.html"
MIRROR = "mirror"


def write_page(study: Study, mirror: Path | None = None) -> Path:
    """Write `report.html` into a study's folder and return its path; tables/ should be written before.

    Args:
        study: the study.
        mirror: the data that were evaluated, for the pictures; the study's own mirror by default.

    Raises:
        StoreError: a record or a file of the mirror is damaged, or the page can't be written.
    """
    path = study.folder / FILE
    write_text(path, page(study, mirror or study.folder / MIRROR))
    return path


def page(study: Study, mirror: Path) -> str:
    """Return the page's text."""
    style, script = (_text(name) for name in ("report.css", "report.js"))
    environment = Environment(
        loader=FileSystemLoader(PAGE),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.policies["json.dumps_kwargs"] = {"sort_keys": True, "separators": (",", ":"), "allow_nan": False}
    template = environment.get_template("report.html.j2")
    return template.render(style=style, script=script, policy=_policy(style, script), **_content(study, mirror))


def _text(name: str) -> str:
    return (PAGE / name).read_text(encoding="utf-8")


def _policy(style: str, script: str) -> str:
    """Return a Content-Security-Policy that forbids every request, and every style and script but the page's own."""
    rules = ["default-src 'none'", "img-src data:", f"style-src {_digest(style)}", f"script-src {_digest(script)}"]
    return "; ".join([*rules, "base-uri 'none'", "form-action 'none'"])


def _digest(text: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"


def _content(study: Study, mirror: Path) -> dict[str, Any]:
    frame = learning_curves.curves(study)
    moved = dynamics.points(study)
    made = tables.make_tables(study, frame, moved)
    planned = len(study.config.variants) * len(study.config.seeds)
    return {
        "study": study,
        "planned": planned,
        "generated": [task.label for task in study.tasks if task.data_source == "generated"],
        "legend": [
            (i, name, curves.is_light(study, name), swatch(i, curves.is_light(study, name)))
            for i, name in enumerate(study.variants)
        ],
        "verdict": verdict.sentences(study, frame),
        "verdict_sources": [source(study, name) for name in (f"tables/{tables.VERDICT_FILE}", "scores.csv")],
        "benchmarks": sections.benchmarks(study),
        "question_types": sections.question_types(study, made["question_types"]),
        "layers": maps.with_maps(curves.by_layer(study), study, mirror),
        "probes": sections.probes(study, made["probes"]),
        "training": loss_health.with_health(curves.by_step(study, frame), study),
        "matched": sections.matched(study, made.get("matched")),
        "dynamics": movement.during_training(study, moved, made.get("dynamics")),
        "degradation": sections.degradation(study, made["degradation"]),
        "seeds": sections.seeds(study, made["seeds"]),
        "correlation": curves.correlation(study, made["correlation"]),
        "correlation_table": sections.correlation(study, made["correlation"]),
        "ablation": doses.ablation(study, made.get("ablation")),
        "dose": doses.dose_response(study, made),
        "samples": samples(study, mirror),
        "provenance": provenance(study),
        "marked": marked,
    }
