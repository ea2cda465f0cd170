"""report.html as readers meet it: headless Chromium, phone and desktop, light and dark. Needs Chromium."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from click.testing import CliRunner

from prebench.cli import main

from .browser import Browser, open_browser
from .conftest import CONTROLS, random_scores, sample, study_config, write_curve, write_run, write_task
from .test_ablation import make_grid
from .test_report import HOSTILE, pixel_hash, scene, write_mirror

pytestmark = [pytest.mark.slow, pytest.mark.browser]

VARIANTS = ("baseline", "pre", *CONTROLS)
SEEDS = (0, 1, 2)
IMAGES = 20
MODES = [(width, scheme) for width in (390, 1440) for scheme in ("light", "dark")]
LONG = "an_answer_without_any_place_to_break_it_" * 8

# Every visible text against what lies behind it (WCAG 2.2, 1.4.3), controls' opacity included.
CONTRAST = """(() => {
  const parse = (text) => (text.match(/[\\d.]+/g) || []).map(Number);
  const linear = (v) => v / 255 <= 0.04045 ? v / 255 / 12.92 : ((v / 255 + 0.055) / 1.055) ** 2.4;
  const light = (c) => c.slice(0, 3).map(linear).reduce((sum, v, i) => sum + v * [0.2126, 0.7152, 0.0722][i], 0);
  const behind = (element) => {
    for (let at = element; at; at = at.parentElement) {
      const c = parse(getComputedStyle(at).backgroundColor);
      if (c.length === 3 || c[3] > 0.99) return c;
    }
    return [255, 255, 255];
  };
  const bad = [];
  let seen = 0;
  const walk = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  while (walk.nextNode()) {
    const text = walk.currentNode.textContent.trim();
    const element = walk.currentNode.parentElement;
    if (!text || ["SCRIPT", "STYLE", "OPTION", "NOSCRIPT", "title", "desc"].includes(element.tagName)) continue;
    if (!element.checkVisibility()) continue;
    const style = getComputedStyle(element);
    const front = parse(element instanceof SVGElement ? style.fill : style.color);
    const [a, b] = [light(front), light(behind(element))].sort((x, y) => y - x);
    const ratio = (a + 0.05) / (b + 0.05);
    seen += 1;
    if (ratio < 4.5) bad.push(`${element.outerHTML.slice(0, 120)}: ${ratio.toFixed(2)}`);
  }
  return {seen, bad};
})()"""

# What sticks out of the window without a box of its own to scroll in.
OUTSIDE = """[...document.querySelectorAll("body *")].filter((element) => {
  if (!element.checkVisibility() || element.closest(".scroll, pre, .skip")) return false;
  const box = element.getBoundingClientRect();
  return box.width > 0 && (box.right > innerWidth + 1 || box.left < -1);
}).map((element) => `${element.tagName} ${element.className} ${element.textContent.slice(0, 40)}`)"""


def write_study(folder: Path) -> None:
    """Write a study of six variants with pictures, hostile and long strings, a failed document and two doses' worth."""
    config = study_config(VARIANTS, SEEDS).model_dump(mode="json") | {"name": folder.name}
    config["variants"][1]["description"] = HOSTILE
    folder.mkdir(parents=True)
    (folder / "study.yaml").write_text(yaml.safe_dump(config))
    for number, variant in enumerate(VARIANTS):
        for seed in SEEDS:
            scores = random_scores(10 * seed + number, IMAGES, 0.5)
            run = write_run(folder, variant, seed, scores)
            write_curve(run, [1.5, 1.0, 0.7])
            answered = [
                sample(i, score, image_hash=pixel_hash(scene(i // 4)), question_type=("color", "count")[i % 2])
                for i, score in enumerate(scores)
            ]
            answered[0] = sample(0, 1.0, question=HOSTILE, response=LONG, image_hash=pixel_hash(scene(0)))
            answered[5] = sample(5, None, error=HOSTILE)
            write_task(run, "gqa", "GQA on scenes", "generated", answered)
    write_mirror(folder / "mirror", {"gqa": [scene(i // 4) for i in range(4 * IMAGES)]})


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The page that the real command line writes."""
    folder = tmp_path_factory.mktemp("results") / "tiny-p"
    write_study(folder)
    done = CliRunner().invoke(main, ["report", "--results", str(folder.parent)])
    assert done.exit_code == 0, done.output
    assert str(folder / "report.html") in done.output
    return folder / "report.html"


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    with open_browser(tmp_path_factory.mktemp("profile")) as found:
        yield found


def picked(browser: Browser, **fields: Any) -> dict[str, Any]:
    """Choose in the sample browser's form; return the line above the cards and the cards' texts."""
    browser.evaluate(
        f"""(() => {{ const form = document.getElementById("browser");
        for (const [name, value] of Object.entries({json.dumps(fields)})) form.elements[name].value = value;
        form.dispatchEvent(new Event("change", {{bubbles: true}})); }})()"""
    )
    return browser.evaluate(
        """({found: document.getElementById("found").textContent,
        cards: [...document.querySelectorAll(".card")].map((card) => card.textContent)})"""
    )


@pytest.mark.parametrize(("width", "scheme"), MODES)
def test_the_page_opens_cleanly(browser: Browser, page: Path, width: int, scheme: str) -> None:
    browser.problems.clear()
    browser.open(page, width, scheme=scheme)
    browser.evaluate("for (const part of document.querySelectorAll('details')) part.open = true")
    assert browser.evaluate("document.documentElement.scrollWidth") <= width
    assert browser.evaluate("innerWidth") == width
    assert browser.evaluate(OUTSIDE) == []
    contrast = browser.evaluate(CONTRAST)
    assert contrast["seen"] > 500 and contrast["bad"] == []
    background = browser.evaluate("getComputedStyle(document.body).backgroundColor")
    assert (background == "rgb(255, 255, 255)") == (scheme == "light")
    shown = "Promise.all([...document.images].map((image) => image.decode().then(() => image.naturalWidth)))"
    assert set(browser.evaluate(shown)) == {scene(0).width}
    assert browser.problems == []


def test_the_reader_overrides_the_scheme(browser: Browser, page: Path) -> None:
    browser.open(page, 1440, scheme="light")
    for chosen, expected in (("dark", "rgb(21, 24, 28)"), ("light", "rgb(255, 255, 255)")):
        browser.evaluate(
            f"""(() => {{ const select = document.getElementById("scheme"); select.value = "{chosen}";
            select.dispatchEvent(new Event("change", {{bubbles: true}})); }})()"""
        )
        assert browser.evaluate("getComputedStyle(document.body).backgroundColor") == expected


def test_samples_are_filtered_and_paged(browser: Browser, page: Path) -> None:
    browser.problems.clear()
    browser.open(page, 390)
    scores = {
        variant: [score or 0.0 for score in random_scores(10 + number, IMAGES, 0.5)]
        for number, variant in enumerate(VARIANTS)
    }
    rest = [i for i in range(4 * IMAGES) if i not in (0, 5)]
    fields = {"a": "baseline", "b": "pre", "seed": 1, "task": 0, "kind": ""}
    for outcome, wanted in {"lost": (1, 0), "won": (0, 1), "wrong": (0, 0), "right": (1, 1)}.items():
        expected = sum((scores["baseline"][i], scores["pre"][i]) == wanted for i in rest) + (outcome == "right")
        found = picked(browser, **fields, outcome=outcome)
        assert found["found"].startswith(f"{expected} of the "), (outcome, found["found"])
        assert len(found["cards"]) == min(12, expected)
    lost = sum((scores["baseline"][i], scores["pre"][i]) == (1, 0) for i in rest)
    assert f"Of all 80 documents, {lost} went from right to wrong" in found["found"]
    failed = picked(browser, **fields, outcome="failed")
    assert failed["found"].startswith("1 of the") and HOSTILE.split()[0] in failed["cards"][0]
    counted = picked(browser, **fields | {"kind": "count"}, outcome="all")
    assert counted["cards"] and all(" · count · " in card for card in counted["cards"])
    first = picked(browser, **fields, outcome="all")["cards"]
    assert len(first) == 12 and HOSTILE.splitlines()[0].strip() in first[0] and LONG in first[0]
    browser.evaluate("document.getElementById('next').click()")
    second = picked(browser)
    assert "page 1 of" in second["found"]  # a new choice starts at its first page
    browser.evaluate("document.getElementById('next').click()")
    assert "page 2 of" in browser.evaluate("document.getElementById('found').textContent")
    assert browser.evaluate("document.documentElement.scrollWidth") <= 390
    assert browser.problems == []


def test_numbers_and_marks_tell_their_source(browser: Browser, page: Path) -> None:
    browser.open(page, 390)
    browser.evaluate("document.querySelector('#scores td:last-child').click()")
    bar = "document.getElementById('source')"
    assert "runs/baseline-again-s0/eval/gqa.json" in browser.evaluate(f"{bar}.textContent")
    browser.evaluate("document.querySelector('.chart .mark').dispatchEvent(new MouseEvent('click', {bubbles: true}))")
    assert "layer 0" in browser.evaluate(f"{bar}.textContent")
    browser.evaluate(f"{bar}.querySelector('button').click()")
    assert browser.evaluate(f"{bar}.hidden") is True
    browser.evaluate("document.querySelector('[data-hides=\"1\"]').click()")
    lines = "[...document.querySelectorAll('.chart [data-v=\"1\"]')]"
    assert browser.evaluate(f"{lines}.length > 5 && {lines}.every((line) => getComputedStyle(line).display === 'none')")
    browser.evaluate("location.hash = '#records'")
    browser.evaluate("new Promise((done) => setTimeout(done, 100))")
    assert browser.evaluate("document.getElementById('records').checkVisibility()")


@pytest.mark.parametrize("width", [390, 1440])
def test_the_page_of_an_ablation_opens_cleanly(browser: Browser, tmp_path: Path, width: int) -> None:
    folder = make_grid(tmp_path, 3)
    done = CliRunner().invoke(main, ["report", "--results", str(folder.parent)])
    assert done.exit_code == 0, done.output
    browser.problems.clear()
    browser.open(folder / "report.html", width, scheme="dark")
    browser.evaluate("for (const part of document.querySelectorAll('details')) part.open = true")
    assert browser.evaluate("document.documentElement.scrollWidth") <= width
    assert browser.evaluate(OUTSIDE) == [] and browser.evaluate(CONTRAST)["bad"] == []
    assert browser.evaluate("document.querySelectorAll('#dose figure').length") == 6
    assert browser.evaluate("document.querySelectorAll('#ablation tbody tr').length") == 11
    assert browser.problems == []
