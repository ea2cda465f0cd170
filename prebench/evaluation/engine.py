"""The evaluation engine: greedy answers of a LLaVA-type model, many at a time, equal to one at a time.

Requests that share a prefix (system prompt + image) are answered together: the image is preprocessed once, the prefix
runs once, all its questions continue from its cache in one batch. Answers depend on the weights and the question alone,
not on batch size or order (tests/evaluation/test_engine.py). A document that fails is an answer with an error; the rest
goes on.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor, DynamicCache

from prebench.errors import EvaluationError, ModelError
from prebench.evaluation.decoding import greedy, run_prefixes, select_rows
from prebench.evaluation.prompts import DOCUMENT_ERRORS, Messages, Prompt, PromptBuilder, context_length
from prebench.runtime import choose_device, choose_dtype, prepare_cpu

if TYPE_CHECKING:
    import numpy as np
    from PIL import Image

    from prebench.probe.extract import ProbeFeatures

DEFAULT_TOKEN_BUDGET = 16_384
WINDOW = 512
"""Requests that are looked at together for shared prefixes; bounds memory on an iterator."""
PLANNED_NEW_TOKENS = 64
"""Most answers are far shorter than their limit: the budget plans with at most this many new tokens."""
SUPPORTED = ("llava", "llava_next", "vipllava")
"""Architectures whose decoder is causal throughout, so that a prefix does not see its question."""
UNSUPPORTED_GENERATION = ("repetition_penalty", "no_repeat_ngram_size", "min_new_tokens", "suppress_tokens")

COMPUTE_ERRORS = (RuntimeError, ValueError, IndexError)  # torch.OutOfMemoryError is a RuntimeError


@dataclass(frozen=True)
class GenerationRequest:
    """One question. `messages` may be a function, called when the engine gets there, so that images load late."""

    key: Hashable
    messages: Messages | Callable[[], Messages]
    max_new_tokens: int
    until: tuple[str, ...] = ()


@dataclass(frozen=True)
class Answer:
    """One answer; `text` is None exactly where `error` is not. Hashes are "" where the prompt could not be built."""

    key: Hashable
    text: str | None
    error: str | None
    prompt_hash: str
    image_hash: str
    truncated: bool = False
    """The model's context ended before the answer did; the text is what fitted."""


Known = Callable[[GenerationRequest, Prompt], str | None]
"""Returns an answer that was computed before, or None."""


@dataclass(frozen=True)
class _Job:
    request: GenerationRequest
    prompt: Prompt


