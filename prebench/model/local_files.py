"""What of a preset's published files lies on this machine: asked before anything is fetched or converted."""

from __future__ import annotations

from pathlib import Path

from transformers import LlavaProcessor

from prebench.model.builder import model_processor
from prebench.model.published import published_processor
from prebench.model.smollm2 import PACKAGE, known_folder
from prebench.model.sources import FILES, HUB_ID
from prebench.schema import ModelConfig

TOKENIZERS = ("tokenizer.json", "tokenizer.model", "vocab.json")


def local_folder(pretrained: str, revision: str | None) -> Path | None:
    """Return the folder of a published part where its files are here: a folder, or the Hub's cache; else None."""
    if pretrained == PACKAGE:
        return known_folder()
    folder = Path(pretrained)
    if folder.is_dir():
        return folder
    if not HUB_ID.fullmatch(pretrained):
        return None
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(pretrained, revision=revision, allow_patterns=list(FILES), local_files_only=True))
    except (LocalEntryNotFoundError, HFValidationError, OSError):
        return None


def local_processor(config: ModelConfig) -> LlavaProcessor | None:
    """Return the processor of a preset's model without fetching anything; None where its tokenizer is not here.

    Raises:
        ModelError: its files are here and damaged, or differ from the preset.
    """
    tower, language = config.vision_tower, config.language_model
    if not language.has_own_tokenizer:
        return model_processor(config)
    assert language.pretrained is not None, "the schema asks for it"
    folder = local_folder(language.pretrained, language.revision)
    if folder is None or not any((folder / name).is_file() for name in TOKENIZERS):
        return None
    published = tower.pretrained not in (None, "embedded")
    files = local_folder(str(tower.pretrained), tower.revision) if published else None
    return published_processor(folder, language, tower, files)
