"""The training loop: one explicit loop on accelerate for every variant, stage after stage.

Input: a run's configuration and the study's training data. Output: the trained model and `train.jsonl`. The only thing
that differs between two variants is the regularizer block that `build_regularizer` reads.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Mapping

import torch
from accelerate import Accelerator
from transformers import LlavaForConditionalGeneration

from prebench.errors import ConfigError
from prebench.model.visual_states import num_layers
from prebench.runtime import choose_device, choose_dtype, derive_seed, seed_everything
from prebench.schema import (
    STAGES,
    PredictiveConfig,
    RegularizerConfig,
    StageConfig,
    TrainConfig,
    installed_regularizer,
    package_of,
)
from prebench.train.batches import TrainingInputs
from prebench.train.checkpoint import Checkpoint, Checkpoints
from prebench.train.execution import execution
from prebench.train.features import FeatureCache
from prebench.train.log import LogLine
from prebench.train.objective import Objective
from prebench.train.processes import join_processes, on_main, require_supported
from prebench.train.regularizers.base import Regularizer
from prebench.train.regularizers.norm_penalty import NormPenaltyRegularizer
from prebench.train.regularizers.predictive import PredictiveRegularizer
from prebench.train.sharding import sharding_plugin, to_cpu
from prebench.train.stage import Shared, Stage
from prebench.train.trackers import tracked


def build_regularizer(
    config: RegularizerConfig | None,
    model: LlavaForConditionalGeneration,
    seed: int,
    external: Mapping[str, FeatureCache] | None = None,
) -> Regularizer | None:
    """Return the variant's regularizer for this model, or None where the variant has none.

    Args:
        config: the variant's regularizer block.
        model: whose hidden states it reads.
        seed: decides the initial weights of what it learns.
        external: features of external anchors, by `anchor_model`.

    Raises:
        ConfigError: the class that an installed package declares for the block's type is no Regularizer.
    """
    if config is None:
        return None
    if not isinstance(config, PredictiveConfig):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(derive_seed("regularizer", seed))
            return _regularizer_class(config.type).build(config, model)
    hidden_size = model.config.text_config.hidden_size
    features = (external or {})[config.anchor_model] if config.anchor_model is not None else None
    sizes = {"pre_projector": model.config.vision_config.hidden_size, "external": features.width if features else 0}
    return PredictiveRegularizer(
        config,
        hidden_size=hidden_size,
        anchor_size=sizes.get(config.anchor, hidden_size),
        depth=num_layers(model),
        generator=torch.Generator().manual_seed(derive_seed("predictor", seed)),
        external=features,
    )


def _regularizer_class(kind: str) -> type[Regularizer]:
    entry = installed_regularizer(kind)
    if entry is None:
        return NormPenaltyRegularizer
    found = entry.load()
    if not (isinstance(found, type) and issubclass(found, Regularizer)):
        raise ConfigError(
            f"regularizer.type {kind}: {entry.value} of {package_of(entry)} is no class derived from "
            f"{Regularizer.__module__}.Regularizer"
        )
    return found


def train(
    model: LlavaForConditionalGeneration,
    regularizer: Regularizer | None,
    config: TrainConfig,
    inputs: TrainingInputs,
    seed: int,
    log: Callable[[LogLine], None],
    checkpoints: Checkpoints | None = None,
    stop: Callable[[], bool] = lambda: False,
    after_step: Callable[[str, int], None] = lambda stage, done: None,
) -> None:
    """Train in place through all stages, from the last checkpoint on where there is one.

    Args:
        model: the model at its start (float32); trained in place.
        regularizer: the variant's term, or None.
        config: the recipe.
        inputs: data, processor and cached features.
        seed: decides data order; the model's start was decided by its builder.
        log: receives one dict per logged step.
        checkpoints: where the run's checkpoints lie; None saves none.
        stop: asked in every step whether this process is to end.
        after_step: called in every process with the stage and its steps done; must change nothing.

    Raises:
        TrainingError: a loss or gradient norm is not finite (before the optimiser's step).
        InterruptedRunError: `stop` said so; a checkpoint is written.
        StoreError: a checkpoint can't be written, or is of another run.
    """
    seed_everything(derive_seed("train", seed))
    accelerator = build_accelerator(config)
    shared = Shared(accelerator, Objective(model, regularizer), config, seed, log, checkpoints, stop, after_step)
    found = None if checkpoints is None else _open(checkpoints)
    if found is not None:
        shared.trained.update(found.tensors["weights"])
    folder = None if checkpoints is None else checkpoints.folder.parent
    written = contextlib.nullcontext() if checkpoints is None else contextlib.closing(checkpoints)
    with written, execution(model, config), tracked(log, folder, config) as tracked_log:
        _train_stages(dataclasses.replace(shared, log=tracked_log), inputs, found)
    to_cpu(shared.objective)
    model.eval()


def _train_stages(shared: Shared, inputs: TrainingInputs, found: Checkpoint | None) -> None:
    steps_before = 0
    for name in STAGES:
        stage: StageConfig = getattr(shared.config, name)
        if stage.steps > 0:
            if "vision_tower" in stage.trainable:
                # From here on the tower is no longer the one whose features were cached.
                inputs = dataclasses.replace(inputs, features=None, validation=None)
            if found is None or found.state["stage"] == name:
                Stage(shared, name, steps_before, inputs, found).run()
                found = None
        steps_before += stage.steps


def _open(checkpoints: Checkpoints) -> Checkpoint | None:
    """Return the checkpoint that process 0 chose, in every process."""
    steps = on_main(checkpoints.open)
    return None if steps is None else checkpoints.read(steps)


def build_accelerator(config: TrainConfig) -> Accelerator:
    """Return accelerate's front end for the configured device and precision.

    Raises:
        ConfigError: CUDA was asked for and there is none, or the launcher asks for what prebench does not train with.
    """
    device = choose_device(config.device)
    bf16 = choose_dtype(config.dtype, device) == torch.bfloat16
    join_processes(config.device)
    accelerator = Accelerator(
        cpu=device.type == "cpu", mixed_precision="bf16" if bf16 else "no", fsdp_plugin=sharding_plugin(bf16)
    )
    require_supported(accelerator.distributed_type)
    return accelerator
