"""Small mirrors of the paper's benchmarks in upstream's schemas, with answers and what each must score, by hand."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from datasets import Dataset, Features, Image, List, Value

from tests.evaluation.mirror import _write, image

Rows = list[dict[str, Any]]
TEXT, INT = Value("string"), Value("int64")


def write_paper_mirror(folder: Path) -> Path:
    """Write all data sets under their names on the Hub."""
    for repo, (split, make) in DATA_SETS.items():
        rows, features = make()
        configs = {"default": (split, Dataset.from_list(rows, features=Features(features)))}
        if repo.endswith("MMBench"):
            configs = {"en": configs["default"]}
        if repo.endswith("GQA"):
            pictures = [{"id": name, "image": image(number)} for number, name in enumerate(("n1", "n2"))]
            configs = {
                "testdev_balanced_instructions": configs["default"],
                "testdev_balanced_images": (
                    split,
                    Dataset.from_list(pictures, Features({"id": TEXT, "image": Image()})),
                ),
            }
        _write(folder / repo, configs)
    return folder


def _vqav2() -> tuple[Rows, dict[str, Any]]:
    annotated = [["red"] * 10, ["2"] * 8 + ["3"] * 2, ["yes"] * 2 + ["no"] * 8, ["a dog"] * 4 + ["cat"] * 6]
    rows = [
        {
            "question_type": "what",
            "multiple_choice_answer": max(set(answers), key=answers.count),
            "answers": [
                {"answer": answer, "answer_confidence": "yes", "answer_id": position + 1}
                for position, answer in enumerate(answers)
            ],
            "image_id": 7 + number // 2,
            "answer_type": ("other", "number", "yes/no", "other")[number],
            "question_id": 70 + number,
            "question": f"Question {number}?",
            "image": image(10 + number // 2),
        }
        for number, answers in enumerate(annotated)
    ]
    annotators = List({"answer": TEXT, "answer_confidence": TEXT, "answer_id": INT})
    features = {"question_type": TEXT, "multiple_choice_answer": TEXT, "answers": annotators, "image_id": INT}
    return rows, features | {"answer_type": TEXT, "question_id": INT, "question": TEXT, "image": Image()}


def _gqa() -> tuple[Rows, dict[str, Any]]:
    asked = [("n1", "yes", "verify"), ("n2", "left", "choose"), ("n1", "red", "query"), ("n2", "no", "verify")]
    rows = [
        {
            "id": f"{number:08d}",
            "imageId": picture,
            "question": f"Is it {number}?",
            "answer": answer,
            "fullAnswer": f"It is {answer}.",
            "isBalanced": True,
            "types": {"structural": kind, "semantic": "attr", "detailed": ""},
        }
        for number, (picture, answer, kind) in enumerate(asked)
    ]
    types = {"structural": TEXT, "semantic": TEXT, "detailed": TEXT}
    features = {"id": TEXT, "imageId": TEXT, "question": TEXT, "answer": TEXT, "fullAnswer": TEXT}
    return rows, features | {"isBalanced": Value("bool"), "types": types}


def _mmbench() -> tuple[Rows, dict[str, Any]]:
    """Four, two and three options; the first two questions share a picture."""
    questions = [(3, ["red", "blue", "green", "white"], 20), (5, ["cat", "dog"], 20), (8, ["one", "two", "three"], 21)]
    rows = []
    for index, options, picture in questions:
        for shift in range(len(options)):
            rotated = options[shift:] + options[:shift]
            rows.append(
                {
                    "index": index + shift * 1_000_000,
                    "question": f"Which one is in picture {picture}?",
                    "hint": "nan" if index == 3 else "Look closely.",
                    "answer": "ABCD"[rotated.index(options[0])],
                    **dict(zip("ABCD", [*rotated, "nan", "nan"], strict=False)),
                    "category": "attribute_recognition" if index == 3 else "object_recognition",
                    "image": image(picture),
                    "source": "test",
                    "L2-category": "finegrained_perception (instance-level)",
                    "comment": "nan",
                    "split": "dev",
                }
            )
    texts = ["question", "hint", "answer", *"ABCD", "category", "source", "L2-category", "comment", "split"]
    return rows, {"index": INT, **dict.fromkeys(texts, TEXT), "image": Image()}


def _pope() -> tuple[Rows, dict[str, Any]]:
    rows = [
        {
            "id": str(number),
            "question_id": str(number + 1),
            "question": f"Is there a thing {number} in the image?",
            "answer": ("yes", "no")[number % 2],
            "image_source": f"COCO_val2014_{number // 3}",
            "image": image(30 + number // 3),
            "category": ("adversarial", "popular", "random")[number % 3],
        }
        for number in range(6)
    ]
    texts = ("id", "question_id", "question", "answer", "image_source", "category")
    return rows, {**dict.fromkeys(texts, TEXT), "image": Image()}


def _mmmu() -> tuple[Rows, dict[str, Any]]:
    """Several pictures, pictures among the options, open questions; the first and the last share a picture."""
    asked: list[tuple[str, str, list[str], str, list[int]]] = [
        ("Accounting_1", "What does <image 1> show?", ["a loss", "a gain", "nothing", "a loan"], "B", [40]),
        ("Art_2", "Compare <image 1> with <image 2>.", ["older", "newer"], "A", [41, 42]),
        ("Biology_3", "Which one is a leaf?", ["<image 1>", "<image 2>", "<image 3>"], "C", [43, 44, 45]),
        ("Physics_4", "How long is the rod in <image 1>, in cm?", [], "42", [46]),
        ("Physics_5", "Name the wave in <image 1>.", [], "sine wave", [47]),
        ("History_6", "Who painted <image 1>?", ["the old master", "his pupil"], "A", [48]),
        ("Accounting_7", "And the tax in <image 1>?", ["high", "low", "none"], "A", [40]),
    ]
    rows = [
        {
            "id": f"validation_{name}",
            "question": question,
            "options": str(options),
            "explanation": "",
            **{f"image_{i + 1}": image(pictures[i]) if i < len(pictures) else None for i in range(7)},
            "img_type": "['Tables']",
            "answer": answer,
            "topic_difficulty": "Easy",
            "question_type": "multiple-choice" if options else "open",
            "subfield": name.split("_")[0],
        }
        for name, question, options, answer, pictures in asked
    ]
    texts = ("id", "question", "options", "explanation", "img_type", "answer", "topic_difficulty", "question_type")
    pictures = {f"image_{number}": Image() for number in range(1, 8)}
    return rows, {**dict.fromkeys(texts, TEXT), "subfield": TEXT, **pictures}


def _ai2d() -> tuple[Rows, dict[str, Any]]:
    """Two questions per diagram, which the data set does not name; the answer is the option's number, as text."""
    options = ["stem", "leaf", "root", "seed"]
    rows = [
        {
            "question": f"What is part {number}?",
            "options": options,
            "answer": str(number % 4),
            "image": image(50 + half),
        }
        for number, half in ((0, 0), (1, 1), (2, 0), (3, 1), (5, 1))
    ]
    return rows, {"question": TEXT, "options": List(TEXT), "answer": TEXT, "image": Image()}


