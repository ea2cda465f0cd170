"""Any multimodal model folder of transformers: loaded for the probes, or only looked at."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor

from prebench.errors import ModelError
from prebench.model.architectures import TESTED, image_attention, injected_layers, projector
from prebench.model.visual_states import language_model, num_layers, visual_mask

LOAD_ERRORS = (OSError, ValueError, KeyError, TypeError, AttributeError, ImportError, RuntimeError)
"""What transformers raises for a folder that it can't load; a processor may need a package that is not installed."""


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
    config = _config(model_dir)
    try:
        model = AutoModelForImageTextToText.from_pretrained(
            model_dir, config=config, dtype=dtype, trust_remote_code=False, use_safetensors=True
        )
        processor = AutoProcessor.from_pretrained(model_dir, trust_remote_code=False)
    except LOAD_ERRORS as error:
        raise ModelError(f"{model_dir}: can't be loaded: {_first_line(error)}") from error
    outline(model)
    return model.to(device).eval(), processor


def look(model_dir: Path) -> Outline:
    """Return what the probes will find, from the configuration alone; no weights are read.

    Raises:
        ModelError: as `load`.
    """
    config = _config(model_dir)
    try:
        with torch.device("meta"):
            model = AutoModelForImageTextToText.from_config(config, trust_remote_code=False)
    except LOAD_ERRORS as error:
        raise ModelError(f"{model_dir}: can't be loaded: {_first_line(error)}") from error
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


def _config(model_dir: Path) -> Any:
    if not model_dir.is_dir():
        raise ModelError(f"{model_dir}: no such folder; give the local folder of a model, or of a run")
    if not (model_dir / "config.json").is_file():
        hint = "; merge the adapter into its model first" if (model_dir / "adapter_config.json").is_file() else ""
        raise ModelError(f"{model_dir}: no model here (config.json is missing){hint}")
    if not list(model_dir.glob("*.safetensors")):
        raise ModelError(f"{model_dir}: no *.safetensors here; prebench reads no pickled weights")
    try:
        return AutoConfig.from_pretrained(model_dir, trust_remote_code=False)
    except LOAD_ERRORS as error:
        raise ModelError(f"{model_dir}: can't be loaded: {_first_line(error)}") from error


def _first_line(error: Exception) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
