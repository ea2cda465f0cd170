import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from prebench.data.mirror import build_mirror
from prebench.data.questions import LETTER_SUFFIX
from prebench.errors import ConfigError, DataError
from prebench.schema import SuiteConfig

TASKS = {
    "gqa": "generated",
    "vqav2_val": "generated",
    "pope": "generated",
    "mmbench_en_dev_static": "generated",
    "prebench_easy_vqa": "real",
}


def suite(images: int = 12, **changes):
    tasks = [
        {"task": t, "label": t, "data_source": s, "primary_metric": "exact_match", "num_images": images}
        for t, s in TASKS.items()
    ]
    values = {
        "name": "test",
        "defaults": {"preset": "embedded"},
        "tasks": tasks,
        "probe": {
            "num_train": 6,
            "num_val": 3,
            "num_test": 4,
            "attributes": [{"name": "background", "kind": "unasked"}],
            "reference_attribute": "background",
        },
    }
    return SuiteConfig.model_validate(values | changes)


@pytest.fixture(scope="module")
def mirror(tmp_path_factory):
    folder = tmp_path_factory.mktemp("mirror") / "mirror"
    return folder, build_mirror(folder, suite())


@pytest.fixture
def own_mirror(tmp_path):
    folder = tmp_path / "mirror"
    build_mirror(folder, suite(3, tasks=[t.model_dump() for t in suite(3).tasks[:1]], probe=None))
    return folder


def one_task(**changes):
    return suite(3, tasks=[suite(3).tasks[0].model_dump() | changes], probe=None)


def test_manifest(mirror):
    folder, manifest = mirror
    assert manifest == json.loads((folder / "mirror.json").read_text())
    assert set(manifest["tasks"]) == {*TASKS, "prebench_visual_probe"}
    for task, source in TASKS.items():
        entry = manifest["tasks"][task]
        assert entry["data_source"] == source
        assert 0 <= entry["references"]["majority"] <= 1
        assert entry["references"]["blind"] >= 0
    assert manifest["tasks"]["prebench_visual_probe"]["num_docs"] == 13
    assert manifest["tasks"]["mmbench_en_dev_static"]["num_docs"] == 48
    assert [p.name for p in folder.parent.iterdir()] == ["mirror"]


def test_every_document_has_a_type_and_a_blind_score(mirror):
    folder, manifest = mirror
    types = {}
    for task in TASKS:
        entry = manifest["tasks"][task]
        path = f"{entry['repo']}/{task}.documents.jsonl"
        assert path in entry["files"]
        known = [json.loads(line) for line in (folder / path).read_text().splitlines()]
        assert [row["doc_id"] for row in known] == list(range(entry["num_docs"]))
        mean = sum(row["blind_score"] for row in known) / len(known)
        assert mean == pytest.approx(entry["references"]["blind"], abs=1e-12)
        types[task] = {row["question_type"] for row in known}
    assert {"position", "color", "relation"} <= types["gqa"] & types["vqav2_val"]
    assert types["pope"] == {"existence"} and types["mmbench_en_dev_static"] == {"multiple_choice"}
    assert types["prebench_easy_vqa"] == {"color", "shape", "existence", "negation"}
    assert not [name for name in manifest["tasks"]["prebench_visual_probe"]["files"] if "documents" in name]


def test_blind_mmbench_is_a_guess_among_four_options(tmp_path):
    tasks = [suite(150).tasks[3].model_dump()]
    references = build_mirror(tmp_path / "mirror", suite(tasks=tasks, probe=None))["tasks"]
    found = references["mmbench_en_dev_static"]["references"]
    assert found["majority"] == 0 and 0.15 < found["blind"] < 0.45


def test_a_second_build_touches_nothing(mirror):
    folder, manifest = mirror
    before = {p: p.stat().st_mtime_ns for p in folder.rglob("*")}
    assert build_mirror(folder, suite()) == manifest
    assert {p: p.stat().st_mtime_ns for p in folder.rglob("*")} == before


def test_the_same_request_gives_the_same_bytes(mirror, tmp_path):
    assert build_mirror(tmp_path / "other", suite()) == mirror[1]


def test_another_request_replaces_the_mirror(own_mirror):
    wider = build_mirror(own_mirror, one_task(num_images=4))
    assert wider["tasks"]["gqa"]["num_docs"] == 32
    seeded = build_mirror(own_mirror, one_task(num_images=4).model_copy(update={"mirror_seed": 1}))
    assert seeded["tasks"]["gqa"]["files"] != wider["tasks"]["gqa"]["files"]


@pytest.mark.parametrize("damage", ["flip", "delete"])
def test_a_damaged_file_is_named(own_mirror, damage):
    path = next(own_mirror.rglob("testdev_balanced_instructions/*.parquet"))
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.unlink() if damage == "delete" else path.write_bytes(content)
    with pytest.raises(DataError, match=rf"{path}: .*delete {own_mirror} to build it again"):
        build_mirror(own_mirror, one_task())


def test_a_damaged_manifest_is_named(own_mirror):
    (own_mirror / "mirror.json").write_text("{")
    with pytest.raises(DataError, match=r"mirror\.json: damaged; delete"):
        build_mirror(own_mirror, one_task())


