"""The embedded preset's language model: it plays Vicuna's part, and has never seen a picture.

It reads scenes in words, patch by patch (prebench.data.text_scenes), and answers the questions that will later be asked
about pictures. Size, background and fill are in no text.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import LlamaForCausalLM, get_cosine_schedule_with_warmup

from prebench.data.collator import answered_right, encode_example, pad, target_logits
from prebench.data.questions import ask
from prebench.data.scenes import generate_scene
from prebench.data.text_scenes import PHRASES, TEXT_TYPES, TextData, content_words, scene_text, text_conversation
from prebench.model.builder import text_config
from prebench.schema import LanguageModelConfig

HELD_OUT_SCENES = 400


@dataclass(frozen=True)
class LanguageRecipe:
    """The recipe of the shipped language model."""

    steps: int = 3000
    batch_size: int = 32
    questions_per_scene: int = 8
    suffix_share: float = 0.5
    caption_share: float = 0.1
    easy_vqa_share: float = 0.15
    learning_rate: float = 3e-3
    """AdamW's: embeddings, LM head and norms."""
    matrix_learning_rate: float = 1e-2
    """Muon's: the matrices of attention and MLP."""
    warmup_steps: int = 30
    initializer_range: float = 0.03
    embedding_std: float = 0.3


class Muon(torch.optim.Optimizer):
    """Muon (K. Jordan, 2024): the momentum of a matrix, orthogonalised by five Newton-Schulz steps, is its update.

    It needs about a third of AdamW's steps here (docs/experiments.md). torch.optim.Muon iterates in bfloat16, matrix by
    matrix, which takes .52 s a step on a CPU that emulates bfloat16; stacked by shape in float32 it is .01 s.

    Args:
        parameters: matrices.
        lr: learning rate at AdamW's scale: the update's RMS is 0.2 lr.
        momentum: of the exponential mean of gradients (Nesterov).
    """

    COEFFICIENTS = (3.4445, -4.7750, 2.0315)

    def __init__(self, parameters: Iterable[Tensor], lr: float, momentum: float = 0.95) -> None:
        super().__init__(parameters, {"lr": lr, "momentum": momentum})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Update every matrix once; closures are not supported."""
        assert closure is None
        for group in self.param_groups:
            by_shape: defaultdict[torch.Size, list[Tensor]] = defaultdict(list)
            for parameter in group["params"]:
                by_shape[parameter.shape].append(parameter)
            for shape, parameters in by_shape.items():
                gradient = torch.stack([p.grad for p in parameters if p.grad is not None])
                state = self.state[parameters[0]]
                mean = state.setdefault("mean", torch.zeros_like(gradient))
                mean.lerp_(gradient, 1 - group["momentum"])
                update = self._orthogonalise(gradient.lerp(mean, group["momentum"]))
                for parameter, direction in zip(parameters, update, strict=True):
                    parameter.add_(direction, alpha=-0.2 * group["lr"] * max(shape) ** 0.5)

    def _orthogonalise(self, stack: Tensor) -> Tensor:
        a, b, c = self.COEFFICIENTS
        wide = stack.shape[1] <= stack.shape[2]
        x = stack if wide else stack.mT.contiguous()
        x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)
        for _ in range(5):
            gram = x @ x.mT
            x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
        return x if wide else x.mT


def pretrain_language(
    folder: Path, processor: Any, recipe: LanguageRecipe, seed: int, progress: Callable[[int, float], None]
) -> dict[str, float]:
    """Train the language model, write it to `folder` and return its accuracies per question type on held-out scenes.

    Args:
        folder: output folder, a plain Hugging Face one.
        processor: for its tokenizer and chat template.
        recipe: how to train.
        seed: decides scenes and questions; the caller seeds the initial weights.
        progress: called with steps done and the loss.
    """
    model = build_language_model(processor.tokenizer, recipe)
    optimizers = _optimizers(model, recipe)
    schedules = [get_cosine_schedule_with_warmup(o, recipe.warmup_steps, recipe.steps) for o in optimizers]
    data = TextData(seed, recipe.questions_per_scene, recipe.suffix_share, recipe.caption_share, recipe.easy_vqa_share)
    model.train()
    for step in range(recipe.steps):
        first = step * recipe.batch_size
        loss = _loss(model, processor, [data[first + i] for i in range(recipe.batch_size)])
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer, schedule in zip(optimizers, schedules, strict=True):
            optimizer.step()
            schedule.step()
            optimizer.zero_grad(set_to_none=True)
        progress(step + 1, loss.item())
    model.eval().save_pretrained(folder)
    return accuracies(model, processor, seed)


def build_language_model(tokenizer: Any, recipe: LanguageRecipe) -> LlamaForCausalLM:
    """Return the model at its start; a phrase that is one token starts as the scaled sum of its words."""
    config = text_config(LanguageModelConfig(initializer_range=recipe.initializer_range), tokenizer)
    model = LlamaForCausalLM(config)
    weight: Tensor = model.get_input_embeddings().weight
    with torch.no_grad():
        weight.normal_(0.0, recipe.embedding_std)
        for phrase in PHRASES:
            words = content_words(phrase)
            if len(words) > 1:
                ids = tokenizer.convert_tokens_to_ids([tokenizer.tokenize(word)[0] for word in words])
                weight[tokenizer.convert_tokens_to_ids(phrase)] = weight[ids].sum(0) / len(ids) ** 0.5
    return model


def _optimizers(model: LlamaForCausalLM, recipe: LanguageRecipe) -> list[torch.optim.Optimizer]:
    matrices = [p for p in model.model.layers.parameters() if p.ndim == 2]
    chosen = {id(p) for p in matrices}
    rest = [p for p in model.parameters() if id(p) not in chosen]
    return [
        Muon(matrices, lr=recipe.matrix_learning_rate),
        torch.optim.AdamW(rest, lr=recipe.learning_rate, weight_decay=0.0),
    ]


def _encode(processor: Any, examples: list[list[dict[str, Any]]]) -> tuple[Tensor, Tensor, Tensor]:
    return pad([encode_example(processor, e, 0) for e in examples], processor.tokenizer.pad_token_id)


def _targets(
    model: LlamaForCausalLM, processor: Any, examples: list[list[dict[str, Any]]]
) -> tuple[Tensor, Tensor, Tensor]:
    """Return `target_logits` of the examples."""
    input_ids, attention_mask, labels = _encode(processor, examples)
    hidden = model.model(input_ids=input_ids, attention_mask=attention_mask, use_cache=False).last_hidden_state
    return target_logits(model.lm_head, hidden[:, :-1], labels[:, 1:])


def _loss(model: LlamaForCausalLM, processor: Any, examples: list[list[dict[str, Any]]]) -> Tensor:
    logits, targets, _ = _targets(model, processor, examples)
    return F.cross_entropy(logits, targets)


@torch.no_grad()
def accuracies(model: LlamaForCausalLM, processor: Any, seed: int) -> dict[str, float]:
    """Return the share of held-out questions answered right, token by token with suffix, per question type."""
    found = {}
    for name in TEXT_TYPES:
        examples = []
        for index in range(10_000_000, 10_000_000 + HELD_OUT_SCENES):
            scene = generate_scene(seed, "pretrain", index)
            for question in ask(scene, np.random.default_rng([seed, index]), 1, (name,)):
                turn = (question.text + question.suffix, question.answer)
                examples.append(text_conversation(scene_text(scene), [turn]))
        logits, targets, is_target = _targets(model, processor, examples)
        right = answered_right(logits, targets, is_target.nonzero()[:, 0], len(examples))
        found[name] = right.float().mean().item()
    return found
