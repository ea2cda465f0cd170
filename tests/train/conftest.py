"""A small training set-up with the real classes, seconds per run."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from prebench.data.examples import TrainingData
from prebench.model.builder import build_model, build_processor
from prebench.schema import DataConfig, RegularizerConfig, TrainConfig
from prebench.train.loop import TrainingInputs, build_regularizer, train
from tests.conftest import TINY

RECIPE = {
    "align": {"steps": 2, "batch_size": 4, "learning_rate": 1e-3, "caption_share": 1.0},
    "instruct": {"steps": 4, "batch_size": 4, "learning_rate": 1e-3, "caption_share": 0.25},
    "log_every": 1,
    "device": "cpu",
    "dtype": "float32",
}


@pytest.fixture(scope="session")
def inputs(tiny_tokenizer: Any) -> TrainingInputs:
    data = TrainingData(
        DataConfig.model_validate(
            {
                "scenes": {"num_images": 12, "questions_per_image": 2},
                "easy_vqa": {"num_images": 12, "questions_per_image": 2},
            }
        )
    )
    return TrainingInputs(data=data, processor=build_processor(TINY.vision_tower, tiny_tokenizer), features=None)


@pytest.fixture(scope="session")
def run_training(inputs: TrainingInputs) -> Callable[..., tuple[Any, list[dict[str, Any]]]]:
    """Train the tiny model; returns (model, log lines)."""

    def run(regularizer: RegularizerConfig | None, seed: int = 0, **changes: Any) -> tuple[Any, list[dict[str, Any]]]:
        recipe = {**RECIPE, **changes}
        model = build_model(TINY, inputs.processor.tokenizer, seed)
        lines: list[dict[str, Any]] = []
        term = build_regularizer(regularizer, model, seed)
        train(model, term, TrainConfig.model_validate(recipe), inputs, seed, lines.append)
        return model, lines

    return run
