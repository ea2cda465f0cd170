"""What `prebench doctor` checks: do answers depend on batch size, order or processes; are they `model.generate`'s?

Every document is asked at every batch size, in shuffled order, by one process and by several that accelerate joins
(gloo on a CPU, a GPU for each on CUDA), each with its share as lmms-eval deals them out. Expected of a document is the
answer of plain `model.generate` at batch size 1 where that was asked, else the engine's at the first batch size. A flip
is any other answer; its margin is how far, at the first token that differs, the best logit lies above the second best.
"""

from __future__ import annotations

import gc
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from prebench.config import validate
from prebench.errors import EvaluationError, ModelError, user_error
from prebench.evaluation.engine import Engine
from prebench.evaluation.generation import GenerationRequest
from prebench.evaluation.prompts import Messages
from prebench.evaluation.threads import num_workers
from prebench.progress import ProgressLine
from prebench.schema import StrictModel
from prebench.store import read_json, write_json

MAX_NEW_TOKENS = 16
POLL_SECONDS = 0.5
LOG_LINES = 5
USER_ERROR = 2
KINDS = ("text-only", "one image", "two images")


class Document(StrictModel):
    """A question about picture files."""

    question: str
    images: tuple[str, ...] = ()

    @property
    def kind(self) -> str:
        """Return what a chat template has to take: one of KINDS."""
        return KINDS[len(self.images)]

    def messages(self) -> Messages:
        """Open the pictures and return the chat messages."""
        content: list[dict[str, Any]] = [{"type": "image", "image": Image.open(path)} for path in self.images]
        return [{"role": "user", "content": [*content, {"type": "text", "text": self.question}]}]


class Plan(StrictModel):
    """What is asked of which model; read by every process."""

    model_dir: Path
    device: str = "auto"
    dtype: str = "auto"
    documents: tuple[Document, ...]
    batch_sizes: tuple[int, ...] = (1, 4, 16, 64)
    processes: tuple[int, ...] = (1, 2)
    """Numbers of processes; one is always tried."""
    generated: int = 50
    """How many documents, spread over all, plain `model.generate` answers, too."""


@dataclass(frozen=True)
class Flip:
    """A document whose answer is not the expected one."""

    document: int
    question: str
    setting: str
    expected: str
    found: str
    margin: float


@dataclass(frozen=True)
class Result:
    """What came out of one setting."""

    setting: str
    documents: int
    seconds: float | None
    """None where it was not timed alone."""
    flips: tuple[Flip, ...] = ()


@dataclass(frozen=True)
class Report:
    """What was asked and what came out."""

    device: str
    dtype: str
    threads: int
    kinds: dict[str, int]
    left_out: tuple[str, ...]
    results: tuple[Result, ...]

    @property
    def flips(self) -> list[Flip]:
        """Return the flips of all settings."""
        return [flip for result in self.results for flip in result.flips]


@dataclass(frozen=True)
class Reference:
    """An answer of plain `model.generate`: its text, the text up to each token, and each token's margin."""

    text: str
    texts: tuple[str, ...]
    margins: tuple[float, ...]

    def margin(self, other: str) -> float:
        """Return the margin of the first token in which another answer differs."""
        places = (place for place, text in enumerate(self.texts) if not other.startswith(text))
        return self.margins[next(places, len(self.margins) - 1)]


@dataclass(frozen=True)
class _Outcome:
    setting: str
    texts: dict[int, str]
    seconds: float | None = None


