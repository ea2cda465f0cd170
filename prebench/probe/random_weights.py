"""The control "random weights": what the probes find where the language model has learned nothing.

Encoder and projector stay, so layers -1 and 0 are those of the model itself; above them a random decoder mixes what it
is given. What a trained model loses beyond this, it lost by training.
"""

from __future__ import annotations

from typing import Any

import torch

from prebench.errors import ModelError
from prebench.model.visual_states import language_model
from prebench.runtime import derive_seed


def randomise_language_model(model: Any, seed: int) -> None:
    """Give the language model the weights that transformers would start it with; they can't be had back.

    Args:
        model: a multimodal model.
        seed: of the weights; on another kind of device it gives other weights.

    Raises:
        ModelError: the language model is none of transformers', which know how theirs start.
    """
    decoder: Any = language_model(model)
    if not hasattr(decoder, "initialize_weights"):
        raise ModelError(f"{type(decoder).__name__}: no initialize_weights; leave out the control of random weights")
    for part in (*decoder.modules(), *decoder.parameters(), *decoder.buffers()):
        part._is_hf_initialized = False  # transformers leaves alone what it has loaded
    devices = [model.device] if model.device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(derive_seed("random weights", seed))
        decoder.initialize_weights()