def _mmstar() -> tuple[Rows, dict[str, Any]]:
    """Two of the six capabilities, with three, one and two documents in their subcategories."""
    kinds = ["image emotion"] * 3 + ["recognition"] + ["localization"] * 2
    rows = [
        {
            "index": number,
            "question": f"What is it?\nOptions: A: a{number}, B: b, C: c, D: d",
            "image": image(60 + number),
            "answer": "ABCDAB"[number],
            "category": "coarse perception" if kind == "image emotion" else "fine-grained perception",
            "l2_category": kind,
            "meta_info": {"source": "MMBench", "split": "val", "image_path": f"images/{number}.jpg"},
        }
        for number, kind in enumerate(kinds)
    ]
    features = {"index": INT, "question": TEXT, "image": Image(), "answer": TEXT, "category": TEXT, "l2_category": TEXT}
    return rows, features | {"meta_info": {"source": TEXT, "split": TEXT, "image_path": TEXT}}


def _textvqa() -> tuple[Rows, dict[str, Any]]:
    annotated = [["nokia"] * 10, ["STOP"] * 3 + ["no"] * 7, ["12:30"] * 5 + ["1230"] * 5, ["Coca Cola"] * 2 + ["x"] * 8]
    rows = [
        {
            "image_id": ("a", "b", "a", "c")[number],
            "question_id": 34602 + number,
            "question": "what does the NASA sign say?",
            "question_tokens": ["what"],
            "image": image(70 + number % 3),
            "image_width": 64,
            "image_height": 64,
            "flickr_original_url": "",
            "flickr_300k_url": "",
            "answers": answers,
            "image_classes": ["Sign"],
            "set_name": "val",
            "ocr_tokens": ["NOKIA"],
        }
        for number, answers in enumerate(annotated)
    ]
    texts, lists = ("image_id", "question", "flickr_original_url", "flickr_300k_url", "set_name"), List(TEXT)
    numbers = {"question_id": Value("int32"), "image_width": Value("int32"), "image_height": Value("int32")}
    listed = dict.fromkeys(("question_tokens", "answers", "image_classes", "ocr_tokens"), lists)
    return rows, {**dict.fromkeys(texts, TEXT), **numbers, **listed, "image": Image()}


