"""`prebench pretrain`: the embedded preset's pretrained parts, which ship with the package.

Vision tower, language model and tokenizer: what LLaVA takes from CLIP and Vicuna. The manifest beside them holds
recipe, hashes and held-out accuracies.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from prebench.data.examples import corpus
from prebench.data.questions import LETTER_SUFFIX, SHORT_SUFFIX
from prebench.data.text_scenes import PHRASES
from prebench.model.builder import build_processor
from prebench.model.pretrain_language import LanguageRecipe, pretrain_language
from prebench.model.pretrain_tower import TowerRecipe, pretrain_tower
from prebench.model.sources import MANIFEST, PRETRAIN_COMMAND, PRETRAINED
from prebench.model.tokenizer import train_tokenizer
from prebench.runtime import derive_seed, file_hash, prepare_cpu, seed_everything, versions
from prebench.schema import VisionTowerConfig
from prebench.store import write_json

DEFAULT_FOLDER = PRETRAINED
Progress = Callable[[str, int, int, float], None]


@dataclass(frozen=True)
class PretrainConfig:
    """The recipe of the shipped parts."""

    seed: int = 0
    vocab_size: int = 640
    """Tokens learned from text; fixed phrases come on top."""
    vision_tower: TowerRecipe = field(default_factory=TowerRecipe)
    language_model: LanguageRecipe = field(default_factory=LanguageRecipe)


def pretrain(folder: Path, config: PretrainConfig, progress: Progress) -> dict[str, Any]:
    """Write `folder`/{tokenizer,vision_tower,language_model} and `folder`/manifest.json; return the manifest.

    Args:
        folder: output folder.
        config: the recipe.
        progress: called with the part's name, steps done, steps in all and the loss.
    """
    prepare_cpu()
    tokenizer = train_tokenizer(corpus(), config.vocab_size, (SHORT_SUFFIX, LETTER_SUFFIX, *PHRASES))
    tokenizer.save_pretrained(folder / "tokenizer")
    processor = build_processor(VisionTowerConfig(pretrained=None), tokenizer)
    accuracies = {}
    makers: dict[str, Any] = {"vision_tower": pretrain_tower, "language_model": pretrain_language}
    for part, make in makers.items():
        recipe = getattr(config, part)
        seed_everything(derive_seed("pretrain", part, config.seed))

        def report(done: int, loss: float, part: str = part, steps: int = recipe.steps) -> None:
            progress(part, done, steps, loss)

        found = make(folder / part, processor, recipe, config.seed, report)
        accuracies[part] = {name: round(value, 4) for name, value in found.items()}
    files = sorted(p for part in ("tokenizer", *makers) for p in (folder / part).iterdir() if p.is_file())
    manifest = {
        "command": PRETRAIN_COMMAND,
        "config": asdict(config),
        "accuracies": accuracies,
        "files": {path.relative_to(folder).as_posix(): file_hash(path) for path in files},
        "versions": versions(),
    }
    write_json(folder / MANIFEST, manifest)
    return manifest
