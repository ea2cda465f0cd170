"""What the engine is asked and what it answers: requests, answers, and settings from lmms-eval's generation_kwargs."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from prebench.errors import EvaluationError
from prebench.evaluation.prompts import Messages, Prompt

DEFAULT_TOP_K = 50
"""What transformers' `generate` takes where nobody says."""


class Sampling(NamedTuple):
    """How tokens are drawn, as transformers defines these names."""

    temperature: float
    top_p: float = 1.0
    top_k: int = DEFAULT_TOP_K
    """0: all tokens."""


class GenerationSettings(NamedTuple):
    """A task's settings, in the order of `GenerationRequest`'s fields."""

    max_new_tokens: int
    until: tuple[str, ...] = ()
    sampling: Sampling | None = None


@dataclass(frozen=True)
class GenerationRequest:
    """One question. `messages` may be a function, called when the engine gets there, so that images load late.

    The engine calls it in a thread of its own, request by request in their order.
    """

    key: Hashable
    messages: Messages | Callable[[], Messages]
    max_new_tokens: int
    until: tuple[str, ...] = ()
    sampling: Sampling | None = None
    """None: greedy."""


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
    sampled: bool = False
    """Drawn at random, from a seed that follows from the document and the settings."""


Known = Callable[[GenerationRequest, Prompt], str | None]
"""Returns an answer that was computed before, or None."""


def generation_settings(kwargs: dict[str, Any], where: str) -> GenerationSettings:
    """Return the settings that lmms-eval's generation_kwargs ask for.

    Args:
        kwargs: a task's `generation_kwargs`. It samples where `do_sample` is true and `temperature` above zero.
        where: the task's name, for the message.

    Raises:
        EvaluationError: the task asks for beam search, or for a temperature, top_p or top_k that means nothing.
    """
    if int(kwargs.get("num_beams") or 1) > 1:
        raise EvaluationError(f"{where}: asks for beam search (num_beams > 1); prebench decodes greedily or samples")
    until = kwargs.get("until") or ()
    stops = (until,) if isinstance(until, str) else tuple(until)
    return GenerationSettings(
        int(kwargs.get("max_new_tokens") or 1024), tuple(stop for stop in stops if stop), _sampling(kwargs, where)
    )


def _sampling(kwargs: dict[str, Any], where: str) -> Sampling | None:
    temperature = float(kwargs.get("temperature") or 0)
    if not kwargs.get("do_sample") or temperature == 0:
        return None
    given = {name: kwargs[name] for name in ("top_p", "top_k") if kwargs.get(name) is not None}
    found = Sampling(temperature, float(given.get("top_p", 1.0)), int(given.get("top_k", DEFAULT_TOP_K)))
    if found.temperature < 0 or not 0 < found.top_p <= 1 or found.top_k < 0:
        raise EvaluationError(
            f"{where}: can't sample with temperature {found.temperature}, top_p {found.top_p}, top_k {found.top_k}; "
            "temperature must be above 0, top_p in (0, 1], top_k at least 0"
        )
    return found


def truncate(text: str, until: Sequence[str]) -> str:
    """Cut a text before each stop string in turn, as lmms-eval's models do."""
    for stop in until:
        text = text.split(stop)[0]
    return text
