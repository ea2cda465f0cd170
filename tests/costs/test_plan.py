"""`prebench plan --preset`: what it prints, where its numbers come from, and what it refuses."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from click.testing import CliRunner, Result

from prebench.cli import main
from prebench.config import dump_yaml, load_preset, load_variant
from prebench.costs.lengths import stage_lengths
from prebench.costs.plan import ROOM
from prebench.costs.stages import Machine, stage_costs, vocabulary
from prebench.data.collator import Collator
from prebench.data.data_report import inspect
from prebench.data.examples import TrainingData
from prebench.data.order import data_order
from prebench.model.builder import model_processor
from prebench.model.local_files import local_processor
from tests.model.published_parts import tiny_preset

ROOT = Path(__file__).parents[2]
SMALL = "siglip2-qwen25-0.5b"


def plan(*arguments: object) -> Result:
    return CliRunner().invoke(main, ["plan", *map(str, arguments)])


def written(path: Any, *arguments: object) -> dict[str, Any]:
    result = plan(*arguments, "--json", path)
    assert result.exit_code == 0, result.output
    found: dict[str, Any] = json.loads(path.read_text())
    return found


def test_a_published_preset_is_planned_without_its_files(tmp_path):
    result = plan("--preset", SMALL, "--gpu", "rtx4090", "--json", tmp_path / "plan.json")
    assert result.exit_code == 0, result.output
    for text in (
        "tokens of align: assumed",
        "--utilisation",
        "baseline",
        "pre",
        "2 variants x 3 seeds: 6 runs",
        "fits",
    ):
        assert text in result.output
    found = json.loads((tmp_path / "plan.json").read_text())
    align, instruct = found["variants"][1]["stages"]
    assert align["lengths"]["tokens"] == 729 + 30 and instruct["lengths"]["longest"] == 2048
    assert align["counts"]["trained"]["language_model"] == 0
    assert instruct["counts"]["trained"]["language_model"] > 490e6
    speed = 165e12 * 0.4
    assert instruct["seconds"] == pytest.approx(instruct["operations"] / speed)
    baseline, pre = found["variants"]
    assert 0 < pre["operations"] - baseline["operations"] < 0.01 * baseline["operations"]
    assert baseline["regularizer_share"] < pre["regularizer_share"]


def test_processes_share_time_and_shards_share_memory(tmp_path):
    one = written(tmp_path / "a", "--preset", SMALL, "--set", "train.instruct.gradient_accumulation_steps=8")
    eight = ("--gpus", 8, "--set", "train.instruct.gradient_accumulation_steps=1")
    copies = written(tmp_path / "b", "--preset", SMALL, *eight, "--set", "train.align.gradient_accumulation_steps=4")
    shards = written(
        tmp_path / "c",
        "--preset",
        SMALL,
        *eight,
        "--set",
        "train.align.gradient_accumulation_steps=4",
        "--sharding",
        "fsdp",
    )
    alone, copied, sharded = (found["variants"][0]["stages"][1] for found in (one, copies, shards))
    assert alone["operations"] == pytest.approx(copied["operations"])
    assert alone["seconds"] == pytest.approx(8 * copied["seconds"])
    assert alone["memory"]["buckets"] == 0 and copied["memory"]["buckets"] == copied["memory"]["gradients"]
    for part in ("weights", "gradients", "optimizer"):
        assert alone["memory"][part] == copied["memory"][part] == pytest.approx(8 * sharded["memory"][part])


def test_what_does_not_fit_is_told_what_would_help(tmp_path):
    found = written(tmp_path / "plan", "--preset", SMALL, "--gpu-memory", 18)
    assert found["fits"] is False and found["remedy"]["changes"] == [
        "--set train.align.gradient_accumulation_steps=64",
        "--set train.instruct.gradient_accumulation_steps=64",
    ]
    changes = [part for change in found["remedy"]["changes"] for part in change.split()]
    again = written(tmp_path / "again", "--preset", SMALL, "--gpu-memory", 18, *changes)
    assert again["fits"] is True and again["remedy"] is None
    peak = max(stage["memory"]["peak"] for variant in again["variants"] for stage in variant["stages"])
    assert peak == found["remedy"]["peak"] <= ROOM * 18e9
    result = plan("--preset", SMALL, "--gpu-memory", 4)
    assert "does not fit" in result.output and "no smaller micro-batches help" in result.output


def test_a_cpu_has_no_speed_unless_it_is_given():
    smoke = ("--preset", "smoke", "--text-tokens", 20, "--set", "train.device=cpu")
    result = plan(*smoke, "--set", "train.dtype=float32")
    assert result.exit_code == 0, result.output
    assert "no hours" in result.output and "per process" in result.output and " fits" not in result.output
    timed = plan(*smoke, "--tflops", 0.07)
    assert "process hours" in timed.output and "0.07 TFLOP/s" in timed.output


def test_generated_examples_are_those_that_a_run_sees():
    preset = load_preset("smoke")
    processor = model_processor(preset.model)
    found = stage_lengths(preset, "instruct", processor, None)
    order = data_order(TrainingData(preset.data), preset.train.instruct, "instruct", 0)
    encode = Collator(processor, order.data).encode
    seen = [len(encode(order[position]).input_ids) for position in range(25 * 16)]
    assert found.tokens == pytest.approx(sum(seen) / len(seen)) and found.longest == max(seen)
    assert "first 400 examples" in found.source


def test_files_are_measured_with_the_presets_own_tokenizer(tmp_path):
    preset = tiny_preset(SMALL, tmp_path)
    processor = local_processor(preset.model)
    assert processor is not None
    found = {name: stage_lengths(preset, name, processor, None) for name in ("align", "instruct")}
    assert all(lengths.source.startswith("measured on") for lengths in found.values())
    reports = inspect(preset.data, processor, lambda path, done, total: None)
    for lengths, report in zip(found.values(), reports, strict=True):
        assert lengths.longest == report.lengths[-1] and lengths.pictures == report.images / report.examples
        assert lengths.targets == pytest.approx(report.targets / report.examples)
    rows = vocabulary(preset.model, len(processor.tokenizer))
    costs = stage_costs(preset, load_variant("pre").regularizer, Machine(1), found, rows)
    assert [cost.lengths for cost in costs] == list(found.values())
    path = tmp_path / "tiny.yaml"
    path.write_text(dump_yaml(preset))
    result = plan("--preset", path)
    assert result.exit_code == 0, result.output
    assert "measured on" in result.output and "assumed" not in result.output


def test_other_numbers_of_text_tokens_are_taken(tmp_path):
    found = written(tmp_path / "plan", "--preset", SMALL, "--text-tokens", "20,100")
    assert [stage["lengths"]["tokens"] for stage in found["variants"][0]["stages"]] == [749, 829]


def test_cached_features_cost_no_forward_pass_of_the_tower():
    preset = load_preset("embedded")
    lengths = {name: stage_lengths(preset, name, None, 50) for name in ("align", "instruct")}
    rows = vocabulary(preset.model, None)
    costs = stage_costs(preset, None, Machine(1), lengths, rows)
    assert all(cost.cached_features and not cost.work["vision tower"].total for cost in costs)
    train = preset.train.model_copy(update={"cache_vision_features": False})
    costs = stage_costs(preset.model_copy(update={"train": train}), None, Machine(1), lengths, rows)
    assert all(cost.work["vision tower"].forward and not cost.work["vision tower"].backward for cost in costs)


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (["--preset", SMALL, "--difference", "1"], ["--difference", "--preset", "one at a time"]),
        (["baseline", "pre", "--preset", SMALL], ["BASELINE VARIANT", "--preset"]),
        (["--gpus", "8"], ["--gpus", "name the --preset"]),
        (["--preset", SMALL, "--gpus", "3"], ["train.align.batch_size 256", "96", "--gpus"]),
        (["--preset", "llava"], ["unknown preset 'llava'"]),
        (["--preset", SMALL, "--variants", "prr"], ["unknown variant 'prr'", "pre"]),
        (["--preset", SMALL, "--set", "train.align.step=1"], ["train.align.step"]),
    ],
)
def test_what_makes_no_sense_is_one_line(arguments, parts):
    result = plan(*arguments)
    assert result.exit_code == 2 and len(result.stderr.strip().splitlines()) == 1
    for part in parts:
        assert part in result.stderr


@pytest.mark.parametrize("text", ["", "a", "1,2,3", "0", "-5", "nan"])
def test_text_tokens_are_one_or_two_numbers(text):
    result = plan("--preset", SMALL, "--text-tokens", text)
    assert result.exit_code == 2 and "such as 30,250" in result.stderr


def test_an_external_anchors_width_is_read(tmp_path):
    (tmp_path / "dino").mkdir()
    (tmp_path / "dino" / "config.json").write_text(json.dumps({"model_type": "dinov2", "hidden_size": 384}))
    block = {"type": "predictive", "weight": 0.5, "anchor": "external", "anchor_model": str(tmp_path / "dino")}
    variant = tmp_path / "variant.yaml"
    variant.write_text(yaml.safe_dump({"description": "", "regularizer": block}))
    smoke = ("--preset", "smoke", "--text-tokens", 20, "--variants", variant)
    found = written(tmp_path / "plan", *smoke)
    counts = found["variants"][0]["stages"][0]["counts"]
    assert counts["total"]["predictor"] == 64 * 64 + 64 + 64 * 384 + 384
    (tmp_path / "dino" / "config.json").unlink()
    result = plan(*smoke)
    assert result.exit_code == 2 and "config.json" in result.stderr


def test_the_page_shows_what_the_command_prints():
    page = (ROOT / "docs" / "presets.md").read_text(encoding="utf-8")
    command, shown = re.findall(r"^```\n\$ prebench plan (--preset [^\n]+)\n(.+?)^```", page, re.MULTILINE | re.DOTALL)[
        0
    ]
    assert plan(*command.split()).stdout == shown


@pytest.mark.slow
def test_the_pages_table_holds_the_commands_numbers(tmp_path):
    page = (ROOT / "docs" / "presets.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| `([\w.-]+ --gpu[^`]+)` \| (.+) \|$", page, re.MULTILINE)
    assert len(rows) == 6
    for number, (command, cells) in enumerate(rows):
        found = written(tmp_path / str(number), "--preset", *command.split())["variants"][-1]
        align, instruct, _, operations, share, hours = cells.split(" | ")
        peaks = [float(stage["memory"]["peak"]) / 1e9 for stage in found["stages"]]
        assert peaks == pytest.approx([float(align), float(instruct)], rel=0.006), command
        assert found["operations"] / 1e15 == pytest.approx(float(operations.replace(",", "")), rel=0.001), command
        assert f"{found['regularizer_share']:.2%}" == share
        assert found["hours"] == pytest.approx(float(hours), rel=0.006), command