class Engine:
    """A loaded model that answers requests."""

    def __init__(
        self,
        model_dir: Path,
        device: str = "auto",
        dtype: str = "auto",
        token_budget: int = DEFAULT_TOKEN_BUDGET,
    ) -> None:
        """Load an exported Hugging Face folder (safetensors only; code from the folder is never run).

        Args:
            model_dir: the folder with config.json, processor and weights.
            device: "auto", "cpu" or "cuda".
            dtype: "auto" (bfloat16 on CUDA, float32 on a CPU), "float32" or "bfloat16".
            token_budget: largest number of tokens (rows x positions) in one batch; halves by itself where memory ends.

        Raises:
            ModelError: the folder holds no supported model.
        """
        prepare_cpu()
        self.device = choose_device(device)
        self.token_budget = token_budget
        self.model, self.processor = load_model(model_dir, self.device, choose_dtype(dtype, self.device))
        self._tokenizer = self.processor.tokenizer
        self._eos_ids = _eos_ids(self.model, model_dir)
        self._prompts = PromptBuilder(
            self.processor, self.model.config.image_token_id, context_length(self.model.config)
        )

    def generate(self, requests: Iterable[GenerationRequest], known: Known | None = None) -> Iterator[Answer]:
        """Answer requests greedily; yields one answer per request, grouped by prefix, not in the order of the input.

        Args:
            requests: an iterator is enough; it is read in windows.
            known: asked for each built prompt before it is planned; its text is the answer, and nothing is computed.
        """
        iterator = iter(requests)
        while window := list(islice(iterator, WINDOW)):
            jobs = []
            for request in window:
                built = self._build(request, known)
                if isinstance(built, Answer):
                    yield built
                else:
                    jobs.append(built)
            del window  # the images of a window are no longer needed
            for batch in self._plan(jobs):
                yield from self._answer(batch)
            self._prompts.images.trim()

    def extract(
        self, images: Sequence[Image.Image], masks: Sequence[np.ndarray | None], batch_size: int = 16
    ) -> ProbeFeatures:
        """Return the probe features of images, rows in input order (prebench.probe.extract)."""
        from prebench.probe.extract import extract_features

        return extract_features(self.model, self.processor, images, masks, batch_size=batch_size)

    def _build(self, request: GenerationRequest, known: Known | None) -> _Job | Answer:
        try:
            messages = request.messages() if callable(request.messages) else request.messages
            prompt = self._prompts.build(messages)
        except DOCUMENT_ERRORS as error:
            return Answer(request.key, None, one_line(error), "", "")
        text = None if known is None else known(request, prompt)
        if text is None:
            return _Job(request, prompt)
        return Answer(request.key, text, None, prompt.prompt_hash, prompt.image_hash)

    def _plan(self, jobs: list[_Job]) -> Iterator[list[list[_Job]]]:
        """Yield lists of groups: jobs of one group share their prefix; groups of one list have equal shapes."""
        groups: dict[Any, list[_Job]] = {}
        for job in jobs:
            groups.setdefault(job.prompt.prefix_key, []).append(job)
        by_shape: dict[Any, list[list[_Job]]] = {}
        for group in groups.values():
            prompt = group[0].prompt
            shapes = [tuple(t.shape) for key in prompt.images for t in self._prompts.images[key].features.values()]
            by_shape.setdefault((prompt.prefix_length, tuple(shapes)), []).append(group)
        for (prefix_length, _), same_shape in by_shape.items():
            at_once = max(1, self.token_budget // max(1, prefix_length))
            for start in range(0, len(same_shape), at_once):
                yield same_shape[start : start + at_once]

    def _answer(self, groups: list[list[_Job]]) -> Iterator[Answer]:
        """Answer groups of equal prefix length; on an error halve them, until the one that fails stands alone."""
        try:
            cache = self._prefix_cache(groups)
        except COMPUTE_ERRORS as error:
            if len(groups) == 1:
                for job in groups[0]:
                    yield _failed(job, error)
                return
            half = len(groups) // 2
            yield from self._answer(groups[:half])
            yield from self._answer(groups[half:])
            return
        rows = [(index, job) for index, group in enumerate(groups) for job in group]
        rows.sort(key=lambda row: len(row[1].prompt.suffix))  # little padding; stable, so deterministic
        start = 0
        while start < len(rows):
            count = self._fitting(rows[start:])
            yield from self._decode(cache, rows[start : start + count])
            start += count

    def _fitting(self, rows: Sequence[tuple[int, _Job]]) -> int:
        """Return how many rows (sorted by suffix length) fit into the token budget: at least one."""
        count = 0
        for _, job in rows:
            width = len(job.prompt.ids) + min(job.request.max_new_tokens, PLANNED_NEW_TOKENS)
            if count and (count + 1) * width > self.token_budget:
                break
            count += 1
        return count

    def _decode(self, cache: DynamicCache | None, rows: list[tuple[int, _Job]]) -> Iterator[Answer]:
        jobs = [job for _, job in rows]
        try:
            tokens = self._greedy(cache, rows)
        except COMPUTE_ERRORS as error:
            if len(rows) == 1:
                yield _failed(jobs[0], error)
                return
            half = len(rows) // 2
            yield from self._decode(cache, rows[:half])
            yield from self._decode(cache, rows[half:])
            return
        for job, ids in zip(jobs, tokens, strict=True):
            whole = self._text(ids)
            text = truncate(whole, job.request.until)
            at_end = len(ids) == job.prompt.room < job.request.max_new_tokens and ids[-1] not in self._eos_ids
            cut = at_end and text == whole
            yield Answer(job.request.key, text, None, job.prompt.prompt_hash, job.prompt.image_hash, cut)

    def _greedy(self, cache: DynamicCache | None, rows: list[tuple[int, _Job]]) -> list[list[int]]:
        jobs = [job for _, job in rows]
        start = DynamicCache() if cache is None else select_rows(cache, [index for index, _ in rows])

        def stopped(row: int, ids: list[int]) -> bool:
            text = self._text(ids)
            return any(stop in text for stop in jobs[row].request.until)

        return greedy(
            self.model,
            start,
            jobs[0].prompt.prefix_length,
            [job.prompt.suffix for job in jobs],
            [min(job.request.max_new_tokens, job.prompt.room) for job in jobs],
            self._eos_ids,
            stopped if any(job.request.until for job in jobs) else None,
        )

    def _prefix_cache(self, groups: list[list[_Job]]) -> DynamicCache | None:
        prompts = [group[0].prompt for group in groups]
        if prompts[0].prefix_length == 0:
            return None
        inputs = [self._prompts.images[key].features for prompt in prompts for key in prompt.images]
        features = {name: self._to_device([image[name] for image in inputs]) for name in inputs[0]}
        return run_prefixes(self.model, [prompt.ids[: prompt.prefix_length] for prompt in prompts], features)

    def _to_device(self, tensors: list[Tensor]) -> Tensor:
        tensor = torch.cat(tensors).to(self.device)
        return tensor.to(self.model.dtype) if tensor.is_floating_point() else tensor

    def _text(self, ids: list[int]) -> str:
        return self._tokenizer.decode(ids, skip_special_tokens=True)


def load_model(model_dir: Path, device: torch.device, dtype: torch.dtype) -> tuple[Any, Any]:
    """Load model and processor from an exported folder.

    Raises:
        ModelError: the folder is missing, incomplete, of another architecture, or holds no safetensors.
    """
    if not (model_dir / "config.json").is_file():
        raise ModelError(f"{model_dir}: no exported model here (config.json is missing); `prebench train` makes it")
    try:
        config = AutoConfig.from_pretrained(model_dir, trust_remote_code=False)
        if config.model_type not in SUPPORTED:
            raise ModelError(f"{model_dir}: architecture {config.model_type!r} is none of {', '.join(SUPPORTED)}")
        model = AutoModelForImageTextToText.from_pretrained(
            model_dir, dtype=dtype, trust_remote_code=False, use_safetensors=True
        )
        processor = AutoProcessor.from_pretrained(model_dir, trust_remote_code=False)
    except (OSError, ValueError, KeyError) as error:
        raise ModelError(f"{model_dir}: can't be loaded: {one_line(error)}") from error
    if getattr(processor, "chat_template", None) is None:
        raise ModelError(f"{model_dir}: the processor has no chat template (chat_template.jinja)")
    return model.to(device).eval(), processor


def greedy_settings(kwargs: dict[str, Any], where: str) -> tuple[int, tuple[str, ...]]:
    """Return (max_new_tokens, stop strings) of lmms-eval's generation_kwargs.

    Args:
        kwargs: a task's `generation_kwargs`.
        where: the task's name, for the message.

    Raises:
        EvaluationError: the task asks for sampling or beam search.
    """
    if kwargs.get("do_sample") and float(kwargs.get("temperature") or 0) > 0:
        raise EvaluationError(f"{where}: asks for sampling (do_sample, temperature > 0); prebench decodes greedily")
    if int(kwargs.get("num_beams") or 1) > 1:
        raise EvaluationError(f"{where}: asks for beam search (num_beams > 1); prebench decodes greedily")
    until = kwargs.get("until") or ()
    stops = (until,) if isinstance(until, str) else tuple(until)
    return int(kwargs.get("max_new_tokens") or 1024), tuple(stop for stop in stops if stop)


def truncate(text: str, until: Sequence[str]) -> str:
    """Cut a text before each stop string in turn, as lmms-eval's models do."""
    for stop in until:
        text = text.split(stop)[0]
    return text


def one_line(error: BaseException) -> str:
    """Return an error's type and first line."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__


def _failed(job: _Job, error: BaseException) -> Answer:
    return Answer(job.request.key, None, one_line(error), job.prompt.prompt_hash, job.prompt.image_hash)


def _eos_ids(model: Any, model_dir: Path) -> frozenset[int]:
    settings = model.generation_config
    for name in UNSUPPORTED_GENERATION:
        if getattr(settings, name, None) not in (None, 0, 1, 1.0, []):
            raise ModelError(
                f"{model_dir}/generation_config.json: {name} changes greedy decoding; remove it for evaluation"
            )
    eos = settings.eos_token_id
    if eos is None:
        raise ModelError(f"{model_dir}/generation_config.json: eos_token_id is missing; no answer would end")
    return frozenset([eos] if isinstance(eos, int) else eos)
