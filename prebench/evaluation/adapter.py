"""The lmms-eval model: `lmms-eval --model prebench --model_args pretrained=FOLDER --tasks ...`.

lmms-eval has no channel for errors, and an empty answer would be scored; so where any document fails, this adapter
raises. lmms-eval's command line would print the error and exit with 0, so there the process ends with code 2.
`prebench evaluate` records failed documents instead.

Several processes: `torchrun --nproc_per_node N -m lmms_eval ...`, or `accelerate launch` on GPUs. lmms-eval gives
process r the documents r, r + N, ..., and fills up a shorter share with copies of its last request.
"""

from __future__ import annotations

import json
import os
import tempfile
import traceback
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from accelerate import Accelerator
from lmms_eval.api.instance import Instance
from lmms_eval.api.model import lmms
from lmms_eval.protocol import ChatMessages

from prebench.errors import EvaluationError, ModelError, PrebenchError, one_line
from prebench.evaluation.documents import DecodedOnce
from prebench.evaluation.engine import DEFAULT_TOKEN_BUDGET, Engine
from prebench.evaluation.generation import GenerationRequest, generation_settings
from prebench.evaluation.probe_task import PROBE_DIR_VARIABLE
from prebench.evaluation.prompts import DOCUMENT_ERRORS
from prebench.evaluation.scores import by_image
from prebench.images import whole_images
from prebench.progress import say
from prebench.store import read_json

PROBE_KEY = "prebench_probe"
"""In a task's generation_kwargs: answer with features instead of text."""
SHOWN_FAILURES = 3
USER_ERROR = 2
"""Exit code of the lmms-eval command where a document or the model fails."""


class Prebench(lmms):
    """Any exported folder as a chat model of lmms-eval."""

    is_simple = False
    variant: ClassVar[str | None] = None
    """The variant that the export must name; None takes any."""

    def __init__(
        self,
        pretrained: str,
        device: str = "auto",
        dtype: str = "auto",
        batch_size: int | str | None = None,
        max_batch_size: int | str | None = None,
        token_budget: int = DEFAULT_TOKEN_BUDGET,
        **unknown: Any,
    ) -> None:
        """Load the export.

        Args:
            pretrained: the exported folder.
            device: "auto", "cpu", "cuda" or "cuda:N".
            dtype: "auto", "float32" or "bfloat16".
            batch_size: accepted because lmms-eval always passes it; answers and batches do not depend on it.
            max_batch_size: likewise.
            token_budget: largest number of tokens in one batch (`Engine`).
            unknown: must be empty.

        Raises:
            ModelError: an unknown argument, no model, or a model of another variant.
        """
        super().__init__()
        with _heard():
            if unknown:
                raise ModelError(
                    f"model_args: unknown {', '.join(sorted(unknown))} (known: pretrained, device, dtype, token_budget)"
                )
            folder = Path(pretrained)
            self._check_variant(folder)
            place = self._join_processes(device)
            self.engine = Engine(folder, device=place, dtype=dtype, token_budget=int(token_budget))
        self.device = self.engine.device

    def generate_until(self, requests: list[Instance]) -> list[str]:
        """Answer all requests, in their order.

        Raises:
            EvaluationError: a document failed; it is named.
        """
        with _heard(), whole_images():
            return self._generate(requests)

    def _generate(self, requests: list[Instance]) -> list[str]:
        answers: dict[int, str] = {}
        probes: dict[tuple[str, str], list[int]] = defaultdict(list)
        for index, request in enumerate(requests):
            if request.args[2].get(PROBE_KEY):
                probes[request.args[4], request.args[5]].append(index)
        for (task, split), indices in probes.items():
            documents = self.task_dict[task][split]
            doc_ids = [requests[index].args[3] for index in indices]
            texts = probe_answers(self.engine, documents, doc_ids, requests[indices[0]].args[1], self.rank)
            answers.update(zip(indices, texts, strict=True))
        asked = [index for index in range(len(requests)) if index not in answers]
        failures = []
        for answer in self.engine.generate(self._generation_requests(requests, asked)):
            if answer.text is None:
                args = requests[answer.key].args  # type: ignore[call-overload]
                failures.append(f"{args[4]} document {args[3]}: {answer.error}")
            else:
                answers[answer.key] = answer.text  # type: ignore[index]
        if failures:
            shown = "; ".join(failures[:SHOWN_FAILURES])
            raise EvaluationError(
                f"{len(failures)} of {len(requests)} documents failed ({shown}); `prebench evaluate` records failures"
            )
        return [answers[index] for index in range(len(requests))]

    def loglikelihood(self, requests: list[Instance]) -> list[tuple[float, bool]]:
        """Refuse: every task of prebench's suites generates.

        Raises:
            EvaluationError: always.
        """
        with _heard():
            raise EvaluationError(
                f"{type(self).__name__}: log-likelihood tasks are not supported; take a generating one"
            )

    def generate_until_multi_round(self, requests: list[Instance]) -> list[str]:
        """Refuse: every task of prebench's suites asks once.

        Raises:
            EvaluationError: always.
        """
        with _heard():
            raise EvaluationError(f"{type(self).__name__}: multi-round tasks are not supported")

    def _generation_requests(self, requests: list[Instance], asked: list[int]) -> Iterator[GenerationRequest]:
        ranks: dict[tuple[str, str], dict[int, int]] = {}
        documents: dict[tuple[str, str], DecodedOnce] = {}
        for index in asked:
            task, split = requests[index].args[4:6]
            if (task, split) not in ranks:
                documents[task, split] = DecodedOnce(self.task_dict[task][split])
                ranks[task, split] = {d: r for r, d in enumerate(by_image(task, self.task_dict[task][split]))}

        def place(index: int) -> tuple[str, str, int]:
            _, _, _, doc_id, task, split = requests[index].args
            return task, split, ranks[task, split][doc_id]

        for index in sorted(asked, key=place):
            _, doc_to_messages, settings, doc_id, task, split = requests[index].args
            messages = late_messages(doc_to_messages, documents[task, split], doc_id)
            yield GenerationRequest(index, messages, *generation_settings(settings, task))

    def _join_processes(self, device: str) -> str:
        """Take this process's place among those that a launcher started, and return the device that is its own."""
        launched = int(os.environ.get("WORLD_SIZE", "1"))
        if launched == 1:
            return device
        self.accelerator = Accelerator()
        if self.accelerator.num_processes != launched:
            raise ModelError(
                f"{launched} processes were started, but accelerate sees {self.accelerator.num_processes}; without a "
                "GPU start them with ACCELERATE_USE_CPU=true torchrun --standalone --nproc_per_node N -m lmms_eval"
            )
        self._rank, self._world_size = self.accelerator.process_index, self.accelerator.num_processes
        own = self.accelerator.device
        return device if device not in ("auto", "cuda") else "cpu" if own.type == "cpu" else str(own)

    @classmethod
    def _check_variant(cls, folder: Path) -> None:
        if cls.variant is None:
            return
        if not (folder / "prebench.json").is_file():
            raise ModelError(f"{folder}: no prebench.json names its variant; --model prebench takes any export")
        found = read_json(folder / "prebench.json").get("variant")
        if found != cls.variant:
            raise ModelError(
                f"{folder}/prebench.json: variant {found!r}, but --model prebench_{cls.variant} was asked for; "
                "--model prebench takes any export"
            )


