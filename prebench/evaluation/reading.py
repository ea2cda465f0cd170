"""Reads requests ahead of the engine: decodes, renders, preprocesses and tokenises the next ones while it computes.

One thread does it all, in order, so that a task's code never runs twice at once and equal requests give equal windows.
A window is what the engine sees together; its size is bounded in requests and in bytes of images, however many requests
an iterator holds.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

from PIL import Image

from prebench.errors import one_line
from prebench.evaluation.generation import Answer, GenerationRequest, Known
from prebench.evaluation.prompts import DOCUMENT_ERRORS, Draft, Encoded, Images, Prompt, PromptBuilder

WINDOW = 128
"""Requests that are looked at together for shared prefixes: more are hardly faster, and need more memory."""
WINDOW_BYTES = 64_000_000
"""Of a window's distinct images, decoded or preprocessed, whichever is more."""


@dataclass(frozen=True)
class Job:
    """A request that the engine has to compute."""

    request: GenerationRequest
    prompt: Prompt
    encoded: Encoded


@dataclass(frozen=True)
class Window:
    """What the engine sees together: answers that need no compute, jobs, and the jobs' preprocessed images."""

    answers: list[Answer]
    jobs: list[Job]
    images: Images


@dataclass(frozen=True)
class _Read:
    """Requests that were read and rendered, with the decoded images that were new."""

    prompts: list[tuple[GenerationRequest, Prompt]]
    failed: list[Answer]
    pixels: Mapping[str, Image.Image]


def read_windows(
    builder: PromptBuilder, requests: Iterable[GenerationRequest], known: Known | None = None
) -> Iterator[Window]:
    """Yield windows of requests in their order; the next two are under way while the caller works on one.

    Args:
        builder: renders, preprocesses and tokenises.
        requests: an iterator is enough.
        known: as in `Engine.generate`; called in the caller's thread, before an image is preprocessed.
    """
    iterator = iter(requests)
    with ThreadPoolExecutor(1, "prebench-reader") as thread:
        reading = thread.submit(_read, builder, iterator)
        ready: Future[Window] | None = None
        while True:
            read = reading.result()
            following: Future[Window] | None = None
            if read is not None:
                following = thread.submit(_prepare, builder, *_ask(read, known))
                reading = thread.submit(_read, builder, iterator)
            if ready is not None:
                yield ready.result()
            if following is None:
                return
            ready = following


def _read(builder: PromptBuilder, requests: Iterator[GenerationRequest]) -> _Read | None:
    """Read at most WINDOW requests, fewer where their images are large; None at the end."""
    drafts: list[tuple[GenerationRequest, Draft]] = []
    failed: list[Answer] = []
    pixels: dict[str, Image.Image] = {}
    num_bytes = 0
    for request in requests:
        try:
            messages = request.messages() if callable(request.messages) else request.messages
            draft, images = builder.look(messages)
        except DOCUMENT_ERRORS as error:
            failed.append(_unread(request, one_line(error)))
        else:
            drafts.append((request, draft))
            new = {key: image for key, image in images.items() if key not in pixels and key not in builder.images}
            pixels.update(new)
            num_bytes += sum(max(3 * im.width * im.height, builder.images.largest) for im in new.values())
        if len(drafts) + len(failed) >= WINDOW or num_bytes >= WINDOW_BYTES:
            break
    if not drafts and not failed:
        return None
    prompts: list[tuple[GenerationRequest, Prompt]] = []
    rendered = builder.render([draft for _, draft in drafts])
    for (request, _), prompt in zip(drafts, rendered, strict=True):
        if isinstance(prompt, str):
            failed.append(_unread(request, prompt))
        else:
            prompts.append((request, prompt))
    return _Read(prompts, failed, pixels)


def _unread(request: GenerationRequest, error: str) -> Answer:
    return Answer(request.key, None, error, "", "")


def _ask(read: _Read, known: Known | None) -> tuple[list[Answer], list[tuple[GenerationRequest, Prompt]], dict]:
    """Divide what was read into answers that are there and requests that are to be computed."""
    answers, rest = list(read.failed), []
    for request, prompt in read.prompts:
        text = None if known is None else known(request, prompt)
        if text is None:
            rest.append((request, prompt))
        else:
            sampled = request.sampling is not None
            answers.append(Answer(request.key, text, None, prompt.prompt_hash, prompt.image_hash, sampled=sampled))
    return answers, rest, dict(read.pixels)


def _prepare(
    builder: PromptBuilder,
    answers: list[Answer],
    requests: list[tuple[GenerationRequest, Prompt]],
    pixels: Mapping[str, Image.Image],
) -> Window:
    """Preprocess and tokenise what is to be computed."""
    prompts = [prompt for _, prompt in requests]
    images = builder.images.take([key for prompt in prompts for key in prompt.images], pixels)
    jobs = []
    for (request, prompt), encoded in zip(requests, builder.encode(prompts, images), strict=True):
        if isinstance(encoded, str):
            answers.append(Answer(request.key, None, encoded, prompt.prompt_hash, prompt.image_hash))
        else:
            jobs.append(Job(request, prompt, encoded))
    return Window(answers, jobs, images)