def _ocrbench() -> tuple[Rows, dict[str, Any]]:
    asked = [
        ("IIIT5K", "Regular Text Recognition", ["CENTRE"]),
        ("WordArt", "Artistic Text Recognition", ["Fresh", "fresh!"]),
        ("docVQA", "Doc-oriented VQA", ["$1,000"]),
        ("HME100k", "Handwritten Mathematical Expression Recognition", ["x ^ { 2 } + 1"]),
        ("FUNSD", "Key Information Extraction", ["12 May"]),
    ]
    rows = [
        {
            "dataset": name,
            "question": "what is written in the image?",
            "question_type": kind,
            "answer": answers,
            "image": image(80 + number % 4),
        }
        for number, (name, kind, answers) in enumerate(asked)
    ]
    return rows, {"dataset": TEXT, "question": TEXT, "question_type": TEXT, "answer": List(TEXT), "image": Image()}


def _realworldqa() -> tuple[Rows, dict[str, Any]]:
    letters = "\nA. Left\nB. Right\nC. Both\nPlease answer directly with only the letter of the correct option and "
    letters += "nothing else."
    words = "\nPlease answer directly with a single word or number."
    rows = [
        {"image": image(90 + number), "image_path": f"{number}.webp", "question": f"Where?{end}", "answer": answer}
        for number, (answer, end) in enumerate((("A", letters), ("C", letters), ("2", words), ("Downhill", words)))
    ]
    return rows, {"image": Image(), "image_path": TEXT, "question": TEXT, "answer": TEXT}


def _mmvp() -> tuple[Rows, dict[str, Any]]:
    rows = [
        {
            "Index": number + 1,
            "Question": f"Is thing {number // 2} open or closed?",
            "Options": "(a) Open (b) Closed",
            "Correct Answer": ("(a)", "(b)")[number % 2],
            "image": image(100 + number),
        }
        for number in range(8)
    ]
    return rows, {"Index": INT, "Question": TEXT, "Options": TEXT, "Correct Answer": TEXT, "image": Image()}


