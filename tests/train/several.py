"""Train the tiny model in this process or in one of several; `python -m torch.distributed.run ... several.py JOB.json`.

The job names a data file, a recipe, and where process 0 puts the log and the trained weights.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from safetensors.torch import save_file

from prebench.data.conversations import open_data
from prebench.model.builder import build_model, build_processor
from prebench.model.tokenizer import train_tokenizer
from prebench.runtime import process_index
from prebench.schema import PredictiveConfig, TrainConfig
from prebench.train.loop import TrainingInputs, build_regularizer, train
from tests.conftest import TINY, WORDS
from tests.data.tiny_conversations import llava_config


def train_tiny(data: Path, recipe: dict[str, Any], weight: float = 0.5) -> tuple[Any, list[dict[str, Any]]]:
    """Return model with regularizer, and the log."""
    tokenizer = train_tokenizer(WORDS * 20, vocab_size=320)
    processor = build_processor(TINY.vision_tower, tokenizer)
    inputs = TrainingInputs(open_data(llava_config(data), processor), processor, features=None)
    model = build_model(TINY, tokenizer, 0)
    regularizer = build_regularizer(PredictiveConfig(weight=weight), model, 0)
    lines: list[dict[str, Any]] = []
    train(model, regularizer, TrainConfig.model_validate(recipe), inputs, 0, lines.append)
    model.regularizer = regularizer
    return model, lines


if __name__ == "__main__":
    job = json.loads(Path(sys.argv[1]).read_text())
    trained, log = train_tiny(Path(job["data"]), job["recipe"])
    if process_index() == 0:
        Path(job["log"]).write_text(json.dumps(log))
        save_file({name: p.detach().contiguous() for name, p in trained.named_parameters()}, job["weights"])