def test_a_foreign_folder_is_left_alone(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(DataError, match=r"not empty and without mirror\.json"):
        build_mirror(tmp_path, one_task())
    assert (tmp_path / "notes.txt").read_text() == "mine"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"task": "gqq"}, "'gqq' has no embedded data .*did you mean 'gqa'"),
        ({"data_source": "real"}, "the embedded mirror's data are generated"),
        ({"task": "prebench_easy_vqa", "data_source": "real", "num_images": 1001}, "there are 1000 pictures"),
        ({"data_source": "real", "num_images": None}, "real data are needed for gqa; .*`prebench mirror --suite"),
    ],
)
def test_impossible_requests(tmp_path, changes, message):
    with pytest.raises(ConfigError, match=message):
        build_mirror(tmp_path / "mirror", one_task(**changes))
    assert not (tmp_path / "mirror").exists()


READ = """
import json
from collections import Counter, defaultdict
from datasets import load_dataset

from lmms_eval.tasks.vqav2.utils import vqav2_doc_to_text, vqav2_process_results_val
from lmms_eval.tasks.pope.utils import pope_aggregate_accuracy, pope_aggregate_yes_ratio, pope_process_results
from lmms_eval.tasks.mmbench.en_utils import mmbench_doc_to_text, mmbench_evaluator, mmbench_process_results

POST = {"post_prompt": "\\nAnswer with the option's letter from the given choices directly."}
found = {}
gqa = load_dataset("lmms-lab-encoder/GQA", "testdev_balanced_instructions", split="testdev", token=True)
images = load_dataset("lmms-lab-encoder/GQA", "testdev_balanced_images", split="testdev", token=True)
pictures = {row["id"]: row["image"].convert("RGB").size for row in images}
found["gqa"] = [len(gqa), len(pictures), all(pictures[i] == (96, 96) for i in gqa["imageId"])]

vqa = load_dataset("lmms-lab-encoder/VQAv2", token=True)["validation"]
found["vqa"] = sum(vqav2_process_results_val(d, [d["multiple_choice_answer"]])["exact_match"] for d in vqa) / len(vqa)
found["annotators"] = sorted({len({a["answer_id"] for a in d["answers"]}) for d in vqa})
found["disagree"] = sum(len({a["answer"] for a in d["answers"]}) > 1 for d in vqa) / len(vqa)
found["other"] = [
    vqav2_process_results_val(d, [a["answer"]])["exact_match"]
    for d in vqa for a in d["answers"] if a["answer"] != d["multiple_choice_answer"]
]

pope = load_dataset("lmms-lab-encoder/POPE", token=True)["test"]
right = [pope_process_results(d, [d["answer"]])["pope_accuracy"] for d in pope]
found["pope"] = [pope_aggregate_accuracy(right), pope_aggregate_yes_ratio(right), Counter(pope["category"])]
asked = defaultdict(list)
for d in pope:
    asked[d["image_source"], d["category"]].append(d["answer"])
found["pope_balanced"] = all(a.count("yes") == a.count("no") for a in asked.values())

bench = load_dataset("lmms-lab-encoder/MMBench", "en", token=True)["dev"]
found["mmbench_prompt"] = mmbench_doc_to_text(bench[0], POST)
found["mmbench_last"] = bench[0]["D"]
for name, answer in (("right", lambda d: d["answer"]), ("constant", lambda d: "A")):
    results = [mmbench_process_results(d, [answer(d)])["gpt_eval_score"] for d in bench]
    found["mmbench_" + name] = float(mmbench_evaluator.eval_result(results, "static")[0])

easy = load_dataset("prebench/easy_vqa", split="test")
found["easy"] = [sorted(easy.column_names), len(set(easy["image_id"])), easy[0]["image"].size]
probe = load_dataset("prebench/visual_probe", split="test")
row = probe[0]
found["probe"] = [sorted(probe.column_names), Counter(probe["subset"]), row["mask"].mode]
found["mask"] = [max(row["mask"].getdata()), row["num_objects"], len(row["object_names"]), len(row["shapes"])]
print("RESULT" + json.dumps(found))
"""


@pytest.mark.slow
def test_datasets_and_upstream_code_read_the_mirror_offline(mirror, tmp_path: Path):
    folder, manifest = mirror
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path), "HF_DATASETS_CACHE": str(tmp_path)}
    command = [sys.executable, "-c", READ]
    run = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=180, check=False)
    assert run.returncode == 0, run.stderr[-3000:]
    found = json.loads(run.stdout.rpartition("RESULT")[2])
    assert found["gqa"] == [manifest["tasks"]["gqa"]["num_docs"], 12, True]
    assert found["vqa"] == 1.0
    assert found["annotators"] == [10]
    assert 0.2 < found["disagree"] < 0.8
    assert all(0 <= score < 1 for score in found["other"])
    assert found["pope"][:2] == [1.0, 0.5]
    assert set(found["pope"][2]) == {"random", "popular", "adversarial"}
    assert found["pope_balanced"]
    assert found["mmbench_prompt"].endswith(f"\nD. {found['mmbench_last']}{LETTER_SUFFIX}")
    assert " There are several options:\nA. " in found["mmbench_prompt"]
    assert found["mmbench_right"] == 1.0
    assert found["mmbench_constant"] == 0.0
    assert found["easy"] == [["answer", "image", "image_id", "question", "question_id", "type"], 12, [64, 64]]
    names = "background colors fill image image_id mask num_large num_objects object_names shapes subset"
    assert found["probe"] == [names.split(), {"train": 6, "val": 3, "test": 4}, "L"]
    most, objects, named, shapes = found["mask"]
    assert most == objects == named
    assert shapes == 5
