"""The only definition of "visual tokens at layer l"; training and probes both use it.

With L decoder layers, layer 0 is the input of decoder layer 0 (the projector's output as it enters the LLM, h_v^0 of
arXiv 2603.20808), layer l < L the input of decoder layer l, and layer L the last block's output *before* the final norm
(transformers' `hidden_states[L]` is after it). All are read by forward pre-hooks, so they are the very tensors of
the graph, also under activation checkpointing.

The decoder is the one that transformers' `get_decoder()` finds, the visual positions are those of the config's
`image_token_id`. Line breaks that LLaVA-NeXT puts between rows of patches stand at such positions, too, but are one
learned vector (`image_newline`): they are recognised by it at layer 0 and left out. What else differs between
architectures is in `prebench.model.architectures`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from prebench.errors import ModelError

Visitor = Callable[[int, Tensor], None]
NAMED_LAYERS = {"quarter": 0.25, "half": 0.5, "three_quarters": 0.75, "last": 1.0}


def language_model(model: nn.Module) -> nn.Module:
    """Return the decoder stack (embeddings, layers, final norm) of a multimodal model.

    Raises:
        ModelError: transformers' `get_decoder()` finds no `layers` with a final `norm`.
    """
    decoder: Any = model
    while not isinstance(getattr(decoder, "layers", None), nn.ModuleList) and hasattr(decoder, "get_decoder"):
        if (inner := decoder.get_decoder()) is decoder:
            break
        decoder = inner
    if not isinstance(getattr(decoder, "layers", None), nn.ModuleList) or not hasattr(decoder, "norm"):
        raise ModelError(
            f"{type(model).__name__}: no decoder layers found; prebench needs a model whose get_decoder() returns a "
            "module with `layers` (a ModuleList) and a final `norm`, as transformers' LLaVA, Qwen-VL or Gemma 3 have"
        )
    assert isinstance(decoder, nn.Module)
    return decoder


def num_layers(model: nn.Module) -> int:
    """Return L, the number of decoder layers."""
    layers = language_model(model).layers
    assert isinstance(layers, nn.ModuleList)
    return len(layers)


def resolve_layer(layer: str | int, depth: int) -> int:
    """Return the layer index 1..`depth` for an index or a named fraction ("half" of 32 is 16).

    Raises:
        ModelError: the index lies outside the model.
    """
    index = max(1, math.floor(NAMED_LAYERS[layer] * depth + 0.5)) if isinstance(layer, str) else layer
    if not 1 <= index <= depth:
        raise ModelError(f"regularizer.layer: {layer} lies outside 1..{depth}, the decoder layers of this model")
    return index


def visual_mask(model: nn.Module, input_ids: Tensor) -> Tensor:
    """Return the mask of the positions that image features fill, [B, T] bool, from the model's `image_token_id`.

    These are the visual tokens, and the line breaks between them where the model has some (`VisualStates.mask_BT`).

    Raises:
        ModelError: the model's config names no image token.
    """
    token = getattr(getattr(model, "config", None), "image_token_id", None)
    if token is None:
        raise ModelError(
            f"{type(model).__name__}: the config has no image_token_id; prebench finds visual tokens by the id of the "
            "placeholder that image features replace: name it in config.json"
        )
    return input_ids == token


class VisualStates:
    """Hidden states of one forward pass at the asked layers.

    `mask_BT`, [B, T] bool, tells the visual tokens; line breaks between them are left out once layer 0 was reached.
    """

    def __init__(self, mask_BT: Tensor, newline_D: Tensor | None = None, visit: Visitor | None = None) -> None:
        self.mask_BT = mask_BT
        self._newline_D = newline_D
        self._visit = visit
        self._hidden: dict[int, Tensor] = {}

    def record(self, layer: int, hidden_BTD: Tensor) -> None:
        """Keep the first tensor seen at a layer (a checkpointed block is entered again in the backward pass)."""
        if layer == 0 and layer not in self._hidden and self._newline_D is not None:
            newline = self._newline_D.detach().to(hidden_BTD)
            self.mask_BT = self.mask_BT & (hidden_BTD != newline).any(dim=-1)
        if self._visit is not None:
            self._visit(layer, hidden_BTD[self.mask_BT])
        else:
            self._hidden.setdefault(layer, hidden_BTD)

    def detached(self) -> VisualStates:
        """Return the same states without gradient."""
        found = VisualStates(self.mask_BT)
        found._hidden = {layer: hidden_BTD.detach() for layer, hidden_BTD in self._hidden.items()}
        return found

    def at(self, layer: int) -> Tensor:
        """Return the visual tokens at a layer, [M, D]: all images' tokens one after another, M = sum of N_p."""
        return self._hidden[layer][self.mask_BT]

    def hidden(self, layer: int) -> Tensor:
        """Return the whole hidden state at a layer, [B, T, D]."""
        return self._hidden[layer]


@contextmanager
def capture(
    model: nn.Module, input_ids: Tensor, layers: Iterable[int], visit: Visitor | None = None
) -> Iterator[VisualStates]:
    """Record the visual tokens at `layers` (0..L) during the forward pass inside the `with` block.

    Args:
        model: a multimodal model in transformers' layout (unwrapped).
        input_ids: [B, T], the prompt of that forward pass; tells which tokens are visual.
        layers: layer indices as defined in this module's docstring.
        visit: is called with each layer and its visual tokens, [M, D], when the pass gets there; then nothing is kept.
    """
    decoder = language_model(model)
    blocks = decoder.layers
    assert isinstance(blocks, nn.ModuleList) and isinstance(decoder.norm, nn.Module)
    newline: Any = getattr(getattr(model, "base_model", model), "image_newline", None)
    states = VisualStates(visual_mask(model, input_ids), newline, visit)
    handles = []
    for layer in sorted({*layers, *(() if newline is None else (0,))}):
        module = blocks[layer] if layer < len(blocks) else decoder.norm
        handles.append(module.register_forward_pre_hook(_recorder(states, layer), with_kwargs=True))
    try:
        yield states
    finally:
        for handle in handles:
            handle.remove()


def _recorder(states: VisualStates, layer: int) -> Any:
    def hook(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        hidden = args[0] if args else kwargs["hidden_states"]
        assert isinstance(hidden, torch.Tensor)
        states.record(layer, hidden)

    return hook
