"""Learning curves: loss and accuracy on held-out questions while a model trains.

The questions come from the validation splits of the preset's data, never from a test split. A validation draws nothing
at random and moves no weight, so that a run is the same bit for bit with and without it.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import LlavaForConditionalGeneration

from prebench.data.collator import answered_right, encode_example, pad, target_logits
from prebench.data.examples import ValidationQuestion, conversation
from prebench.model.builder import vision_features
from prebench.train.features import FeatureCache
from prebench.train.packing import last_states, pack, packed_attention

BATCH_SIZE = 128


class Validation:
    """Held-out questions, each alone behind its picture and with its answer-format suffix.

    Args:
        questions: what is asked; their pictures are encoded once.
        processor: the study's processor.
        frozen: whether the vision tower stays as it is; the pictures are then encoded once.
        features: the frozen tower's outputs, where the study keeps them.
    """

    def __init__(
        self,
        questions: Sequence[ValidationQuestion],
        processor: Any,
        frozen: bool,
        features: FeatureCache | None = None,
    ) -> None:
        images = list(dict.fromkeys(q.image_id for q in questions))
        self._frozen = frozen
        self._features: Tensor | None = None
        if frozen and features is not None:
            self._features = features.get(images)
            num_tokens = self._features.shape[1]
        else:
            pictures = {q.image_id: q.image for q in questions}
            self._pixels = processor.image_processor([pictures[i] for i in images], return_tensors="pt")["pixel_values"]
            num_tokens = (self._pixels.shape[-1] // processor.patch_size) ** 2
        encoded = []
        for question in questions:
            messages = conversation([(question.text, question.answer)])
            encoded.append(encode_example(processor, messages, num_tokens))
        self._questions = questions
        self._encoded = encoded
        self._rows = [images.index(q.image_id) for q in questions]
        self._pad_token_id = processor.tokenizer.pad_token_id

    @torch.no_grad()
    def __call__(self, model: LlavaForConditionalGeneration) -> dict[str, Any]:
        """Return `lm_loss` (nats per target token), `accuracy` by question type and the number of questions `n`.

        An answer is right where every token of it, its end included, is the most probable one after the tokens before.
        """
        if self._features is None or not self._frozen:
            parts = (pixels.to(model.device) for pixels in self._pixels.split(BATCH_SIZE))
            self._features = torch.cat([vision_features(model, pixels) for pixels in parts])
        self._features = self._features.to(model.device)
        total = torch.zeros((), dtype=torch.float64)
        targets = 0
        right: defaultdict[str, list[bool]] = defaultdict(list)
        for first in range(0, len(self._questions), BATCH_SIZE):
            part = slice(first, first + BATCH_SIZE)
            loss, hits, count = self._batch(model, part, self._features[self._rows[part]])
            total += loss
            targets += count
            for question, hit in zip(self._questions[part], hits, strict=True):
                right[question.type].append(hit)
        accuracy = {name: sum(values) / len(values) for name, values in sorted(right.items())}
        return {"lm_loss": total.item() / max(1, targets), "accuracy": accuracy, "n": len(self._questions)}

    def _batch(
        self, model: LlavaForConditionalGeneration, part: slice, features: Tensor
    ) -> tuple[Tensor, list[bool], int]:
        device = features.device
        packed = pack(*(t.to(device) for t in pad(self._encoded[part], self._pad_token_id)))
        with packed_attention(model):
            hidden = last_states(model, packed, model.model.multi_modal_projector(features))
        logits, targets, is_target = target_logits(model.lm_head, hidden, packed.next_ids)
        loss = F.cross_entropy(logits.float(), targets, reduction="sum").double().cpu()
        right = answered_right(logits, targets, packed.sequence_of_token[is_target], len(packed.lengths))
        return loss, right.tolist(), len(targets)
