"""The protocol of each benchmark: what is asked, what a document scores, and why a figure in print may differ.

One declaration per lmms-eval task, as seen with lmms-eval `UPSTREAM`. docs/benchmarks.md is their table
(docs/benchmarks.py writes it); tests/evaluation/test_paper_suite.py holds them against upstream's own files and code.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, Literal

from prebench.evaluation import readers

UPSTREAM = "0.7.3"
"""The version of lmms-eval that the protocols were seen with."""

SCORING = 2
"""Raised with every change of what the same answers score or of what counts: results made before are computed again,
from the answer log where it has them."""

MMBENCH = "mmbench_en_dev_static"
CIRCULAR_STRIDE = 1_000_000
"""MMBench's CircularEval: rows whose index agrees modulo this number are one question with rotated options."""

Aggregate = Literal[
    "mean",
    "100 x mean over questions",
    "mean over pairs",
    "sum / 1000",
    "mean of the means by category",
]
"""How upstream's aggregate of the primary metric follows from the documents' scores."""

WORD = "Answer the question using a single word or phrase."
LETTER = "Answer with the option's letter from the given choices directly"


@dataclass(frozen=True)
class Protocol:
    """How one lmms-eval task is asked, scored and compared. The defaults hold for a task without a declaration."""

    task: str
    benchmark: str = ""
    """The benchmark's own name."""
    data_set: str = ""
    split: str = ""
    num_docs: int = 0
    """Documents of the published split; 0 for data of ours."""
    metric: str = ""
    """The primary metric; "" takes what the suite names."""
    score: str = "1 if right, else 0"
    """What one document scores, in words."""
    aggregate: Aggregate = "mean"
    image_id: str = ""
    """Column that names the picture, the cluster of the bootstrap; "": the stored picture's content."""
    picture: str = "image"
    """Column of the (first) picture."""
    question_column: str = ""
    """Column that tells which documents count only together; "": every document counts alone."""
    question_of: Callable[[int], int] = int
    """The question that a value of that column belongs to."""
    question_size: int = 1
    """Documents that a question has at least."""
    category: str = ""
    """Column of the question type; a path into a nested column is dotted."""
    target: str = ""
    """Column of the reference answer; where empty, the task's own doc_to_target."""
    prompt: tuple[str, ...] = ()
    """Instructions after the question: those of the block `default` of the task's `lmms_eval_specific_kwargs`."""
    ocr_tokens: bool | None = None
    """Whether the prompt holds the data set's OCR tokens; None where it has none."""
    parser: str = ""
    """How an answer is read; never by a judge, never at random."""
    published: str = ""
    """LLaVA-1.5-7B as its authors (or those named) report it, in per cent."""
    difference: str = ""
    """Why that figure differs from what this protocol gives."""
    deviation: str = ""
    """Upstream's defects and what is done about them."""
    read: Callable[[readers.Values], float] = readers.number
    unparsed: Callable[[Any], bool] | None = None
    """Tells from the metric's entry that no answer could be read; None where upstream does not show it."""
    prepare: Callable[[dict[str, Any]], None] | None = None
    """Repairs or refuses a document before upstream's code scores it."""
    scoring: Callable[[], AbstractContextManager[None]] = nullcontext
    """Holds while upstream's code scores a document."""
    before_aggregate: Callable[[Callable[..., Any]], None] | None = None
    """Called with upstream's aggregation before it runs."""


_NONE_PUBLISHED = "the authors report none"

