"""Models and processors from local folders: safetensors only, and no code from the folder is run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor

from prebench.errors import ModelError, first_line

LOAD_ERRORS = (OSError, ValueError, KeyError, TypeError, AttributeError, ImportError, RuntimeError)
"""What transformers raises for a folder that it can't load; a processor may need a package that is not installed."""


def load_model(model_dir: Path, device: torch.device, dtype: torch.dtype) -> tuple[Any, Any]:
    """Load model and processor, the model ready to evaluate.

    Raises:
        ModelError: there is no model in the folder, or transformers can't load it.
    """
    config = read_config(model_dir)
    try:
        model = AutoModelForImageTextToText.from_pretrained(
            model_dir, config=config, dtype=dtype, trust_remote_code=False, use_safetensors=True
        )
        processor = AutoProcessor.from_pretrained(model_dir, trust_remote_code=False)
    except LOAD_ERRORS as error:
        raise ModelError(f"{model_dir}: can't be loaded: {first_line(error)}") from error
    return model.to(device).eval(), processor


def read_config(model_dir: Path) -> Any:
    """Return the configuration of a model that could be loaded; no weights are read.

    Raises:
        ModelError: there is no model in the folder, or none in safetensors.
    """
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
        raise ModelError(f"{model_dir}: can't be loaded: {first_line(error)}") from error
