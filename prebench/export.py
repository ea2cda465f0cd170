"""A trained model to a plain Hugging Face folder: safetensors, processor, chat template, generation config, model card.

The folder loads in transformers, lmms-eval's own back ends and vLLM without any code of prebench; the regularizer's
predictor is not in it. `prebench.json` beside the weights says where they come from.
"""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from prebench.errors import StoreError, user_error
from prebench.runtime import file_hash, git_commit, versions
from prebench.store import read_json, write_json, write_text

if TYPE_CHECKING:
    from transformers import LlavaForConditionalGeneration

MANIFEST = "prebench.json"
REQUIRED = ("variant", "seed", "config_hash", "weights_hash", "parts_hash", "dtype")

CARD = """---
library_name: transformers
pipeline_tag: image-text-to-text
tags: [prebench, llava]
---
# {variant}, seed {seed}

A LLaVA-type model trained by prebench {version} as variant `{variant}` with seed {seed}. It is an instrument of a
controlled comparison (arXiv 2603.20808), not a model for use.

```python
from transformers import AutoModelForImageTextToText, AutoProcessor
model = AutoModelForImageTextToText.from_pretrained("{folder}")
processor = AutoProcessor.from_pretrained("{folder}")
```

Final training losses: lm_loss {lm_loss}, pre_loss {pre_loss}. Configuration hash `{config_hash}`, weights hash
`{weights_hash}`.
"""


def export(
    model: LlavaForConditionalGeneration,
    processor: Any,
    folder: Path,
    manifest: dict[str, Any],
    weights: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """Write the folder as a whole or not at all, and return the completed manifest.

    Args:
        model: the trained model, without regularizer.
        processor: its processor with the chat template.
        folder: target; replaced if it exists.
        manifest: variant, seed, config_hash, parts_hash, dtype, num_layers, regularizer_layer, lm_loss, pre_loss.
        weights: the model's state dict where its own weights are spread over processes; None takes its own.

    Raises:
        StoreError: the folder can't be written.
    """
    temporary = None
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(dir=folder.parent, prefix=".export-"))
        temporary.chmod(0o755)
        model.save_pretrained(temporary, state_dict=weights)
        processor.save_pretrained(temporary)
        complete = manifest | {
            "weights_hash": weights_hash(temporary),
            "versions": versions(),
            "git_commit": git_commit(),
        }
        write_json(temporary / MANIFEST, complete)
        card = CARD.format(**complete, folder=folder.name, version=complete["versions"]["prebench"])
        write_text(temporary / "README.md", card)
        for path in temporary.iterdir():
            path.chmod(0o644)  # safetensors writes files that only their owner can read
        if folder.exists():
            shutil.rmtree(folder)
        temporary.replace(folder)
    except Exception as error:
        if not isinstance(error, OSError) and user_error(error) is None:
            raise
        raise StoreError(
            f"{folder}: the model can't be written ({error}); nothing was replaced and the finished runs are kept"
        ) from error
    finally:
        if temporary is not None and temporary.exists():
            shutil.rmtree(temporary, ignore_errors=True)
    return complete


def weights_hash(folder: Path) -> str:
    """Return one hash over all weight files of an export."""
    files = sorted(folder.glob("*.safetensors"))
    return "-".join(file_hash(path) for path in files)


def read_manifest(folder: Path) -> dict[str, Any]:
    """Read an export's `prebench.json`.

    Raises:
        StoreError: it is missing, no JSON object, or lacks a key.
    """
    manifest = read_json(folder / MANIFEST)
    missing = [key for key in REQUIRED if not isinstance(manifest, dict) or key not in manifest]
    if missing:
        raise StoreError(f"{folder / MANIFEST}: the key {missing[0]!r} is missing; delete {folder} to train it again")
    found: dict[str, Any] = manifest
    return found
