"""Real models and steps of the published presets' classes, small enough to measure what the estimates say."""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from prebench.costs import formulas
from prebench.costs.formulas import MicroBatch, Setup
from prebench.costs.stages import shape_model
from prebench.data.collator import Batch
from prebench.data.encoding import IGNORE_INDEX
from prebench.model.freezing import freeze_for_stage
from prebench.schema import ModelConfig, RegularizerConfig
from prebench.train.loop import build_regularizer
from prebench.train.objective import Objective
from prebench.train.packing import packed_attention

ROWS, EXAMPLES, TEXT, TARGETS = 500, 3, 20, 7
PUBLISHED = {
    "clip and vicuna": {"tower": "clip", "language": "llama", "keys": 4, "tied": False},
    "siglip and qwen": {"tower": "siglip", "language": "qwen2", "keys": 2, "tied": True},
}
ALIGN = ("multi_modal_projector",)
INSTRUCT = ("multi_modal_projector", "language_model")
TUNED = ("vision_tower", *INSTRUCT)


def small(pair: str) -> ModelConfig:
    """Return a narrow model of a pair's classes: 16 visual tokens, 3 + 4 layers, D = 64."""
    kind: dict[str, Any] = PUBLISHED[pair]
    tower = {"architecture": kind["tower"], "num_hidden_layers": 3, "num_attention_heads": 2, "hidden_size": 32}
    language = {"architecture": kind["language"], "num_key_value_heads": kind["keys"], "num_hidden_layers": 4}
    language |= {"hidden_size": 64, "intermediate_size": 176, "vocab_size": ROWS, "tie_word_embeddings": kind["tied"]}
    return ModelConfig.model_validate(
        {
            "vision_tower": tower
            | {"pretrained": None, "feature_layer": -2, "intermediate_size": 80, "image_size": 64, "patch_size": 16},
            "language_model": language | {"pretrained": "a-folder", "chat_template": "chatml"},
            "projector_std": None,
        }
    )


def objective(
    config: ModelConfig,
    trainable: tuple[str, ...],
    block: RegularizerConfig | None,
    rows: int = ROWS,
    device: str = "cpu",
) -> Objective:
    """Return model and regularizer with random weights, frozen as in a stage."""
    torch.manual_seed(0)
    model = shape_model(config, rows, device)
    freeze_for_stage(model, trainable)
    regularizer = build_regularizer(block, model, 0)
    if regularizer is not None:
        regularizer.begin_stage(model)
    return Objective(model, regularizer).train().to(device)


def batch(
    config: ModelConfig, rows: int = ROWS, examples: int = EXAMPLES, text: int = TEXT, targets: int = TARGETS
) -> Batch:
    """Return pictures with `text` tokens each, `targets` of them learnt."""
    visual = config.vision_tower.num_tokens
    ids = torch.arange(examples * (visual + text)).reshape(examples, -1) % (rows - 2)
    ids[:, 1 : 1 + visual] = rows - 1
    labels = torch.full_like(ids, IGNORE_INDEX)
    labels[:, -targets - 1 : -1] = ids[:, -targets - 1 : -1]
    side = config.vision_tower.image_size
    pixels = torch.randn(examples, 3, side, side, generator=torch.Generator().manual_seed(0))
    return Batch(ids, torch.ones_like(ids), labels, tuple(map(str, range(examples))), pixels)


def setup(
    config: ModelConfig, trainable: tuple[str, ...], block: RegularizerConfig | None, checkpointing: bool, half: bool
) -> tuple[Setup, MicroBatch]:
    """Return the same as the estimates describe it."""
    sizes = {"pre_projector": config.vision_tower.hidden_size}
    size = sizes.get(getattr(block, "anchor", ""), config.language_model.hidden_size)
    found = Setup(config, ROWS, frozenset(trainable), False, checkpointing, half, block, size)
    tokens = config.vision_tower.num_tokens + TEXT
    return found, MicroBatch(EXAMPLES, tokens, EXAMPLES, EXAMPLES * TARGETS)


def checkpoint(found: Objective) -> None:
    """Switch activation checkpointing on as training does."""
    found.model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})


class _Kept:
    """A tensor that autograd keeps."""

    def __init__(self, tensor: torch.Tensor) -> None:
        self.tensor = tensor


def kept_bytes(found: Objective, given: Batch, half: bool) -> int:
    """Return the bytes that autograd holds between forward and backward, weights left out."""
    weights = {p.untyped_storage().data_ptr() for p in found.parameters()}
    held: weakref.WeakSet[_Kept] = weakref.WeakSet()

    def keep(tensor: torch.Tensor) -> _Kept:
        kept = _Kept(tensor)
        held.add(kept)
        return kept

    with (
        torch.autograd.graph.saved_tensors_hooks(keep, lambda kept: kept.tensor),
        torch.autocast("cpu", dtype=torch.bfloat16, enabled=half),
        packed_attention(found.model),
    ):
        terms = found(given)
        loss = terms.total(given.num_targets, EXAMPLES, 0.5)
    storages = {kept.tensor.untyped_storage().data_ptr(): kept.tensor.untyped_storage().nbytes() for kept in held}
    assert loss.requires_grad
    return sum(size for address, size in storages.items() if address not in weights)


def kept_estimate(described: Setup, micro: MicroBatch) -> float:
    """Return the estimate of `kept_bytes`."""
    parts = (
        formulas.decoder_bytes,
        formulas.tower_bytes,
        formulas.projector_bytes,
        formulas.regularizer_bytes,
        formulas.kept_logits_bytes,
    )
    return sum(part(described, micro) for part in parts)


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of all tensors that are alive, from their making to their end."""

    def __init__(self) -> None:
        super().__init__()
        self._alive: dict[int, Any] = {}
        self.now = self.peak = 0

    def add(self, tensor: torch.Tensor) -> None:
        """Count a tensor's storage once, for as long as it lives."""
        storage = tensor.untyped_storage()
        key, size = id(storage), storage.nbytes()
        if key in self._alive:
            return

        def gone(_reference: Any) -> None:
            del self._alive[key]
            self.now -= size

        self._alive[key] = weakref.ref(storage, gone)
        self.now += size
        self.peak = max(self.peak, self.now)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run an operation and count what it returns."""
        out = func(*args, **(kwargs or {}))
        for value in tree_iter(out):
            if isinstance(value, torch.Tensor):
                self.add(value)
        return out
