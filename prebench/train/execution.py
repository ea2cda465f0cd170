"""How a model is computed, not what: kernels that repeat, activation checkpointing and compilation, for a training."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from transformers import LlavaForConditionalGeneration

from prebench.errors import TrainingError
from prebench.model.visual_states import language_model
from prebench.schema import TrainConfig
from prebench.train.packing import packed_attention


@contextmanager
def execution(model: LlavaForConditionalGeneration, config: TrainConfig) -> Iterator[None]:
    """Apply the recipe's switches inside the block; afterwards the model is as it was.

    Decoder layers are compiled one by one, and their `forward` alone: the hooks that read hidden states stay outside
    and see the very tensors of the graph.

    Args:
        model: unwrapped.
        config: the recipe.

    Raises:
        TrainingError: an operation inside the block has no kernel whose sums repeat, and the recipe asks for such.
    """
    layers: Any = language_model(model).layers if config.torch_compile else []
    # Where torch only warns, it takes attention's backward pass on a GPU as one whose sums do not repeat.
    torch.use_deterministic_algorithms(True, warn_only=not config.deterministic)
    if config.gradient_checkpointing:
        # The re-entrant kind loses the gradient of tensors that a hook has taken out of a layer.
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    for layer in layers:
        layer.forward = torch.compile(layer.forward)
    try:
        with packed_attention(model):
            yield
    except RuntimeError as error:
        if "does not have a deterministic implementation" not in str(error):
            raise
        raise TrainingError(
            f"{str(error).split(',')[0]}, so that a resumed run could end in other digits; --set "
            "train.deterministic=false lets it pass"
        ) from error
    finally:
        torch.use_deterministic_algorithms(True, warn_only=True)
        for layer in layers:
            del layer.forward
        if config.gradient_checkpointing:
            model.gradient_checkpointing_disable()
