"""A preset on files, through the real command: train, evaluate, probe, tabulate."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import numpy as np
import pytest
import yaml
from transformers import AutoProcessor

from prebench.data.examples import TrainingData
from prebench.schema import DataConfig
from tests.tiny_study import RUNS, SUITE, call, command

SCENES = DataConfig.model_validate({"scenes": {"num_images": 24, "questions_per_image": 3}})


def write_folder(folder: Path) -> Path:
    """Write scenes as LLaVA's JSON, a few records without a picture and one whose picture is missing."""
    data = TrainingData(SCENES)
    (folder / "images").mkdir(parents=True)
    records = []
    for number, image_id in enumerate(data.image_ids):
        messages = data.conversation(image_id, np.random.default_rng(number)).messages
        texts = [message["content"][-1]["text"] for message in messages]
        records.append({"id": image_id, "image": f"{image_id}.png", "conversations": turns(texts)})
        # Pictures that are no squares, so that padding shows.
        data.image(image_id).crop((0, 0, 96, 64)).save(folder / "images" / f"{image_id}.png")
    records += [{"conversations": turns(["what is red and blue?", "no"])} for _ in range(6)]
    records.append(records[0] | {"image": "missing.png"})
    path = folder / "train.json"
    path.write_text(json.dumps(records))
    return path


def turns(texts: list[str]) -> list[dict[str, str]]:
    first = 1 if len(texts) % 2 else 0
    found = [{"from": ("human", "gpt")[i % 2], "value": text} for i, text in enumerate(texts[first:])]
    if len(texts) > 2:
        found[0]["value"] = f"<image>\n{found[0]['value']}"
    return found


def write_preset(folder: Path, path: Path, **changes: object) -> Path:
    block = {"type": "llava_json", "path": str(path), "image_root": str(path.parent / "images")}
    stage = {"batch_size": 8, "gradient_accumulation_steps": 2, "caption_share": 0.0}
    preset = {
        "extends": "embedded",
        "data": {"scenes": None, "easy_vqa": None, "pad_to_square": True, "group_by": "modality_length"}
        | {"max_length": 256, "max_bad_share": 0.05, "num_workers": 1, "align": [block], "instruct": [block]}
        | changes,
        "train": {"validate_every": 0, "log_every": 1, "align": stage | {"steps": 3}, "instruct": stage | {"steps": 4}},
    }
    target = folder / "files.yaml"
    target.write_text(yaml.safe_dump(preset))
    return target


def run(preset: Path, results: Path) -> subprocess.CompletedProcess[str]:
    suite = results.parent / "tiny.yaml"
    suite.write_text(SUITE)
    names = ("--suite", suite, "--preset", preset, "--variants", "baseline,pre", "--seeds", "0", "--jobs", "1")
    return call(command("run", *names, "--results", results))


@pytest.mark.slow
def test_a_preset_on_files_from_end_to_end(tmp_path: Path) -> None:
    path = write_folder(tmp_path)
    done = run(write_preset(tmp_path, path), tmp_path / "results")
    assert done.returncode == 0, done.stderr[-3000:]
    study = tmp_path / "results" / "tiny-files"
    (line,) = [json.loads(line) for line in (study / "quarantine.jsonl").read_text().splitlines()]
    assert line["index"] == 30 and "missing.png" in line["reason"]
    logs = [[json.loads(row) for row in (study / f"runs/{run}/train.jsonl").read_text().splitlines()] for run in RUNS]
    hashes = [[row["batch_hash"] for row in log] for log in logs]
    assert hashes[0] == hashes[1] and len(set(hashes[0])) == 7
    assert all(np.isfinite(row["lm_loss"]) for log in logs for row in log)
    assert logs[1][-1]["pre_loss"] is None or np.isfinite(logs[1][-1]["pre_loss"])
    processor = AutoProcessor.from_pretrained(study / "runs" / "pre-s0" / "model")
    assert processor.image_processor.do_pad
    assert yaml.safe_load((study / "study.yaml").read_text())["preset"]["data"]["pad_to_square"] is True
    assert (study / "report.html").is_file() and (study / "scores.csv").is_file()


@pytest.mark.slow
def test_too_many_bad_pictures_stop_before_training(tmp_path: Path) -> None:
    path = write_folder(tmp_path)
    done = run(write_preset(tmp_path, path, max_bad_share=0.01), tmp_path / "results")
    assert done.returncode == 2 and "Traceback" not in done.stderr
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("prebench: ")]
    assert "train.json:1 (record 30): image 'missing.png': no such file" in line and "1 of 31 examples are bad" in line
    assert not list((tmp_path / "results").glob("*/runs/*/model"))
