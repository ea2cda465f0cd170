"""What all configuration models share."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")]
"""A name that is a folder's name, too."""


class StrictModel(BaseModel):
    """Immutable; unknown keys are errors."""

    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=())


def require_distinct(what: str, names: Sequence[str]) -> None:
    """Refuse a name that stands twice."""
    for name in names:
        if names.count(name) > 1:
            raise ValueError(f"{what} {name!r} is named twice")