DATA_SETS: dict[str, tuple[str, Callable[[], tuple[Rows, dict[str, Any]]]]] = {
    "lmms-lab-encoder/VQAv2": ("validation", _vqav2),
    "lmms-lab-encoder/GQA": ("testdev", _gqa),
    "lmms-lab-encoder/MMBench": ("dev", _mmbench),
    "lmms-lab-encoder/POPE": ("test", _pope),
    "lmms-lab-encoder/MMMU": ("validation", _mmmu),
    "lmms-lab-encoder/ai2d": ("test", _ai2d),
    "Lin-Chen/MMStar": ("val", _mmstar),
    "lmms-lab-encoder/textvqa": ("validation", _textvqa),
    "echo840/OCRBench": ("test", _ocrbench),
    "lmms-lab-encoder/RealWorldQA": ("test", _realworldqa),
    "lmms-lab-eval/MMVP": ("train", _mmvp),
}

CLUSTERS = {
    "vqav2_val": [0, 0, 1, 1],
    "gqa": [0, 1, 0, 1],
    "mmbench_en_dev_static": [0] * 6 + [1] * 3,
    "pope": [0, 0, 0, 1, 1, 1],
    "mmmu_val": [0, 1, 2, 3, 4, 5, 0],
    "ai2d": [0, 1, 0, 1, 1],
    "mmstar": [0, 1, 2, 3, 4, 5],
    "textvqa_val": [0, 1, 0, 2],
    "ocrbench": [0, 1, 2, 3, 0],
    "realworldqa": [0, 1, 2, 3],
    "mmvp": [0, 0, 1, 1, 2, 2, 3, 3],
}
"""Documents of one number share a picture (MMVP: a pair)."""

REPLIES: dict[str, list[tuple[str, float]]] = {
    "vqav2_val": [("Red.", 1.0), ("3", (2 * 1 + 8 * 2) / 30), ("YES", (2 * 1 + 8 * 2) / 30), ("", 0.0)],
    "gqa": [("Yes.", 1.0), ("right", 0.0), ("Red", 1.0), ("", 0.0)],
    "mmbench_en_dev_static": [
        *(("A", 1.0), ("red", 1.0), ("(C)", 1.0), ("B. red", 1.0)),  # all four rotations right
        *(("A", 0.0), ("A", 0.0)),  # one letter for both rotations
        *(("The answer is one.", 0.0), ("C", 0.0), ("no idea", 0.0)),  # the third can't be read
    ],
    "pope": [("Yes", 1.0), ("no", 1.0), ("no", 0.0), ("No, there is not", 0.0), ("yes ", 1.0), ("", 0.0)],
    "mmmu_val": [
        ("B", 1.0),
        ("(B)", 0.0),
        ("", 0.0),
        ("It is 42 cm.", 1.0),
        ("The answer is a sine wave", 1.0),
        ("I believe it must be the old master here", 1.0),
        ("no idea", 0.0),
    ],
    "ai2d": [("A", 1.0), ("B. leaf", 1.0), ("root", 0.0), ("d", 1.0), ("", 0.0)],
    "mmstar": [("A", 1.0), ("The answer is (B)", 1.0), ("D", 0.0), ("D: d", 1.0), ("", 0.0), ("none", 0.0)],
    "textvqa_val": [("Nokia", 1.0), ("stop", (3 * 2 + 7 * 3) / 30), ("half past", 0.0), ("", 0.0)],
    "ocrbench": [
        ("It says centre", 1.0),
        ("FRESH", 1.0),
        ("1000", 0.0),
        ("x^{2}+1", 1.0),
        ("", 0.0),
    ],
    "realworldqa": [("A. Left", 1.0), ("", 0.0), ("2.", 1.0), ("uphill", 0.0)],
    "mmvp": [
        *(("A", 1.0), ("(b) Closed", 1.0)),
        *(("A", 0.0), ("A", 0.0)),
        *(("", 0.0), ("B", 0.0)),
        *(("The answer is A", 1.0), ("Option B", 1.0)),
    ],
}
"""Per document of each task: an answer, and its score."""
UNPARSED = {"pope": [3, 5], "mmmu_val": [2, 6], "mmvp": [4]}
"""Documents whose answer can't be read, where upstream shows that."""