class PrebenchBaseline(Prebench):
    """An export of the variant `baseline`."""

    variant = "baseline"


class PrebenchPre(Prebench):
    """An export of the variant `pre`."""

    variant = "pre"


@contextmanager
def _heard() -> Iterator[None]:
    """End the process with a code where lmms-eval's command line called: it prints an exception and exits with 0."""
    try:
        yield
    except PrebenchError as error:
        if not any(frame.f_code.co_name == "cli_evaluate" for frame, _ in traceback.walk_stack(None)):
            raise
        say(f"prebench: {error}")
        raise SystemExit(USER_ERROR) from error


def late_messages(
    doc_to_messages: Callable[[Any], list[dict[str, Any]]], documents: Any, doc_id: int
) -> Callable[[], list[dict[str, Any]]]:
    """Return a function that decodes a document and gives its messages in the Hugging Face chat schema."""

    def build() -> list[dict[str, Any]]:
        messages = ChatMessages(messages=doc_to_messages(documents[doc_id]))
        _, videos, audios = messages.extract_media()
        if videos or audios:
            raise ValueError("the document holds video or audio; prebench reads images and text")
        return messages.to_hf_messages()

    return build


def probe_answers(
    engine: Engine,
    documents: Any,
    doc_ids: Sequence[int],
    doc_to_messages: Callable[[Any], list[dict[str, Any]]],
    rank: int = 0,
) -> list[str]:
    """Extract the probe features of documents and return, for each, JSON that names shard and row.

    Args:
        engine: the loaded model.
        documents: the task's split, with columns `image` and `mask`.
        doc_ids: which of them, in the order of the answers; lmms-eval fills up a process' share with copies.
        doc_to_messages: the task's; gives the image.
        rank: of this process; each writes a shard of its own.

    Raises:
        EvaluationError: an image or mask can't be read, or the features can't be computed.
    """
    images, masks = [], []
    rows = {doc_id: row for row, doc_id in enumerate(dict.fromkeys(doc_ids))}  # a copy must not count twice in a sum
    for doc_id in rows:
        try:
            document = documents[doc_id]
            messages = ChatMessages(messages=doc_to_messages(document))
            (image,) = messages.extract_media()[0]
            images.append(image.convert("RGB"))
            mask = document.get("mask")
            masks.append(None if mask is None else np.asarray(mask))
        except DOCUMENT_ERRORS as error:
            raise EvaluationError(f"probe document {doc_id}: {one_line(error)}") from error
    try:
        features = engine.extract(images, masks)
    except PrebenchError:
        raise
    except (RuntimeError, ValueError) as error:
        raise EvaluationError(f"probe features can't be computed: {one_line(error)}") from error
    folder = Path(os.environ.get(PROBE_DIR_VARIABLE) or tempfile.mkdtemp(prefix="prebench-probe-"))
    shard = folder / f"features-rank{rank}.safetensors"
    features.save(shard)
    layers = features.pooled.shape[1] - 1
    return [json.dumps({"shard": str(shard), "row": rows[doc_id], "num_layers": layers}) for doc_id in doc_ids]
