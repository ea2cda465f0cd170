"""The evaluation engine: answers of a LLaVA-type model, many at a time, equal to one at a time.

Requests that share a prefix (system prompt + image) are answered together: the image is preprocessed once, the prefix
runs once, all its questions continue from its cache in one batch. Answers depend on the weights and the question alone,
not on batch size or order (tests/evaluation/test_engine.py). A document that fails is an answer with an error; the rest
goes on.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import psutil
import torch
from torch import Tensor
from transformers import DynamicCache

from prebench.errors import ModelError, one_line
from prebench.evaluation.decoding import Prefixes, Row, Sampler, choose, decode, next_logits, run_prefixes
from prebench.evaluation.generation import Answer, GenerationRequest, Known, truncate
from prebench.evaluation.prompts import Encoded, Images, PromptBuilder, context_length
from prebench.evaluation.reading import Job, Window, read_windows
from prebench.evaluation.threads import Work, num_workers, side_by_side
from prebench.model.folders import load_model, read_config
from prebench.runtime import choose_device, choose_dtype, derive_seed, loading, prepare_cpu

if TYPE_CHECKING:
    import numpy as np
    from PIL import Image

    from prebench.probe.extract import ProbeFeatures

T = TypeVar("T")

DEFAULT_TOKEN_BUDGET = 0
"""Chosen by the memory that is free."""
SMALLEST_BUDGET = 512
LARGEST_PART = {"cpu": 6_144, "cuda": 131_072}
"""More tokens at once are no faster; on a CPU they leave its caches."""
MEMORY_SHARE = {"cpu": 0.25, "cuda": 0.7}
"""Of the free memory, for a batch."""
PLANNED_NEW_TOKENS = 64
"""Most answers are far shorter than their limit: the budget plans with at most this many new tokens."""
SUPPORTED = ("llava", "llava_next", "vipllava")
"""Architectures whose decoder is causal throughout, so that a prefix does not see its question."""
UNSUPPORTED_GENERATION = ("repetition_penalty", "no_repeat_ngram_size", "min_new_tokens", "suppress_tokens")

COMPUTE_ERRORS = (RuntimeError, ValueError, IndexError)  # torch.OutOfMemoryError is a RuntimeError


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
            token_budget: largest number of tokens (rows x positions) in one batch, which is all that is computed at
                once: a CPU computes it in parts, one per core. 0: what the free memory holds. It halves by itself
                where memory ends.

        Raises:
            ModelError: the folder holds no supported model.
        """
        prepare_cpu()
        self.device = choose_device(device)
        with loading():
            self.model, self.processor = load_supported(model_dir, self.device, choose_dtype(dtype, self.device))
        self.token_budget = token_budget or free_budget(self.model)
        self._workers = num_workers(self.model)  # asked once: the threads that compute see their share of the cores
        self._memory_ended = False
        self._tokenizer = self.processor.tokenizer
        self._eos_ids = _eos_ids(self.model, model_dir)
        self._prompts = PromptBuilder(
            self.processor, self.model.config.image_token_id, context_length(self.model.config)
        )

    def generate(self, requests: Iterable[GenerationRequest], known: Known | None = None) -> Iterator[Answer]:
        """Answer requests; yields one answer per request, grouped by prefix, as they come.

        Args:
            requests: an iterator is enough; it is read in windows, in a thread of its own.
            known: asked for each rendered prompt; its text is the answer, and nothing is computed for it.
        """
        for answers in side_by_side(self._works(requests, known), self._num_parts):
            yield from answers

    def extract(
        self, images: Sequence[Image.Image], masks: Sequence[np.ndarray | None], batch_size: int = 16
    ) -> ProbeFeatures:
        """Return the probe features of images, rows in input order (prebench.probe.extract)."""
        from prebench.probe.extract import extract_features

        return extract_features(self.model, self.processor, images, masks, batch_size=batch_size)

    @property
    def _num_parts(self) -> int:
        """In how many parts a batch is computed, side by side; a budget of 1 asks one question at a time."""
        return min(self._workers, self.token_budget)

    @property
    def _part_budget(self) -> int:
        """Largest number of tokens in one part of a batch."""
        return self.token_budget // self._num_parts

    def _works(self, requests: Iterable[GenerationRequest], known: Known | None) -> Iterator[Work[list[Answer]]]:
        """Yield what is to be computed, part by part."""
        for window in read_windows(self._prompts, requests, known):
            if window.answers:
                yield partial(iter, [window.answers])
            for batch in self._plan(window):
                yield partial(self._shrinking, batch, window.images)

    def _shrinking(self, groups: list[list[Job]], images: Images) -> Iterator[list[Answer]]:
        """Answer groups, batch by batch; where memory ended, later batches are smaller."""
        yield from self._answer(groups, images)
        if self._memory_ended:
            self._memory_ended = False
            self.token_budget = max(self.token_budget // 2, min(SMALLEST_BUDGET, self.token_budget))

    def _plan(self, window: Window) -> Iterator[list[list[Job]]]:
        """Yield lists of groups: jobs of one group share their prefix; groups of one list have equal shapes."""
        groups: dict[Any, list[Job]] = {}
        for job in window.jobs:
            groups.setdefault(job.encoded.prefix_key, []).append(job)
        by_shape: dict[Any, list[list[Job]]] = {}
        for group in groups.values():
            encoded = group[0].encoded
            shapes = [tuple(t.shape) for image in _inputs(encoded, window.images) for t in image.values()]
            by_shape.setdefault((encoded.prefix_length, tuple(shapes)), []).append(group)
        for (prefix_length, _), same_shape in by_shape.items():
            batches = -(-len(same_shape) * prefix_length // self._part_budget) or 1
            at_once = -(-len(same_shape) // min(batches, len(same_shape)))
            for start in range(0, len(same_shape), at_once):
                yield same_shape[start : start + at_once]

    def _answer(self, groups: list[list[Job]], images: Images) -> Iterator[list[Answer]]:
        """Answer groups of equal prefix length; on an error halve them, until the one that fails stands alone."""
        prefixes = self._attempt(lambda: self._prefixes([group[0].encoded for group in groups], images))
        if isinstance(prefixes, str):
            if len(groups) == 1:
                yield [_failed(job, prefixes) for job in groups[0]]
                return
            half = len(groups) // 2
            yield from self._answer(groups[:half], images)
            yield from self._answer(groups[half:], images)
            return
        jobs = [(index, job) for index, group in enumerate(groups) for job in group]
        jobs.sort(key=lambda place: len(place[1].encoded.suffix))  # little padding; stable, so deterministic
        start = 0
        while start < len(jobs):
            count = self._fitting([job for _, job in jobs[start:]])
            yield from self._decode(prefixes, jobs[start : start + count])
            start += count

    def _fitting(self, jobs: Sequence[Job]) -> int:
        """Return how many jobs (sorted by suffix length) fit into a part of a batch: at least one."""
        count = 0
        for job in jobs:
            width = len(job.encoded.ids) + min(job.request.max_new_tokens, PLANNED_NEW_TOKENS)
            if count and (count + 1) * width > self._part_budget:
                break
            count += 1
        return count

    def _decode(self, prefixes: Prefixes | None, jobs: list[tuple[int, Job]]) -> Iterator[list[Answer]]:
        """Answer jobs, each with the place of its prefix; on an error halve them."""
        answers = self._attempt(lambda: self._continue(prefixes, jobs))
        if isinstance(answers, str):
            if len(jobs) == 1:
                yield [_failed(jobs[0][1], answers)]
                return
            half = len(jobs) // 2
            yield from self._decode(prefixes, jobs[:half])
            yield from self._decode(prefixes, jobs[half:])
            return
        yield [self._finished(job, ids) for (_, job), ids in zip(jobs, answers, strict=True)]

    def _attempt(self, compute: Callable[[], T]) -> T | str:
        """Return what `compute` gives, or one line of error.

        The error itself is let go before anything is tried again: its traceback holds the tensors that were too large.
        """
        try:
            return compute()
        except COMPUTE_ERRORS as error:
            if isinstance(error, torch.OutOfMemoryError):
                self._memory_ended = True
            return one_line(error)

    @torch.inference_mode()
    def _continue(self, prefixes: Prefixes | None, jobs: list[tuple[int, Job]]) -> list[list[int]]:
        """Return the new tokens of each job."""
        rows = [self._row(job) for _, job in jobs]
        alive = []
        for number, ((place, _), row) in enumerate(zip(jobs, rows, strict=True)):
            if not row.suffix:  # the prompt ends with its image: the prefix tells the first token
                assert prefixes is not None
                (token,) = choose(next_logits(self.model, prefixes.last_states[place : place + 1]), [row])
                if not row.add(token, self._eos_ids):
                    continue
                row.suffix = (token,)
            alive.append(number)
        if alive:
            going = [rows[number] for number in alive]
            room = max(len(row.suffix) + min(row.limit, PLANNED_NEW_TOKENS) for row in going)
            cache = DynamicCache() if prefixes is None else prefixes.select([jobs[i][0] for i in alive], room)
            decode(self.model, cache, jobs[0][1].encoded.prefix_length, going, self._eos_ids)
        return [row.new for row in rows]

    def _row(self, job: Job) -> Row:
        request, limit = job.request, min(job.request.max_new_tokens, job.encoded.room)
        sampler = None
        if request.sampling is not None:
            content = (job.prompt.prompt_hash, job.prompt.image_hash, *request.sampling)
            sampler = Sampler(request.sampling, derive_seed("sample", *content))

        def stopped(ids: list[int]) -> bool:
            text = self._text(ids)
            return any(stop in text for stop in request.until)

        return Row(job.encoded.suffix, limit, sampler, stopped if request.until else None)

    def _finished(self, job: Job, ids: list[int]) -> Answer:
        request, prompt = job.request, job.prompt
        whole = self._text(ids)
        text = truncate(whole, request.until)
        at_end = len(ids) == job.encoded.room < request.max_new_tokens and ids[-1] not in self._eos_ids
        sampled = request.sampling is not None
        return Answer(request.key, text, None, prompt.prompt_hash, prompt.image_hash, at_end and text == whole, sampled)

    def _prefixes(self, prompts: list[Encoded], images: Images) -> Prefixes | None:
        length = prompts[0].prefix_length
        if length == 0:
            return None
        inputs = [image for prompt in prompts for image in _inputs(prompt, images)]
        features = {name: self._to_device([image[name] for image in inputs]) for name in inputs[0]}
        return run_prefixes(self.model, [prompt.ids[:length] for prompt in prompts], features)

    def _to_device(self, tensors: list[Tensor]) -> Tensor:
        tensor = torch.cat(tensors).to(self.device)
        return tensor.to(self.model.dtype) if tensor.is_floating_point() else tensor

    def _text(self, ids: list[int]) -> str:
        return self._tokenizer.decode(ids, skip_special_tokens=True)


def load_supported(model_dir: Path, device: torch.device, dtype: torch.dtype) -> tuple[Any, Any]:
    """Load model and processor from an exported folder.

    Raises:
        ModelError: the folder is missing, incomplete, of another architecture, or holds no safetensors.
    """
    model_type = read_config(model_dir).model_type
    if model_type not in SUPPORTED:
        raise ModelError(f"{model_dir}: architecture {model_type!r} is none of {', '.join(SUPPORTED)}")
    model, processor = load_model(model_dir, device, dtype)
    if getattr(processor, "chat_template", None) is None:
        raise ModelError(f"{model_dir}: the processor has no chat template (chat_template.jinja)")
    return model, processor


def free_budget(model: Any) -> int:
    """Return how many tokens a batch may have, so that caches and activations fit into the memory that is free."""
    device, text = model.device, model.config.get_text_config()
    heads = getattr(text, "num_key_value_heads", None) or text.num_attention_heads
    head_size = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    cache = 2 * text.num_hidden_layers * heads * head_size
    activations = 8 * (text.hidden_size + text.intermediate_size)
    num_bytes = (2 * cache + activations) * model.dtype.itemsize  # the prefixes' cache, and that of the rows
    free = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else psutil.virtual_memory().available
    fitting = int(MEMORY_SHARE.get(device.type, 0.25) * free / num_bytes)
    largest = LARGEST_PART.get(device.type, LARGEST_PART["cpu"]) * num_workers(model)
    return max(SMALLEST_BUDGET, min(fitting, largest))


def _inputs(prompt: Encoded, images: Images) -> list[dict[str, Tensor]]:
    """Return the features of a prompt's images, none of which is broken (`PromptBuilder.encode`)."""
    return [image.features for key in prompt.images if not isinstance(image := images[key], str)]


def _failed(job: Job, error: str) -> Answer:
    return Answer(job.request.key, None, error, job.prompt.prompt_hash, job.prompt.image_hash)


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
