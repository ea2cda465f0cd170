"""report.html of a synthetic study with known numbers: content, escaping, pictures, determinism, what is missing."""

from __future__ import annotations

import base64
import csv
import hashlib
import io
import itertools
import json
import re
import shutil
from collections.abc import Mapping, Sequence
from html import unescape
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from PIL import Image

from prebench.analysis import tables
from prebench.analysis.compare import compare
from prebench.analysis.join import load_study
from prebench.analysis.render import interval, percent
from prebench.analysis.report import pictures, samples, sections, write_page
from prebench.analysis.tables import write_tables
from prebench.errors import StoreError
from prebench.images import pixel_hash
from prebench.store import write_json

from .conftest import CONTROLS, StudyMaker, random_scores, sample, write_curve, write_probe, write_task

HOSTILE = "</script><script>alert(1)</script><img src=x onerror=alert(2)> \"'&\u2028 <!--"


class Page(HTMLParser):
    """What a browser would see: elements with their attributes, texts, table cells by table."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.scripts: list[str] = []
        self.styles: list[str] = []
        self.words: list[str] = []
        self._open: list[str] = []
        self.feed(text)
        self.text = " ".join(" ".join(self.words).split())

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        self._open.append(tag)
        if tag in ("script", "style"):
            {"script": self.scripts, "style": self.styles}[tag].append("")

    def handle_endtag(self, tag: str) -> None:
        while self._open and self._open.pop() != tag:
            pass

    def handle_data(self, data: str) -> None:
        inside = self._open[-1] if self._open else ""
        if inside == "script":
            self.scripts[-1] += data
        elif inside == "style":
            self.styles[-1] += data
        else:
            self.words.append(data)

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.elements if name == tag]

    @property
    def data(self) -> dict[str, Any]:
        return json.loads(self.scripts[0])


def table(html: str, name: str) -> pd.DataFrame:
    """Read one table: what its cells show."""
    (found,) = re.findall(rf'<table id="{name}">(.*?)</table>', html, re.S)
    lines = re.findall(r"<tr>(.*?)</tr>", found, re.S)
    rows = [[unescape(cell) for cell in re.findall(r"<t[hd][^>]*>(.*?)</t[hd]>", line, re.S)] for line in lines]
    return pd.DataFrame(rows[1:], columns=rows[0])


def small(make_study: StudyMaker, *names: str, seeds: Sequence[int] = (0, 1, 2), **more: Any) -> Path:
    """Write a study of ten pictures with four questions each."""
    return make_study(dict.fromkeys(("baseline", "pre", *names), 0.5), seeds=seeds, images=10, **more)


def built(folder: Path, mirror: Path | None = None) -> tuple[str, Page]:
    html = write_page(load_study(folder), mirror).read_text()
    return html, Page(html)


def browsed(folder: Path, mirror: Path | None = None) -> samples.Samples:
    return samples.samples(load_study(folder), mirror or folder / "mirror")


def scene(number: int) -> Image.Image:
    return Image.new("RGB", (24, 16), (number * 7 % 256, number * 31 % 256, number * 101 % 256))


def png(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format="PNG")
    return buffer.getvalue()


def write_mirror(folder: Path, images: Mapping[str, list[Image.Image]], split_apart: bool = False) -> Path:
    """Write a mirror: a row per document, or, apart from the documents, a row per picture."""
    kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    tasks = {}
    for task, rows in images.items():
        name = f"data/{task}/{'images' if split_apart else 'test'}.parquet"
        (folder / name).parent.mkdir(parents=True)
        column = pa.array([{"bytes": png(image), "path": None} for image in rows], type=kind)
        pq.write_table(pa.table({"picture": column}), folder / name, row_group_size=16)
        tasks[task] = {"files": {name: "hash", f"data/{task}/README.md": "hash"}}
    write_json(folder / "mirror.json", {"tasks": tasks})
    return folder


def with_pictures(folder: Path, images: int = 10) -> dict[str, list[Image.Image]]:
    """Let the study's documents of gqa name the pictures of `scene`, four documents each."""
    for run in sorted((folder / "runs").iterdir()):
        scores = random_scores(int(run.name[-1]) + 10 * run.name.startswith("pre"), images, 0.5)
        answered = [sample(i, score, image_hash=pixel_hash(scene(i // 4))) for i, score in enumerate(scores)]
        write_task(run, "gqa", "GQA on scenes", "generated", answered)
    return {"gqa": [scene(i // 4) for i in range(4 * images)]}


def test_the_page_says_what_the_tables_say(make_study: StudyMaker) -> None:
    folder = small(make_study)
    for run in (folder / "runs").iterdir():
        write_curve(run, [1.5, 1.0, 0.7])
    write_tables(load_study(folder))
    html, page = built(folder)
    for sentence in (folder / "tables" / "verdict.txt").read_text().splitlines():
        assert " ".join(sentence.split()) in page.text
    leads = re.findall(r'<p class="lead">(.*?)</p>', html)
    assert leads[0].startswith("Degradation of background") and leads[1].startswith("Benchmarks, pre against baseline")
    scores = pd.read_csv(folder / "tables" / "main.csv").set_index("variant")
    shown = table(html, "scores").set_index("Benchmark").loc["GQA on scenes (generated)"]
    for variant in ("baseline", "pre"):
        mean, spread = (scores.loc[variant, f"GQA on scenes (generated){end}"] for end in ("", " ±"))
        assert shown[variant] == f"{percent(mean)} ± {percent(spread)}"
    assert shown["majority"] == "25.0" and shown["blind"] == "40.0"
    found = compare(load_study(folder), "baseline", "pre")
    rows = table(html, "differences")
    for row, (_, cells) in zip(found.tasks, rows.iterrows(), strict=True):
        difference = f"{percent(row.difference, signed=True)} {interval(row.low, row.high)}"
        assert cells["Difference [95% interval]"] == difference and cells["Verdict"] == row.verdict
    assert "no difference shown" in set(rows["Verdict"])
    degraded = table(html, "degradation").set_index(["Attribute", "Variant"])
    assert degraded.loc[("background", "pre"), "Reduction"] == "+11.0 [+8.5, +13.5]"
    assert len(table(html, "seeds")) == 6 and len(table(html, "records")) == 12


def test_every_number_names_its_record(make_study: StudyMaker) -> None:
    folder = small(make_study)
    write_tables(load_study(folder))
    html, page = built(folder)
    numbers = [cell for cell in page.all("td") if "number" in str(cell.get("class"))]
    assert len(numbers) > 100 and all(cell.get("title") for cell in numbers)
    linked = {element["href"] for element in page.all("a") if not str(element["href"]).startswith("#")}
    assert {"tables/main.csv", "tables/seeds.csv", "tables/degradation.csv", "scores.csv"} <= linked
    for name in linked:
        assert hashlib.sha256((folder / str(name)).read_bytes()).hexdigest()[:16] in html
    named = [
        found for cell in numbers if (found := re.match(r"(tables/\w+\.csv), line (\d+): (.*)", str(cell["title"])))
    ]
    assert len(named) > 50
    for path, line, values in (found.groups() for found in named):
        row = list(csv.DictReader((folder / path).open()))[int(line) - 2]
        for name, value in (part.split(" = ") for part in values.split(", ")):
            assert row[name] == value.replace("n/a", ""), (path, line, name)
    assert "runs/pre-s1/eval/gqa.json" in html and "weights w-pre-s1, data data" in html


def test_equal_records_give_equal_bytes_wherever_the_study_lies(make_study: StudyMaker, tmp_path: Path) -> None:
    folder = small(make_study)
    mirror = write_mirror(folder / "mirror", with_pictures(folder))
    moved = tmp_path / "elsewhere" / folder.name
    shutil.copytree(folder, moved)
    texts = {built(place)[0] for place in (folder, moved, folder)}
    assert len(texts) == 1 and "data:image/webp" in texts.pop()
    shutil.rmtree(mirror)
    assert "Pictures are missing" in built(folder)[1].text


def test_strings_of_the_data_stay_strings(make_study: StudyMaker) -> None:
    folder = small(make_study, seeds=(0,))
    for run in (folder / "runs").iterdir():
        told = {"question": HOSTILE, "target": HOSTILE, "response": HOSTILE, "question_type": HOSTILE}
        answered = [sample(i, float(i % 2), blind_score=0.5, **told) for i in range(8)]
        write_task(run, "gqa", HOSTILE, "generated", [*answered, sample(8, None, error=HOSTILE)])
    config = yaml.safe_load((folder / "study.yaml").read_text())
    config["suite"]["tasks"][0]["label"] = HOSTILE
    config["variants"][1]["description"] = HOSTILE
    (folder / "study.yaml").write_text(yaml.safe_dump(config))
    html, page = built(folder)
    assert len(page.scripts) == 2 and len(page.all("img")) == 0 and "onerror=" not in page.scripts[1]
    data = page.data
    assert HOSTILE in data["texts"] and data["tasks"][0]["label"] == f"{HOSTILE} (generated)"
    assert "alert(1)</script>" not in html


def test_the_page_asks_nothing_of_the_network(make_study: StudyMaker) -> None:
    html, page = built(small(make_study))
    policy = next(str(meta["content"]) for meta in page.all("meta") if meta.get("http-equiv"))
    assert policy.startswith("default-src 'none'; img-src data:;")
    for text in (page.styles[0], page.scripts[1]):
        assert base64.b64encode(hashlib.sha256(text.encode()).digest()).decode() in policy
    for tag, attributes in page.elements:
        # The policy refuses inline styles and handlers; nothing may need them.
        assert not {"style", "src", "srcset", "action"} & attributes.keys(), (tag, attributes)
        assert not any(name.startswith("on") for name in attributes)
    assert not re.search(r"https?://|url\(|@import", html.replace("http-equiv", ""))


def test_structure_for_screen_readers(make_study: StudyMaker) -> None:
    html, page = built(small(make_study))
    assert page.all("html")[0]["lang"] == "en"
    assert len(page.all("table")) == len(page.all("caption")) > 5
    assert all(cell.get("scope") in ("row", "col") for cell in page.all("th"))
    charts = [chart for chart in page.all("svg") if "chart" in str(chart["class"])]
    assert len(charts) > 6 and all(chart["role"] == "img" for chart in charts)
    names = [str(element["id"]) for _, element in page.elements if element.get("id")]
    assert len(names) == len(set(names))
    for chart in charts:
        assert set(str(chart["aria-labelledby"]).split()) <= set(names)
    levels = [int(level) for level in re.findall(r"<h(\d)", html)]
    assert levels[0] == 1 and levels.count(1) == 1
    assert all(after <= before + 1 for before, after in itertools.pairwise(levels))
    targets = {str(link["href"])[1:] for link in page.all("a") if str(link["href"]).startswith("#")}
    assert targets <= set(names)


def test_generated_data_is_marked_loudly(make_study: StudyMaker) -> None:
    folder = small(make_study)
    html, page = built(folder)
    assert "Generated data: not the benchmark." in page.text and 'class="warning"' in html
    path = folder / "study.yaml"
    path.write_text(path.read_text().replace("data_source: generated", "data_source: real"))
    assert 'class="warning"' not in built(folder)[0]


@pytest.mark.parametrize("apart", [False, True])
def test_pictures_are_those_of_the_records(make_study: StudyMaker, tmp_path: Path, apart: bool) -> None:
    folder = small(make_study)
    images = with_pictures(folder)
    rows = list(dict.fromkeys(map(pixel_hash, images["gqa"])))
    if apart:
        images = {"gqa": [scene(i) for i in reversed(range(len(rows)))]}
    mirror = write_mirror(tmp_path / "mirror", images, apart)
    shown = browsed(folder, mirror).data["images"]
    assert set(shown) == set(rows)
    for key, uri in shown.items():
        picture = Image.open(io.BytesIO(base64.b64decode(uri.partition(",")[2]))).convert("RGB")
        wanted = scene(rows.index(key))
        difference = [abs(a - b) for a, b in zip(picture.getpixel((8, 8)), wanted.getpixel((8, 8)), strict=True)]
        assert picture.size == wanted.size and max(difference) < 12


def test_a_changed_picture_is_not_shown_as_the_documents(make_study: StudyMaker, tmp_path: Path) -> None:
    folder = small(make_study)
    images = with_pictures(folder)
    changed = [scene(999) if i < 4 else image for i, image in enumerate(images["gqa"])]
    found = browsed(folder, write_mirror(tmp_path / "mirror", {"gqa": changed}))
    assert pixel_hash(scene(0)) not in found.data["images"] and len(found.data["images"]) == 9
    assert "not found in the mirror by the hash" in found.notes[0]


def test_pictures_have_a_limit(make_study: StudyMaker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = small(make_study)
    mirror = write_mirror(tmp_path / "mirror", with_pictures(folder))
    monkeypatch.setattr(pictures, "MAX_BYTES", 500)
    found = browsed(folder, mirror)
    assert 0 < sum(map(len, found.data["images"].values())) <= 500
    assert "left out to keep this page small" in found.notes[0]


def test_flipped_documents_come_first(make_study: StudyMaker, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = small(make_study, seeds=(0,))
    right = {"baseline": {2, 5, 11}, "pre": {2, 7}}
    for variant, known in right.items():
        answered = [sample(i, float(i in known)) for i in range(40)]
        answered[9] = sample(9, None)
        write_task(folder / "runs" / f"{variant}-s0", "gqa", "GQA on scenes", "generated", answered)
    monkeypatch.setattr(samples, "MAX_DOCUMENTS", 10)
    page = built(folder)[1]
    docs = [doc for doc in page.data["docs"] if doc["task"] == 0]
    assert len(docs) == 5 and {5, 7, 9, 11} < {doc["doc"] for doc in docs}
    assert page.data["tasks"][0]["turned"] == {"pre-s0": [2, 1]} and page.data["tasks"][0]["total"] == 40
    assert "5 of 40 documents are here, 3 of the 3 flipped ones; 1 failed in some run" in page.text
    failed = next(doc for doc in docs if doc["doc"] == 9)["answers"][0]
    assert failed[1:] == [None, 1] and page.data["texts"][failed[0]] == "the answer is empty"


def test_answers_to_other_prompts_are_not_set_side_by_side(make_study: StudyMaker) -> None:
    folder = small(make_study, seeds=(0,))
    path = folder / "runs" / "pre-s0" / "eval" / "gqa.samples.jsonl"
    path.write_text(path.read_text().replace('"prompt_hash": "p3"', '"prompt_hash": "other"'))
    doc = next(doc for doc in browsed(folder).data["docs"] if (doc["task"], doc["doc"]) == (0, 3))
    assert doc["answers"][0] is not None and doc["answers"][1] is None
    assert "pre is not compared with baseline: gqa" in " ".join(sections.benchmarks(load_study(folder)).notes)


def test_doses_are_drawn_where_variants_differ_in_one_field_alone(make_study: StudyMaker) -> None:
    folder = small(make_study, "strong")
    assert "No dose-response over the weight" in built(folder)[1].text
    config = yaml.safe_load((folder / "study.yaml").read_text())
    config["variants"][2]["regularizer"]["weight"] = 2.0
    (folder / "study.yaml").write_text(yaml.safe_dump(config))
    for seed in (0, 1, 2):
        manifest = folder / "runs" / f"strong-s{seed}" / "model" / "prebench.json"
        manifest.write_text(manifest.read_text().replace('"regularizer_layer": 1', '"regularizer_layer": 2'))
    html, page = built(folder)
    assert "By weight: pre, strong" in page.text and "No dose-response over the layer" in page.text
    assert "weight 0.5: " in html and "weight 2: " in html


def test_layer_curves_hold_every_metric_of_the_records(make_study: StudyMaker) -> None:
    folder = small(make_study)
    for path in folder.glob("runs/*/probe.parquet"):
        frame = pd.read_parquet(path)
        more = frame[(frame["metric"] == "auc") & (frame["layer"] >= 0)].assign(level="spectrum", metric="rank_new")
        control = frame[(frame["attribute"] == "fill") & (frame["layer"] == 2)].assign(metric="shuffled_label_accuracy")
        pixels = frame[(frame["attribute"] == "fill") & (frame["layer"] == -1)]
        pixels = pixels.assign(metric="raw_pixel_accuracy", value=0.31)
        few = frame[frame["metric"] == "accuracy"].assign(metric="accuracy_10_per_class")
        model = frame[:3].assign(level="model", attribute="", metric="image_tokens_see_the_question", value=1.0)
        decoded = model[:1].assign(layer=4, level="lm_head", metric="token_entropy", value=1.25)
        words = [decoded.assign(metric="share", attribute=word, value=v) for word, v in (("the", 0.75), (" red", 0.25))]
        parts = [frame, more, control, pixels, few, model[:1].assign(layer=0), decoded, *words]
        pd.concat(parts).to_parquet(path)
    html, page = built(folder)
    for words in ("background (unasked): accuracy, %", "fill (asked): accuracy, %", "rank new", "spectrum"):
        assert words in page.text
    assert "pre, layer 2, regularised: 80.0 (seed 0: 80.0, seed 1: 80.0, seed 2: 80.0)" in html
    assert "baseline, layer 2: 69.0 (seed 0: 70.0, seed 1: 69.0, seed 2: 68.0)" in html
    single = table(html, "single-layers")
    assert set(zip(single["Layer"], single["pre"], strict=True)) == {("2", "99.0"), ("encoder", "31.0")}
    assert any(name.endswith("fill: accuracy with shuffled labels, %") for name in single["Value"])
    assert "background (unasked): accuracy from 10 images per class, %" in page.text
    assert "Image tokens attend to the question" in page.text
    decoded = table(html, "decoded-tokens")
    assert list(decoded["Most frequent"]) == ["'the' 75%, ' red' 25%"] * len(list(folder.glob("runs/*")))
    assert set(decoded["Entropy"]) == {"1.25"} and "token entropy" not in page.text
    assert html.count('class="encoder"') >= 4 and 'class="ring"' in html


def test_centred_correlation_is_drawn_as_it_is_computed(make_study: StudyMaker) -> None:
    folder = small(make_study, "early", "late")
    for seed in (0, 1, 2):
        write_probe(folder / "runs" / f"early-s{seed}", [0.9, 0.8 + 0.03 * seed, 0.8, 0.7, 0.6])
        write_task(
            folder / "runs" / f"late-s{seed}", "gqa", "GQA", "generated", [sample(i, float(i > 9)) for i in range(40)]
        )
    html, page = built(folder)
    assert "minus the mean of the seed" in page.text
    row = tables.make_tables(load_study(folder), pd.DataFrame(), pd.DataFrame())["correlation"][0].iloc[0]
    assert f"n = 9 trained models: r = {row['r']:.2f}".replace("-", "−") in page.text
    assert "early-s1: reduction" in html


@pytest.mark.parametrize("kind", ["probes alone", "no probes", "one seed", "no baseline", "controls", "unfinished"])
def test_what_is_missing_is_said(make_study: StudyMaker, kind: str) -> None:
    variants = ["pre", "late"] if kind == "no baseline" else ["baseline", "pre"]
    variants += CONTROLS if kind == "controls" else []
    seeds = (0,) if kind == "one seed" else (0, 1)
    folder = make_study(dict.fromkeys(variants, 0.5), seeds=seeds, images=10, probe=kind != "no probes")
    if kind == "probes alone":
        for path in folder.glob("runs/*/eval"):
            shutil.rmtree(path)
    if kind == "unfinished":
        shutil.rmtree(folder / "runs" / "pre-s1")
    page = built(folder)[1]
    expected = {
        "probes alone": "No benchmark was evaluated yet",
        "no probes": "No run was probed",
        "one seed": "With one seed per variant nothing can be concluded",
        "no baseline": "No baseline and variant to compare yet",
        "controls": "baseline-again (control)",
        "unfinished": "3 of 4 trained models have results",
    }
    assert expected[kind] in page.text
    assert "NaN" not in page.text and "None" not in page.text


def test_a_damaged_mirror_is_one_clear_line(make_study: StudyMaker) -> None:
    folder = small(make_study, seeds=(0,))
    mirror = write_mirror(folder / "mirror", with_pictures(folder))
    (mirror / "data" / "gqa" / "test.parquet").write_bytes(b"PAR1 no parquet")
    with pytest.raises(StoreError, match=r"pictures of gqa can't be read .* make the mirror again"):
        browsed(folder)