_DECLARED = (
    Protocol(
        task="vqav2_val",
        benchmark="VQAv2",
        data_set="lmms-lab-encoder/VQAv2",
        split="validation",
        num_docs=214_354,
        metric="exact_match",
        score="mean over ten annotators of min(1, agreeing others / 3)",
        image_id="image_id",
        category="answer_type",
        target="multiple_choice_answer",
        prompt=(WORD,),
        parser="whole answer after VQA's normalisation",
        published="78.5",
        difference="test-dev, scored by the server; here the validation split (TinyLLaVA: 80.1 there, 78.2 here)",
        deviation="upstream gives 0 where annotators lack distinct answer_ids: they are numbered; a document without "
        "annotators is an error, not 0",
        prepare=readers.number_annotators,
    ),
    Protocol(
        task="gqa",
        benchmark="GQA",
        data_set="lmms-lab-encoder/GQA",
        split="testdev",
        num_docs=12_578,
        metric="exact_match",
        image_id="imageId",
        category="types.structural",
        prompt=(WORD,),
        parser="whole answer, without case and punctuation",
        published="62.0",
        difference="same split and prompt; LLaVA's script strips case and a final full stop alone; retrained: 62.6",
    ),
    Protocol(
        task=MMBENCH,
        benchmark="MMBench",
        data_set="lmms-lab-encoder/MMBench",
        split="dev",
        num_docs=4_329,
        metric="gpt_eval_score",
        score="1 on every rotation of a question whose rotations are all right, else 0; the first one counts",
        aggregate="100 x mean over questions",
        question_column="index",
        question_of=lambda index: index % CIRCULAR_STRIDE,
        category="category",
        prompt=(f"{LETTER}.",),
        parser="rules for a letter, then an option's text, then shared rules for letters",
        published="64.3",
        difference="MMBench's server reads answers without a letter with ChatGPT; 62.8 by exact match (VLMEvalKit)",
        deviation="rotations share a picture and count only together; one failed rotation leaves out the question. A "
        'missing option is the text "nan" to upstream\'s rules',
        read=readers.circular,
    ),
    Protocol(
        task="pope",
        benchmark="POPE",
        data_set="lmms-lab-encoder/POPE",
        split="test",
        num_docs=9_000,
        metric="pope_accuracy",
        image_id="image_source",
        category="category",
        prompt=(WORD,),
        parser='the whole answer is "yes" or "no"; no other form is read',
        published="85.9 (F1)",
        difference="mean F1 of the three categories, from the first sentence of the answer; here accuracy",
        deviation="upstream's F1 leaves out unread answers, so accuracy is primary; its yes_ratio is that of the "
        "reference answers, not of the model's",
        unparsed=readers.pope_unparsed,
    ),
    Protocol(
        task="mmmu_val",
        benchmark="MMMU",
        data_set="lmms-lab-encoder/MMMU",
        split="validation",
        num_docs=900,
        metric="mmmu_acc",
        picture="image_1",
        category="subfield",
        prompt=(f"{LETTER}.", WORD),
        parser="MMMU's rules for a letter, an option's text, or a phrase or number",
        published="35.3 (lmms-eval's sheet)",
        difference="runs gave 36.22 (lmms-eval) and 35.1 (VLMEvalKit): letters at random, other rules",
        deviation="upstream draws a letter at random where it finds none: here such an answer is wrong and marked "
        "unparsed; upstream's aggregate is rounded to five decimals",
        read=readers.mmmu,
        unparsed=readers.mmmu_unparsed,
        scoring=readers.no_random_letter,
    ),
    Protocol(
        task="ai2d",
        benchmark="AI2D",
        data_set="lmms-lab-encoder/ai2d",
        split="test",
        num_docs=3_088,
        metric="exact_match",
        prompt=(f"{LETTER}.",),
        parser='the letter before a leading "A.", else the whole answer without case and punctuation',
        difference=_NONE_PUBLISHED,
        deviation="upstream's filter walks through all documents from the first, pictures included: it is given the "
        "answered ones, without pictures",
    ),
    Protocol(
        task="mmstar",
        benchmark="MMStar",
        data_set="Lin-Chen/MMStar",
        split="val",
        num_docs=1_500,
        metric="average",
        aggregate="mean of the means by category",
        category="l2_category",
        prompt=(LETTER,),
        parser="shared rules for letters; any capital A to D where nothing else fits",
        difference=_NONE_PUBLISHED,
        deviation="upstream averages over the 18 subcategories; MMStar's own average, like ours, is over documents",
    ),
    Protocol(
        task="textvqa_val",
        benchmark="TextVQA",
        data_set="lmms-lab-encoder/textvqa",
        split="validation",
        num_docs=5_000,
        metric="exact_match",
        score="mean over ten annotators of min(1, agreeing others / 3)",
        image_id="image_id",
        target="answers",
        prompt=(WORD,),
        ocr_tokens=False,
        parser="whole answer after VQA's normalisation",
        published="58.2",
        difference="with OCR tokens in the prompt; without, as here, 45.5 (VLMEvalKit's leaderboard)",
        deviation="a document without annotators is an error, not 0; upstream's prompt writes the question in lower "
        "case but for its first letter",
        prepare=readers.require_answers,
    ),
    Protocol(
        task="ocrbench",
        benchmark="OCRBench",
        data_set="echo840/OCRBench",
        split="test",
        num_docs=1_000,
        metric="ocrbench_accuracy",
        score="1 if the answer holds a reference answer, else 0",
        aggregate="sum / 1000",
        category="question_type",
        parser="a reference answer stands anywhere in the answer, without case (HME100k: without spaces)",
        difference=_NONE_PUBLISHED,
        deviation="OCRBench counts to 1000: ten times this percentage. Upstream keeps the count in its module, where "
        "the next model adds to it: it is set to zero; and it divides by 1000 whatever the number of documents",
        before_aggregate=readers.reset_ocrbench,
    ),
    Protocol(
        task="realworldqa",
        benchmark="RealWorldQA",
        data_set="lmms-lab-encoder/RealWorldQA",
        split="test",
        num_docs=765,
        metric="exact_match",
        parser="shared rules for letters (any capital A to D where nothing else fits); else the whole answer",
        difference=_NONE_PUBLISHED,
    ),
    Protocol(
        task="mmvp",
        benchmark="MMVP",
        data_set="lmms-lab-eval/MMVP",
        split="train",
        num_docs=300,
        metric="mmvp_pair_accuracy",
        score="1 on both documents of a pair that are both right, else 0; the first one counts",
        aggregate="mean over pairs",
        question_column="Index",
        question_of=lambda index: (index - 1 if index > 0 else index) // 2,
        question_size=2,
        prompt=(f"{LETTER}.",),
        parser='the first "A" or "B" in several forms, small letters and the article "a" included',
        published="24.7 (MMVP's authors)",
        difference="long answers read by GPT-4, and labels that were corrected since; 22.7 with this prompt (MMVP's "
        "issue 8)",
        deviation="a pair's two pictures share their question and count only together; one failed document leaves "
        "out the pair",
        read=readers.both,
        unparsed=readers.mmvp_unparsed,
    ),
    Protocol(
        task="prebench_easy_vqa",
        benchmark="easy-VQA",
        data_set="prebench/easy_vqa",
        split="test",
        metric="exact_match",
        image_id="image_id",
        category="type",
        prompt=(WORD,),
        parser="whole answer, without case and punctuation",
    ),
    Protocol(task="prebench_visual_probe", data_set="prebench/visual_probe", split="test", image_id="image_id"),
)

