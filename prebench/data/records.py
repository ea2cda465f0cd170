"""What every format of training conversations becomes: chat messages and the names of their pictures."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

from prebench.errors import DataError


@dataclass(frozen=True)
class Record:
    """One conversation of a source."""

    messages: list[dict[str, Any]]
    """Hugging Face chat messages; every content is a list of `image` and `text` parts, and the last is an answer."""
    images: tuple[str, ...]
    """Names that the source knows, in the order of the placeholders."""


class Source(Protocol):
    """Conversations in one published format."""

    key: str
    """Changes when the texts change: what was found out about them is kept by it."""

    def __len__(self) -> int: ...

    def where(self, index: int) -> str:
        """Return how messages name a record."""

    def record(self, index: int) -> Record:
        """Return a record, or raise DataError that names the field."""

    def image(self, index: int, name: str) -> bytes:
        """Return an encoded picture of a record, or raise DataError."""


def text_part(text: str) -> dict[str, str]:
    """Return a text as a part of a message's content."""
    return {"type": "text", "text": text}


def image_part() -> dict[str, str]:
    """Return a picture's placeholder as a part of a message's content."""
    return {"type": "image"}


def require_text(value: Any, field: str) -> str:
    """Return a text that a tokenizer can read.

    Raises:
        DataError: it is none; the field is named.
    """
    if not isinstance(value, str):
        raise DataError(f"{field}: a text is expected, not {type(value).__name__}")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise DataError(f"{field}: half of a surrogate pair at character {error.start}") from error
    return value