def examine(plan: Plan) -> Report:
    """Ask all documents in every setting and compare.

    Raises:
        ModelError: the model can't be loaded, or takes none of the documents.
        EvaluationError: a document failed, or a process died.
    """
    engine: Engine | None = Engine(plan.model_dir, plan.device, plan.dtype)
    assert engine is not None
    documents, left_out = _askable(engine, plan.documents)
    launches, too_many = _launches(engine.device, plan.processes)
    plan = plan.model_copy(update={"documents": documents})
    chosen = range(0, len(documents), max(1, len(documents) // max(1, plan.generated)))[: plan.generated]
    dtype, device = str(engine.model.dtype).removeprefix("torch."), engine.device
    total = (1 + (1 + len(launches)) * len(plan.batch_sizes)) * len(documents) + len(chosen)
    with ProgressLine("doctor", total, "answer") as line:
        done = 0

        def step(note: str, number: int = 1) -> None:
            nonlocal done
            done += number
            line.update(done, note)

        references = _generate_all(engine, documents, chosen, step)
        outcomes = [_ask(engine, plan, plan.batch_sizes[0], False, step)]
        outcomes += [_ask(engine, plan, size, True, step) for size in plan.batch_sizes]
        if launches:
            engine = None  # a device may not hold the model twice
            gc.collect()
            torch.cuda.empty_cache()
        for processes in launches:
            outcomes += _launch(plan, processes, device, step)
    unknown = {n for o in outcomes for n, text in o.texts.items() if text != outcomes[0].texts[n]} - set(references)
    expected = outcomes[0].texts | {number: reference.text for number, reference in references.items()}
    if unknown:
        engine = engine or Engine(plan.model_dir, plan.device, plan.dtype)
        references |= _generate_all(engine, documents, sorted(unknown), lambda *_: None)
    generated = Result("model.generate, one by one", len(chosen), None)
    return Report(
        device=torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        dtype=dtype,
        threads=torch.get_num_threads(),
        kinds={kind: sum(document.kind == kind for document in documents) for kind in KINDS},
        left_out=(*left_out, *too_many),
        results=(generated, *(_compare(o, documents, expected, references) for o in outcomes)),
    )


def _askable(engine: Engine, documents: Sequence[Document]) -> tuple[tuple[Document, ...], list[str]]:
    """Return the documents of the kinds that the model's template takes, and a line about each other kind."""
    refused = {}
    for kind in KINDS:
        first = next((document for document in documents if document.kind == kind), None)
        if first is not None:
            (answer,) = engine.generate([GenerationRequest(0, first.messages, 1)])
            if answer.error is not None:
                refused[kind] = f"{kind}: left out, the model does not take it ({answer.error})"
    kept = tuple(document for document in documents if document.kind not in refused)
    if not kept:
        raise ModelError(f"the model takes no document: {'; '.join(refused.values())}")
    return kept, list(refused.values())


def _launches(device: torch.device, processes: Sequence[int]) -> tuple[list[int], list[str]]:
    """Return the numbers of processes to start, and a line about each that needs more GPUs than there are."""
    most = torch.cuda.device_count() if device.type == "cuda" else sys.maxsize
    wanted = sorted({number for number in processes if number > 1})
    lines = [f"{number} processes: left out, {most} GPU{'s' * (most > 1)}" for number in wanted if number > most]
    return [number for number in wanted if number <= most], lines


def _generate_all(
    engine: Engine, documents: Sequence[Document], numbers: Sequence[int], step: Callable[[str], None]
) -> dict[int, Reference]:
    found = {}
    for number in numbers:
        found[number] = _generate(engine, documents[number])
        step("model.generate")
    return found


def _inputs(engine: Engine, document: Document) -> Any:
    """Return what the processor makes of one document, as a user of transformers would call it."""
    messages = document.messages()
    images = [part["image"].convert("RGB") for part in messages[0]["content"] if part["type"] == "image"]
    bare = [{k: v for k, v in part.items() if k != "image"} for part in messages[0]["content"]]
    text = engine.processor.apply_chat_template(
        [{"role": "user", "content": bare}], tokenize=False, add_generation_prompt=True
    )
    return engine.processor(text=text, images=images or None, return_tensors="pt")


@torch.inference_mode()
def _generate(engine: Engine, document: Document) -> Reference:
    """Answer one document with plain `model.generate`."""
    inputs = _inputs(engine, document).to(engine.device, engine.model.dtype)
    output = engine.model.generate(
        **inputs,
        do_sample=False,
        max_new_tokens=MAX_NEW_TOKENS,
        return_dict_in_generate=True,
        output_logits=True,
    )
    ids = output.sequences[0, inputs["input_ids"].shape[1] :].tolist()
    best = [logits[0].float().topk(2).values for logits in output.logits]
    texts = tuple(engine.processor.tokenizer.decode(ids[: k + 1], skip_special_tokens=True) for k in range(len(ids)))
    return Reference(texts[-1], texts, tuple(float(pair[0] - pair[1]) for pair in best))


def _ask(engine: Engine, plan: Plan, batch_size: int, shuffled: bool, step: Callable[[str], None]) -> _Outcome:
    name = f"batch size {batch_size}, {'shuffled' if shuffled else 'in order'}"
    order = _order(len(plan.documents), batch_size) if shuffled else list(range(len(plan.documents)))
    started = time.perf_counter()
    texts = {}
    for number, text in _answers(engine, plan.documents, order, batch_size):
        texts[number] = text
        step(name)
    return _Outcome(name, texts, time.perf_counter() - started)


def _order(count: int, batch_size: int) -> list[int]:
    order = list(range(count))
    random.Random(batch_size).shuffle(order)  # noqa: S311
    return order


def _answers(
    engine: Engine, documents: Sequence[Document], order: Sequence[int], batch_size: int
) -> Iterator[tuple[int, str]]:
    """Answer documents with at most about `batch_size` in one pass of the model.

    Raises:
        EvaluationError: a document failed.
    """
    passes_at_once = num_workers(engine.model)
    engine.token_budget = 1 if batch_size == 1 else batch_size * _widest(engine, documents) * passes_at_once
    requests = (GenerationRequest(number, documents[number].messages, MAX_NEW_TOKENS) for number in order)
    for answer in engine.generate(requests):
        number = int(answer.key)  # type: ignore[call-overload]
        if answer.text is None:
            raise EvaluationError(f"{documents[number].question!r}: {answer.error}")
        yield number, answer.text


def _widest(engine: Engine, documents: Sequence[Document]) -> int:
    """Return the tokens of the longest prompt and its answer, about: the longest question of each kind is looked at."""
    widths = []
    for kind in KINDS:
        longest = max((d for d in documents if d.kind == kind), key=lambda d: len(d.question), default=None)
        if longest is not None:
            widths.append(int(_inputs(engine, longest)["input_ids"].shape[1]))
    return max(widths) + MAX_NEW_TOKENS


def _compare(
    outcome: _Outcome,
    documents: Sequence[Document],
    expected: Mapping[int, str],
    references: Mapping[int, Reference],
) -> Result:
    flips = tuple(
        Flip(n, documents[n].question, outcome.setting, expected[n], text, references[n].margin(text))
        for n, text in sorted(outcome.texts.items())
        if text != expected[n]
    )
    return Result(outcome.setting, len(outcome.texts), outcome.seconds, flips)


def _launch(plan: Plan, processes: int, device: torch.device, step: Callable[[str, int], None]) -> list[_Outcome]:
    """Ask all documents at every batch size, dealt out over several processes.

    Raises:
        EvaluationError: a document failed, or a process died; the last lines of their log are quoted.
    """
    with tempfile.TemporaryDirectory(prefix="prebench-doctor-") as name:
        folder = Path(name)
        write_json(folder / "plan.json", plan.model_dump(mode="json"))
        launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
        command = [sys.executable, "-P", *launcher, "-m", "prebench.evaluation.doctor", str(folder / "plan.json")]
        on_cpu = {"ACCELERATE_USE_CPU": "true"} if device.type == "cpu" else {}
        with (folder / "log").open("w", encoding="utf-8") as log:
            child = subprocess.Popen(command, env=os.environ | on_cpu, stdout=log, stderr=subprocess.STDOUT)  # noqa: S603
        try:
            seen = 0
            while True:
                running = child.poll() is None
                answers = _read(folder)
                if len(answers) > seen:
                    step(f"{processes} processes", len(answers) - seen)
                    seen = len(answers)
                if not running:
                    break
                time.sleep(POLL_SECONDS)
        finally:
            child.terminate()
            child.wait()
        if child.returncode != 0:
            raise EvaluationError(f"{processes} processes: {_reason(folder / 'log')}")
    return [
        _Outcome(
            f"batch size {size}, shuffled, {processes} processes",
            {answer["number"]: answer["text"] for answer in answers if answer["batch_size"] == size},
        )
        for size in plan.batch_sizes
    ]


def _read(folder: Path) -> list[dict[str, Any]]:
    """Return the answers that the processes have written so far; a last line that is not whole is left for later."""
    lines = [line for path in sorted(folder.glob("*.jsonl")) for line in path.read_text("utf-8").splitlines(True)]
    return [json.loads(line) for line in lines if line.endswith("\n")]


def _reason(log: Path) -> str:
    """Return what a process said about its error, or the last lines of the log."""
    lines = [line.strip() for line in log.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
    said = next((line for line in lines if line.startswith("prebench: ")), None)
    return said.removeprefix("prebench: ") if said else " | ".join(lines[-LOG_LINES:])


def main(arguments: Sequence[str]) -> int:
    """Run `python -m prebench.evaluation.doctor PLAN.json` as one of several processes; return the exit code."""
    from accelerate import Accelerator

    path = Path(arguments[0])
    plan = validate(Plan, read_json(path), str(path))
    accelerator = Accelerator()
    rank, world = accelerator.process_index, accelerator.num_processes
    if world != int(os.environ["WORLD_SIZE"]):
        raise EvaluationError(f"{os.environ['WORLD_SIZE']} processes were started, but accelerate sees {world}")
    device = "cpu" if accelerator.device.type == "cpu" else str(accelerator.device)
    engine = Engine(plan.model_dir, device, plan.dtype)
    with path.with_name(f"answers-{rank}.jsonl").open("w", encoding="utf-8", buffering=1) as file:
        for batch_size in plan.batch_sizes:
            share = _order(len(plan.documents), batch_size)[rank::world]
            for number, text in _answers(engine, plan.documents, share, batch_size):
                file.write(json.dumps({"batch_size": batch_size, "number": number, "text": text}) + "\n")
    accelerator.wait_for_everyone()
    accelerator.end_training()
    return 0


if __name__ == "__main__":
    try:
        raise SystemExit(main(sys.argv[1:]))
    except Exception as error:
        known = user_error(error)
        if known is None:
            raise
        print(f"prebench: {' '.join(str(known).split())}", file=sys.stderr)  # noqa: T201
        raise SystemExit(USER_ERROR) from error