PROTOCOLS = {protocol.task: protocol for protocol in _DECLARED}
PAPER = tuple(protocol.task for protocol in _DECLARED if protocol.num_docs)
"""The published benchmarks of the suite `paper`."""

NEEDS_JUDGE = {
    "mmbench_en_dev": MMBENCH,
    "mmbench_en_dev_lite": MMBENCH,
    "mmbench_en_dev_reasoning": MMBENCH,
    "mmbench_cn_dev": MMBENCH,
    "mmbench_cn_dev_lite": MMBENCH,
    "mmbench_cn_dev_reasoning": MMBENCH,
    "mmbench_cn_cc": MMBENCH,
    "mmbench_ko_dev": MMBENCH,
    "mmbench_ru_dev": MMBENCH,
    "mmmu_val_reasoning": "mmmu_val",
    "mmstar_reasoning": "mmstar",
    "ai2d_reasoning": "ai2d",
    "ocrbench_reasoning": "ocrbench",
    "realworldqa_reasoning": "realworldqa",
}
"""Tasks that ask a paid API, or draw answers at random without one, and what to take instead."""


def protocol_of(task: str) -> Protocol:
    """Return a task's protocol; of a task without a declaration, one that takes its scores as they come."""
    return PROTOCOLS.get(task) or Protocol(task)
