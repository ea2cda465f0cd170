"""Conversations to tokens: what the chat template renders, and which of its tokens carry loss.

A target is what the assistant says and the end token behind it, nothing else. The template is rendered once per
example; where the texts stand in it is known from a rendering of the same turns with marks in the texts' places, and
the two must agree character by character.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any

from prebench.errors import DataError

IGNORE_INDEX = -100

Messages = Sequence[dict[str, Any]]
Parts = tuple[tuple[str, tuple[str, ...]], ...]
"""Role and types of the parts of every message: conversations that agree in it differ in their texts alone."""

_MARK = re.compile("\ue000(\\d+)\ue001")


def encode_example(
    processor: Any, messages: Messages, num_image_tokens: int, chat_template: str | None = None
) -> tuple[list[int], list[int]]:
    """Return (input_ids, labels) of a conversation; only the assistant's words and its end token carry loss.

    Args:
        processor: tokenizer, chat template and `image_token_id`.
        messages: Hugging Face chat messages whose contents are lists of `image` and `text` parts.
        num_image_tokens: how many tokens each picture's placeholder becomes.
        chat_template: another template than the processor's own.

    Raises:
        DataError: the mask can't be told from the template's rendering, a text holds a special token, or a picture's
            placeholder is missing in the rendering.
    """
    template = _template(processor, chat_template or processor.chat_template)
    text, spans = template.render(messages)
    tokenizer = processor.tokenizer
    begins = tokenizer.bos_token is None or text.startswith(tokenizer.bos_token)
    encoded = tokenizer(text, add_special_tokens=not begins, return_offsets_mapping=True)
    image_token = processor.image_token_id
    input_ids: list[int] = []
    labels: list[int] = []
    span = images = 0
    for token, (start, end) in zip(encoded["input_ids"], encoded["offset_mapping"], strict=True):
        while span < len(spans) and start >= spans[span][1]:
            span += 1
        learn = False
        if span < len(spans) and end > spans[span][0]:
            learn = spans[span][0] <= start and end <= spans[span][1]
            if not learn and start < end:
                raise DataError(
                    f"the token {text[start:end]!r} is half of the prompt and half of the answer: the chat template "
                    "writes nothing between them; end the question with a mark such as '?'"
                )
        images += token == image_token
        count = num_image_tokens if token == image_token else 1
        input_ids += [token] * count
        labels += [token if learn else IGNORE_INDEX] * count
    expected = sum(part["type"] == "image" for message in messages for part in message["content"])
    if images != expected:
        raise DataError(f"the chat template writes {images} image placeholders for {expected} images")
    return input_ids, labels


@lru_cache(maxsize=16)
def _template(processor: Any, chat_template: str) -> _Template:
    return _Template(processor, chat_template)


class _Template:
    """A chat template, and what its renderings have in common."""

    def __init__(self, processor: Any, chat_template: str) -> None:
        self._processor = processor
        self._chat_template = chat_template
        self._skeletons: dict[Parts, list[str]] = {}
        self._special = tuple({*processor.tokenizer.all_special_tokens, processor.image_token})
        question: Messages = [{"role": "user", "content": [{"type": "text", "text": "?"}]}]
        answer: Messages = [*question, {"role": "assistant", "content": [{"type": "text", "text": "!"}]}]
        asked, opened = self._text(question), self._text(question, add_generation_prompt=True)
        if not opened.startswith(asked):
            raise DataError("chat template: the generation prompt changes what stands before it")
        self._opening = opened[len(asked) :]
        """The generation prompt: what a model is given before it answers."""
        end = self._skeleton(answer)[-1]
        eos = processor.tokenizer.eos_token
        self._end = end[: end.index(eos) + len(eos)] if eos and eos in end else end
        if not self._end:
            raise DataError("chat template: nothing ends the assistant's turn, so a model would never learn to stop")

    def render(self, messages: Messages) -> tuple[str, list[tuple[int, int]]]:
        """Return the rendering, and where in it the assistant's words with their end token stand."""
        text = self._text(messages)
        texts = [part["text"] for message in messages for part in message["content"] if part["type"] == "text"]
        self._require_plain(texts)
        pieces = self._skeleton(messages)
        spans = self._spans(messages, pieces, texts, text)
        if spans is None:
            # The template changes some texts, by trimming them, say: only the assistant's have to stand as they are.
            spans = self._spans(messages, self._pieces(messages, lambda role: role == "assistant"), texts, text)
        if spans is None:
            raise DataError("chat template: it changes the assistant's words (trimmed white space?)")
        return text, spans

    def _text(self, messages: Messages, **options: Any) -> str:
        rendered: str = self._processor.apply_chat_template(
            messages, chat_template=self._chat_template, tokenize=False, **options
        )
        return rendered

    def _require_plain(self, texts: Sequence[str]) -> None:
        for text in texts:
            for token in self._special:
                if token in text:
                    raise DataError(f"a text holds the special token {token!r}")

    def _skeleton(self, messages: Messages) -> list[str]:
        key = tuple((m["role"], tuple(part["type"] for part in m["content"])) for m in messages)
        if key not in self._skeletons:
            self._skeletons[key] = self._pieces(messages, lambda role: True)
        return self._skeletons[key]

    def _pieces(self, messages: Messages, marked: Callable[[str], bool]) -> list[str]:
        """Return what the template writes around the texts: text, number of a text, text, ..., text."""
        number = 0
        copies = []
        for message in messages:
            content = []
            for part in message["content"]:
                if part["type"] == "text":
                    if marked(message["role"]):
                        part = {"type": "text", "text": f"\ue000{number}\ue001"}
                    number += 1
                content.append(part)
            copies.append({"role": message["role"], "content": content})
        return _MARK.split(self._text(copies))

    def _spans(
        self, messages: Messages, pieces: Sequence[str], texts: Sequence[str], rendered: str
    ) -> list[tuple[int, int]] | None:
        """Return the answers' places; None where filling the pieces with the texts does not give the rendering."""
        roles = [m["role"] for m in messages for part in m["content"] if part["type"] == "text"]
        place = len(pieces[0])
        spans = []
        for index in range(1, len(pieces), 2):
            number, following = int(pieces[index]), pieces[index + 1]
            before, end = pieces[index - 1], place + len(texts[number])
            if roles[number] == "assistant":
                opening = before.rfind(self._opening)
                if opening < 0 or not following.startswith(self._end):
                    raise DataError("chat template: its turns differ from those that it renders alone")
                spans.append((place - len(before) + opening + len(self._opening), end + len(self._end)))
            place = end + len(following)
        filled = [texts[int(piece)] if index % 2 else piece for index, piece in enumerate(pieces)]
        answered = sum(role == "assistant" for role in roles)
        return spans if len(spans) == answered and "".join(filled) == rendered else None
