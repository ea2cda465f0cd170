"""What the pages say can be typed: commands and options exist, blocks of YAML load, links and named files are there."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click
import pytest
import yaml

from prebench.cli import main
from prebench.config import list_configs, load_preset, load_suite, load_variant
from tests.own_package import EXAMPLE, install_example

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
FENCED = re.compile(r"^```(\w*)\n(.*?)^```", re.MULTILINE | re.DOTALL)
SPAN = re.compile(r"`((?:torchrun |prebench )[^`]+)`")
COMMAND = re.compile(r"^(?:\w+=\S+ |torchrun .* -m )*(?:[\w./]*/)?prebench(?:\.cli)? (.+)")
LINK = re.compile(r"\]\(([^)\s]+)\)")
FILE = re.compile(r"`((?:prebench|tests|benchmarks|docs|examples|configs)/[\w/.-]+\.(?:py|yaml|md))`")
KINDS = {"suite": "suites", "preset": "presets"}
pages = pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)


def blocks(page: Path, *languages: str) -> Iterator[str]:
    for language, text in FENCED.findall(page.read_text(encoding="utf-8")):
        if language in languages:
            yield text


def commands(page: Path) -> Iterator[tuple[bool, list[str]]]:
    """Yield every `prebench` on a page: whether it stands in a block, to be typed as it is, and its arguments.

    What stands behind two spaces or a # is a remark; `a | b` names several commands.
    """
    text = page.read_text(encoding="utf-8")
    shown = re.sub(r"\\\n\s*", " ", "".join(blocks(page, "", "bash", "console"))).splitlines()
    lines = [(True, line.removeprefix("$ ")) for line in shown]
    lines += [(False, " ".join(span.split())) for span in SPAN.findall(FENCED.sub("", text))]
    for whole, line in lines:
        if (found := COMMAND.match(line)) is not None:
            typed = re.split(r"\s{2,}|\s#", found[1])[0]
            first, *more = re.sub(r"\[(-[^\]]+)\]", r"\1", typed).split(" | ")
            yield whole, [part for part in shlex.split(first) if part != "..."]
            yield from ((False, [name]) for name in more)


def parse(arguments: list[str]) -> click.Context | None:
    """Let click read a command line as the shell would, without doing anything; None after --help or --version."""
    try:
        group = main.make_context("prebench", list(arguments))
        name, command, rest = main.resolve_command(group, [*group._protected_args, *group.args])
        assert command is not None
        return command.make_context(name, rest, parent=group)
    except click.exceptions.Exit:
        return None


def require_shipped(values: dict[str, Any]) -> None:
    """Expect names of suites, presets and variants to be shipped ones, and `--set` to change fields that exist."""
    for option, kind in KINDS.items():
        name = values.get(option)
        assert name is None or name.isupper() or name.endswith(".yaml") or name in list_configs(kind), name
    for name in values.get("variants") or ():
        assert name.endswith(".yaml") or name in list_configs("variants"), name
    suite = values.get("suite")
    preset = values.get("preset") or (load_suite(suite).defaults.preset if suite in list_configs("suites") else None)
    if values.get("overrides") and preset in list_configs("presets"):
        load_preset(preset, values["overrides"])


@pages
def test_commands_can_be_typed(page, monkeypatch):
    monkeypatch.setenv("PREBENCH_TRACKER", "")  # --tracker writes it
    for whole, arguments in commands(page):
        try:
            context = parse(arguments)
        except click.ClickException as error:
            if not whole and isinstance(error, click.MissingParameter | click.BadOptionUsage):
                continue  # the text speaks of a command or an option without naming everything
            pytest.fail(f"{page.name}: prebench {shlex.join(arguments)}: {error.format_message()}")
        if context is not None:
            require_shipped(context.params)


def test_commands_are_found():
    assert sum(len(list(commands(page))) for page in PAGES) > 60
    with pytest.raises(click.UsageError, match="No such option"):
        parse(["run", "--suit", "full"])
    with pytest.raises(click.UsageError, match="unknown command"):
        parse(["rum"])


@pages
def test_blocks_of_yaml_load(page, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(install_example(tmp_path / "site"))
    for text in blocks(page, "yaml"):
        path = tmp_path / "shown.yaml"
        path.write_text(text)
        kinds = yaml.safe_load(text).keys()
        load: Any = load_variant if "regularizer" in kinds else load_suite if "tasks" in kinds else load_preset
        load(str(path))


@pages
def test_links_lead_somewhere(page):
    text = FENCED.sub("", page.read_text(encoding="utf-8"))
    for target in LINK.findall(text):
        path, _, heading = target.partition("#")
        if "://" in target:
            continue
        found = page.parent / path if path else page
        assert found.exists(), f"{page.name}: {target}"
        if heading:
            assert heading in headings(found), f"{page.name}: {target}"
    for name in FILE.findall(text):
        assert (ROOT / name).is_file(), f"{page.name}: {name}"


def headings(page: Path) -> set[str]:
    lines = re.findall(r"^#+ (.*)$", FENCED.sub("", page.read_text(encoding="utf-8")), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", line.lower()).replace(" ", "-") for line in lines}


def test_the_page_on_own_regularizers_shows_the_example():
    page = (ROOT / "docs" / "own_regularizer.md").read_text(encoding="utf-8")
    for name in ("pyproject.toml", "patch_relations.py", "relations.yaml"):
        assert (EXAMPLE / name).read_text() in page, name


def test_the_index_knows_every_page():
    index = (ROOT / "docs" / "README.md").read_text(encoding="utf-8")
    for page in PAGES[1:]:
        assert page.name == "README.md" or f"({page.name})" in index, page.name
