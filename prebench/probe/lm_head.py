"""Visual tokens through the LM head: which words the last layer makes of an image."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from prebench.model.visual_states import language_model

TOP = 10


@dataclass(frozen=True)
class DecodedTokens:
    """How often visual tokens decode to each token of the vocabulary."""

    ids: np.ndarray
    """[V'] int64: token ids that occur, ascending."""
    counts: np.ndarray
    """[V'] int64: visual tokens that decode to each."""
    texts: tuple[str, ...]
    """[V'] what each token spells, quoted as in Python where it is not printable."""

    def arrays(self) -> dict[str, np.ndarray]:
        """Return the arrays by name."""
        return {"ids": self.ids, "counts": self.counts}

    @classmethod
    def join(cls, parts: Sequence[DecodedTokens]) -> DecodedTokens:
        """Return the counts of all parts."""
        totals: dict[int, int] = {}
        texts: dict[int, str] = {}
        for part in parts:
            for token, count, text in zip(part.ids.tolist(), part.counts.tolist(), part.texts, strict=True):
                totals[token] = totals.get(token, 0) + count
                texts[token] = text
        ids = sorted(totals)
        counts = [totals[token] for token in ids]
        return cls(np.array(ids, dtype=np.int64), np.array(counts, dtype=np.int64), tuple(texts[t] for t in ids))

    @property
    def total(self) -> int:
        """Return how many visual tokens were decoded."""
        return int(self.counts.sum())

    def entropy(self) -> float:
        """Return the entropy of the decoded tokens' distribution, in bits: 0 where all decode to one."""
        shares = self.counts / self.total
        return float(-(shares * np.log2(shares)).sum())

    def most_frequent(self, number: int = TOP) -> list[tuple[str, float]]:
        """Return the text and share of the most frequent tokens; of equally frequent ones the lower id first."""
        order = np.lexsort((self.ids, -self.counts))[:number]
        return [(self.texts[i], int(self.counts[i]) / self.total) for i in order]


class Decoder:
    """Counts the tokens that last-layer states decode to.

    Args:
        model: with an LM head, or without: then nothing is counted.
        processor: its tokenizer names the tokens.
    """

    def __init__(self, model: Any, processor: Any) -> None:
        self._head = model.get_output_embeddings()
        self._norm: Any = language_model(model).norm
        self._processor = processor
        self._counts: np.ndarray = np.zeros(0, dtype=np.int64)

    def add(self, states_MD: Tensor) -> None:
        """Count the most likely token of each state, given before the final norm."""
        if self._head is None or len(states_MD) == 0:
            return
        logits = self._head(self._norm(states_MD))
        ids = logits.argmax(dim=-1).cpu()
        found = torch.bincount(ids, minlength=len(self._counts)).numpy()
        found[: len(self._counts)] += self._counts
        self._counts = found

    def result(self) -> DecodedTokens | None:
        """Return the counts; None where the model has no LM head."""
        ids = np.flatnonzero(self._counts)
        if len(ids) == 0:
            return None
        texts = tuple(_spelled(self._processor.tokenizer, token) for token in ids.tolist())
        return DecodedTokens(ids, self._counts[ids], texts)


def _spelled(tokenizer: Any, token: int) -> str:
    """Return what a token adds to a text; a part of a character as the tokenizer names it, an unknown id by number."""
    text = tokenizer.decode([token])
    if text and "\ufffd" not in text:
        return text if text.isprintable() and text.strip() else repr(text)
    name = tokenizer.convert_ids_to_tokens(token)
    return name if isinstance(name, str) else f"#{token}"
