"""Any multimodal model folder of transformers: loaded for the probes, or only looked at."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForImageTextToText

from prebench.errors import ModelError, first_line
from prebench.model.architectures import TESTED, image_attention, injected_layers, projector
from prebench.model.folders import LOAD_ERRORS, load_model, read_config
from prebench.model.visual_states import language_model, num_layers, visual_mask


@dataclass(frozen=True)
class Outline:
    """What the probes will find in a model."""

    model_type: str
    num_layers: int
    attention: str
    """What image tokens attend to (`prebench.model.architectures.image_attention`)."""
    injected: tuple[int, ...]
    """Layers at whose input the encoder's features are added."""
    tested: bool
    """A test holds this architecture's attention; that of another is measured before its first batch."""


def load(model_dir: Path, device: torch.device, dtype: torch.dtype) -> tuple[Any, Any]:
    """Load model and processor; safetensors only, and no code from the folder is run.

    Raises:
        ModelError: there is no model, transformers can't load it, or the probes can't read its architecture.
    """
    model, processor = load_model(model_dir, device, dtype)
    outline(model)
    return model, processor


def look(model_dir: Path) -> Outline:
    """Return what the probes will find, from the configuration alone; no weights are read.

    Raises:
        ModelError: as `load`.
    """
    config = read_config(model_dir)
    try:
        with torch.device("meta"):
            model = AutoModelForImageTextToText.from_config(config, trust_remote_code=False)
    except LOAD_ERRORS as error:
        raise ModelError(f"{model_dir}: can't be loaded: {first_line(error)}") from error
    return outline(model)


def outline(model: Any) -> Outline:
    """Return what the probes read of a model.

    Raises:
        ModelError: no decoder layers, no image token or no projector where transformers' models have them.
    """
    language_model(model)
    visual_mask(model, torch.zeros((1, 1), dtype=torch.long))
    projector(model)
    kind = model.config.model_type
    return Outline(kind, num_layers(model), image_attention(model), injected_layers(model), kind in TESTED)
