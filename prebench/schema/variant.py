"""A variant: one regularizer block."""

from __future__ import annotations

from pydantic import Field

from prebench.schema.base import Name, StrictModel
from prebench.schema.regularizers import AnyRegularizer


class VariantConfig(StrictModel):
    """A training objective: a name and its regularizer (null: none at all, not even logged)."""

    name: Name
    description: str = ""
    regularizer: AnyRegularizer | None
    seed_offset: int = Field(0, ge=0)
    """The same objective with other randomness: seed s trains with s + offset in initialisation and data order."""
