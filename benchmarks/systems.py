"""The systems that are compared, each of which answers rows of a data set in order, in a process of its own."""

from __future__ import annotations

import io
import multiprocessing
import time
from collections.abc import Callable, Iterator
from contextlib import redirect_stderr
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from documents import documents
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor

from prebench.evaluation.documents import DecodedOnce
from prebench.evaluation.engine import Engine, GenerationRequest

System = Callable[[Dataset], list[str]]
IMAGE_TOKEN = "<image>"  # noqa: S105  (a token of text)
ENGINE, LLAVA_HF, PLAIN = "prebench", "llava_hf", "plain generate"
SYSTEMS = (ENGINE, LLAVA_HF, PLAIN)


@dataclass(frozen=True)
class Settings:
    """What all systems are told."""

    model_dir: str
    device: str
    max_new_tokens: int
    batch_size: int
    """Of plain generate."""


@dataclass(frozen=True)
class Answered:
    """What a system gave for some documents."""

    answers: list[str]
    seconds: float
    new_tokens: int
    """Of all answers, ends included; 0 where the system does not tell."""


class SystemProcess:
    """A system in a process of its own, which answers when it is asked and sleeps between."""

    def __init__(self, name: str, settings: Settings) -> None:
        context = multiprocessing.get_context("spawn")
        self._connection, far_end = context.Pipe()
        self._process = context.Process(target=_serve, args=(far_end, name, settings), daemon=True)
        self._process.start()
        far_end.close()

    def __enter__(self) -> SystemProcess:
        """Return the process."""
        return self

    def __exit__(self, *_: object) -> None:
        """End the process."""
        self._process.terminate()
        self._process.join()

    def answer(self, num_images: int, questions_per_image: int, first_scene: int) -> Answered:
        """Answer documents (`documents.documents`)."""
        self._connection.send((_answer, num_images, questions_per_image, first_scene))
        return self._connection.recv()

    def memory(self, num_images: int, questions_per_image: int, first_scene: int) -> dict[str, float]:
        """Return MB before, and at the peak of, answering documents."""
        self._connection.send((_memory, num_images, questions_per_image, first_scene))
        return self._connection.recv()


def _serve(connection: Connection, name: str, settings: Settings) -> None:
    """Answer requests until the process is ended."""
    model_dir = Path(settings.model_dir)
    system: System
    if name == ENGINE:
        system = engine_system(model_dir, settings.device, settings.max_new_tokens)
    elif name == LLAVA_HF:
        system = llava_hf_system(model_dir, settings.device, settings.max_new_tokens)
    else:
        system = PlainGenerate(model_dir, settings.device, settings.max_new_tokens, settings.batch_size)
    while True:
        task, *what = connection.recv()
        connection.send(task(system, settings.device, documents(*what)))


def _answer(system: System, device: str, rows: Dataset) -> Answered:
    start = time.perf_counter()
    answers = system(rows)
    return Answered(answers, time.perf_counter() - start, getattr(system, "new_tokens", 0))


def _memory(system: System, device: str, rows: Dataset) -> dict[str, float]:
    if not device.startswith("cuda"):
        Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")  # what loading took is no part of the peak
    before = _peak(device)
    system(rows)
    return {"loaded": before, "peak": _peak(device)}


def _peak(device: str) -> float:
    if device.startswith("cuda"):
        return torch.cuda.max_memory_allocated() / 1e6
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()  # getrusage counts the parent, too
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) / 1e3


def engine_system(model_dir: Path, device: str, max_new_tokens: int) -> System:
    """Return prebench's engine."""
    engine = Engine(model_dir, device=device, dtype="float32")

    def run(rows: Dataset) -> list[str]:
        answers = {answer.key: answer for answer in engine.generate(requests(rows, max_new_tokens))}
        failed = [answer.error for answer in answers.values() if answer.error]
        if failed:
            raise RuntimeError(f"{len(failed)} documents failed: {failed[0]}")
        return [answers[index].text or "" for index in range(len(rows))]

    return run


def requests(rows: Dataset, max_new_tokens: int) -> Iterator[GenerationRequest]:
    """Yield a request per row; its picture is decoded when the engine gets there, as `prebench evaluate` does it."""
    decoded = DecodedOnce(rows)

    def messages(index: int) -> list[dict[str, Any]]:
        row = decoded[index]
        image = {"type": "image", "image": row["image"].convert("RGB")}
        return [{"role": "user", "content": [image, {"type": "text", "text": row["question"]}]}]

    for index in range(len(rows)):
        yield GenerationRequest(index, lambda index=index: messages(index), max_new_tokens)


def llava_hf_system(model_dir: Path, device: str, max_new_tokens: int) -> System:
    """Return lmms-eval's own `llava_hf`, through its public `generate_until`, at batch size 1 (it takes no other)."""
    from lmms_eval.api.instance import Instance
    from lmms_eval.models.simple.llava_hf import LlavaHf
    from loguru import logger

    logger.disable("lmms_eval")
    model = LlavaHf(pretrained=str(model_dir), device=device, device_map=device, dtype="float32", batch_size=1)

    def visual(row: dict[str, Any]) -> list[Image.Image]:
        return [row["image"].convert("RGB")]

    def run(rows: Dataset) -> list[str]:
        model.task_dict = {"benchmark": {"test": rows}}
        # The context names the image itself, so that no line feed is put behind it: all systems read the same prompt.
        with redirect_stderr(io.StringIO()):  # its progress bar
            return model.generate_until(
                [
                    Instance(
                        request_type="generate_until",
                        arguments=(
                            IMAGE_TOKEN + question,
                            {"max_new_tokens": max_new_tokens, "temperature": 0, "do_sample": False},
                            visual,
                            index,
                            "benchmark",
                            "test",
                        ),
                        idx=0,
                        metadata={"task": "benchmark", "doc_id": index, "repeats": 1},
                    )
                    for index, question in enumerate(rows["question"])
                ]
            )

    return run


class PlainGenerate:
    """Batched `model.generate`, padded on the left, as a user of transformers would write it."""

    def __init__(self, model_dir: Path, device: str, max_new_tokens: int, batch_size: int) -> None:
        self._model = AutoModelForImageTextToText.from_pretrained(model_dir, dtype=torch.float32).to(device).eval()
        self._processor = AutoProcessor.from_pretrained(model_dir)
        self._processor.tokenizer.padding_side = "left"
        self._max_new_tokens, self._batch_size = max_new_tokens, batch_size
        self.new_tokens = 0
        """Tokens of the last call's answers, ends included."""

    def __call__(self, rows: Dataset) -> list[str]:
        """Answer all rows."""
        self.new_tokens = 0
        texts: list[str] = []
        for start in range(0, len(rows), self._batch_size):
            batch = rows[start : start + self._batch_size]
            prompts = [self._prompt(question) for question in batch["question"]]
            images = [image.convert("RGB") for image in batch["image"]]
            inputs = self._processor(text=prompts, images=images, padding=True, return_tensors="pt")
            with torch.inference_mode():
                output = self._model.generate(
                    **inputs.to(self._model.device), do_sample=False, max_new_tokens=self._max_new_tokens
                )
            new = output[:, inputs["input_ids"].shape[1] :]
            self.new_tokens += int((new != self._processor.tokenizer.pad_token_id).sum())
            texts += self._processor.batch_decode(new, skip_special_tokens=True)
        return texts

    def _prompt(self, question: str) -> str:
        messages = [{"role": "user", "content": IMAGE_TOKEN + question}]
        return self._processor.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
