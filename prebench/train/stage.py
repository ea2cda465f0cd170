"""One stage of a run: its optimisers, its schedule, its steps, and what of it a checkpoint holds."""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import Tensor, nn
from transformers import get_cosine_schedule_with_warmup

from prebench.data.collator import Batch
from prebench.data.order import data_order
from prebench.errors import InterruptedRunError, TrainingError
from prebench.model.freezing import freeze_for_stage
from prebench.records import content_hash
from prebench.runtime import logger
from prebench.schema import StageConfig, TrainConfig
from prebench.train.batches import MicroBatches, TrainingInputs, optimiser_steps
from prebench.train.checkpoint import Checkpoint, Checkpoints
from prebench.train.log import LogLine
from prebench.train.objective import LossTerms, Objective
from prebench.train.optimizer_state import flatten_state, restore_state
from prebench.train.processes import on_main
from prebench.train.random_state import random_state, restore_random_state
from prebench.train.regularizers.predictive import anchor_statistics
from prebench.train.sharding import (
    computable,
    gathered,
    is_sharded,
    like,
    spread_state,
    whole,
    whole_copy,
)
from prebench.train.validation import Validation

SHOWN_EXAMPLES = 8
"""Ids that an error names."""


@dataclass(frozen=True)
class Shared:
    """What the stages of a run share."""

    accelerator: Accelerator
    objective: Objective
    config: TrainConfig
    seed: int
    log: Callable[[LogLine], None]
    checkpoints: Checkpoints | None
    """None: nothing is saved."""
    stop: Callable[[], bool]
    """Tells whether this process was asked to end."""
    after_step: Callable[[str, int], None] = lambda stage, done: None
    """Called with the stage and its steps done, in every process; changes nothing."""
    trained: set[str] = field(default_factory=set)
    """Parameters that a stage has trained so far; all others are those of the run's start, and in no checkpoint."""


class Stage:
    """A stage, ready to run from its start or from a checkpoint.

    Args:
        shared: what the stages share.
        name: align or instruct.
        steps_before: optimiser steps of the stages before.
        inputs: data, processor and cached features.
        found: a checkpoint of this stage to go on from.
    """

    def __init__(
        self, shared: Shared, name: str, steps_before: int, inputs: TrainingInputs, found: Checkpoint | None
    ) -> None:
        self._shared = shared
        self.name = name
        self.config: StageConfig = getattr(shared.config, name)
        self._steps_before = steps_before
        self._found = found
        objective = shared.objective
        model, regularizer = objective.model, objective.regularizer
        logger.debug("stage %s trains %s", name, freeze_for_stage(model, self.config.trainable))
        shared.trained.update(name for name, p in objective.named_parameters() if p.requires_grad)
        # A norm penalty has no predictor: nothing to optimise or to clip.
        self._predictor = None if regularizer is None else regularizer.learned
        self._optimizers = self._make_optimizers()
        self._schedule = get_cosine_schedule_with_warmup(
            self._optimizers["model"], self.config.warmup_steps, self.config.steps
        )
        order = data_order(inputs.data, self.config, name, shared.seed)
        self._micro_batches = MicroBatches(order, inputs, shared.accelerator)
        self._wrapped = self._wrap(objective)
        self._wrapped.train()
        self._begin(inputs)

    def _wrap(self, objective: Objective) -> nn.Module:
        accelerator = self._shared.accelerator
        if accelerator.num_processes > 1:
            accelerator.free_memory()  # the wrapper of the stage before would still average gradients
        if not accelerator.is_fsdp2:
            wrapped: nn.Module = accelerator.prepare(objective)
            return wrapped
        # Sharding replaces parameters, those in the optimisers, too.
        wrapped, *_ = accelerator.prepare(objective, *self._optimizers.values())
        return wrapped

    def _make_optimizers(self) -> dict[str, torch.optim.Optimizer]:
        config, objective = self.config, self._shared.objective
        model = [p for p in objective.model.parameters() if p.requires_grad]
        made: dict[str, torch.optim.Optimizer] = {
            "model": torch.optim.AdamW(model, lr=config.learning_rate, weight_decay=config.weight_decay)
        }
        if self._predictor is not None and objective.regularizer is not None:
            own = [p for p in objective.regularizer.parameters() if p.requires_grad]
            made["predictor"] = torch.optim.AdamW(own, lr=self._predictor.learning_rate)
        return made

    def _begin(self, inputs: TrainingInputs) -> None:
        """Keep what later steps compare with the stage's start; a run that goes on stands there for a moment."""
        shared = self._shared
        model = shared.objective.model
        projector = model.model.multi_modal_projector
        if self._found is not None:
            self._load(self._found)
            _load_weights(projector, self._found.tensors["stage_start"])
        self._start = {name: whole(tensor.detach()).clone() for name, tensor in projector.state_dict().items()}
        if shared.objective.regularizer is not None:
            shared.objective.regularizer.begin_stage(model)  # after prepare: its copies lie where the model lies
        self._drift = _AnchorDrift(shared.objective, inputs, shared.accelerator.device)
        if self._found is not None:
            self._load(self._found)
        self._validation = None
        # Sharded weights can be used by all processes together alone; else the others have nothing to do meanwhile.
        if shared.config.validate_every and (shared.accelerator.is_main_process or shared.accelerator.is_fsdp2):
            questions = inputs.data.validation(shared.config.validation_images)
            frozen = "vision_tower" not in self.config.trainable
            self._validation = Validation(questions, inputs.processor, frozen, inputs.validation)

    def run(self) -> None:
        """Train to the stage's end.

        Raises:
            TrainingError: a loss or gradient norm is not finite (before the optimiser's step).
            InterruptedRunError: this process was asked to end; a checkpoint is written.
            StoreError: the log or a checkpoint can't be written.
        """
        first = 0 if self._found is None else self._found.state["step"]
        for step, batches in optimiser_steps(self._micro_batches, first, self._restore_random_state):
            started = time.perf_counter()
            line, anchor, stop = self._step(step, batches)
            if step % self._shared.config.log_every == 0 or step == self.config.steps - 1:
                line |= anchor_statistics(anchor) | {"anchor_drift": self._drift()}
                line |= {
                    "batch_hash": content_hash([batch.hash for batch in batches]),
                    "seconds": time.perf_counter() - started,
                }
                if self._shared.accelerator.is_main_process:
                    self._shared.log(line)
            self._validate(step)
            self._shared.after_step(self.name, step + 1)  # before a checkpoint, behind which it would not come again
            self._survive(step + 1, stop)

    def _step(self, step: int, batches: list[Batch]) -> tuple[LogLine, Tensor, bool]:
        """Make one optimiser step; return its log line, h_v^0 of the last micro-batch, and whether to stop."""
        accelerator = self._shared.accelerator
        terms, (targets, images, stop) = self._accumulate(batches)
        norm = self._clip("model", self.config.max_grad_norm)
        predictor_norm = None
        if self._predictor is not None:
            predictor_norm = self._clip("predictor", self._predictor.max_grad_norm)
        line: LogLine = {
            **_losses(accelerator, terms, targets, images),
            "grad_norm": norm,
            "clipped": norm > self.config.max_grad_norm,
            "predictor_grad_norm": predictor_norm,
            "num_targets": targets,
        }
        self._require_finite(line, step, batches, terms)
        for optimizer in self._optimizers.values():
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        line |= {"stage": self.name, "step": step, "steps": self.config.steps}
        line["learning_rate"] = self._schedule.get_last_lr()[0]
        self._schedule.step()
        return line, terms[-1].anchor, stop > 0

    def _clip(self, optimizer: str, limit: float) -> float:
        """Clip the gradients of what an optimiser learns, and return their norm over all processes."""
        parameters = [p for group in self._optimizers[optimizer].param_groups for p in group["params"]]
        return float(whole(self._shared.accelerator.clip_grad_norm_(parameters, limit)))

    def _accumulate(self, batches: list[Batch]) -> tuple[list[LossTerms], tuple[int, int, int]]:
        """Run forward and backward over the micro-batches, normalised by the counts of the global batch.

        Returns:
            The sums of each micro-batch, and of the global batch: target tokens, images, processes asked to end.
        """
        accelerator, wrapped = self._shared.accelerator, self._wrapped
        counts = [sum(b.num_targets for b in batches), sum(len(b.image_ids) for b in batches), int(self._shared.stop())]
        targets, images, stop = accelerator.reduce(torch.tensor(counts, device=accelerator.device), "sum").tolist()
        regularizer = self._shared.objective.regularizer
        weight = regularizer.config.weight if regularizer is not None else 0.0
        spread = is_sharded(wrapped)  # such a model would hold its gradients whole until they are synchronised
        terms = []
        for index, batch in enumerate(batches):
            last = index == len(batches) - 1
            synchronised = contextlib.nullcontext() if last or spread else accelerator.no_sync(wrapped)
            with accelerator.autocast(), synchronised:
                term = wrapped(batch.to(accelerator.device))
                # Processes average their gradients; the factor turns the mean into the global batch's sum.
                loss = term.total(targets, images, weight) * accelerator.num_processes
                accelerator.backward(loss)
            terms.append(term.detached(with_anchor=last))
            del term, loss
        return terms, (targets, images, stop)

    def _require_finite(self, line: LogLine, step: int, batches: list[Batch], terms: list[LossTerms]) -> None:
        for name in ("lm_loss", "pre_loss", "grad_norm", "predictor_grad_norm"):
            value = line[name]
            if value is None or math.isfinite(value):
                continue
            guilty = [batch for batch, term in zip(batches, terms, strict=True) if not _finite(term)]
            # Where every loss is finite and a gradient is not, any micro-batch may be the cause.
            found = gather_object([(b.hash, b.image_ids) for b in guilty]) or gather_object(
                [(b.hash, b.image_ids) for b in batches]
            )
            images = [image for _, ids in found for image in ids]
            shown = ", ".join(images[:SHOWN_EXAMPLES]) + (", ..." if len(images) > SHOWN_EXAMPLES else "")
            raise TrainingError(
                f"{self.name} step {step}: {name} is {value}; stopped before the optimiser's step (batch "
                f"{', '.join(digest for digest, _ in found)}, images {shown}); lower train.{self.name}.learning_rate"
            )

    def _validate(self, step: int) -> None:
        every = self._shared.config.validate_every
        if self._validation is None or not ((step + 1) % every == 0 or step == self.config.steps - 1):
            return
        with self._shared.accelerator.autocast(), computable(self._wrapped):
            found = self._validation(self._shared.objective.model)
        line = {"kind": "validation", "stage": self.name, "step": step, "steps": self.config.steps, **found}
        if self._shared.accelerator.is_main_process:
            self._shared.log(line)

    def _survive(self, done: int, stop: bool) -> None:
        """Save a checkpoint where one is due; end where the process was asked to."""
        checkpoints, every = self._shared.checkpoints, self._shared.config.checkpoint_every
        if checkpoints is None or self._steps_before + done == self._shared.config.total_steps:
            return  # after the last step there is nothing to lose: the export follows
        steps = self._steps_before + done
        if stop or (every and steps % every == 0):
            self._save(checkpoints, steps, done)
        if stop:
            on_main(checkpoints.wait)
            raise InterruptedRunError(
                f"interrupted after step {steps} of {self._shared.config.total_steps}, which is saved; the same "
                "command goes on there"
            )

    def _save(self, checkpoints: Checkpoints, steps: int, done: int) -> None:
        accelerator = self._shared.accelerator
        random_states = gather_object([random_state(accelerator.device)])
        keep = accelerator.is_main_process
        tensors: dict[str, Mapping[str, Tensor]] = {"weights": gathered(self._saved_weights(), keep)}
        tensors["stage_start"] = self._start
        state: dict[str, Any] = {"stage": self.name, "step": done, "schedule": self._schedule.state_dict()}
        for name, optimizer in self._optimizers.items():
            state[f"{name}_optimizer"] = optimizer.state_dict()["param_groups"]
            tensors[f"{name}_optimizer"] = gathered(flatten_state(optimizer), keep)
        tensors |= {f"random_state_{rank}": values for rank, values in enumerate(random_states)}
        on_main(lambda: checkpoints.save(steps, tensors, state))

    def _saved_weights(self) -> dict[str, Tensor]:
        """Return what differs from the run's start: weights trained so far, and all running statistics."""
        objective = self._shared.objective
        weights = {name: p for name, p in objective.named_parameters() if name in self._shared.trained}
        parameters = {name for name, _ in objective.named_parameters(remove_duplicate=False)}
        return weights | {name: value for name, value in objective.state_dict().items() if name not in parameters}

    def _load(self, found: Checkpoint) -> None:
        _load_weights(self._shared.objective, found.tensors["weights"])
        for name, optimizer in self._optimizers.items():
            flat = spread_state(optimizer, found.tensors[f"{name}_optimizer"])
            restore_state(optimizer, flat, found.state[f"{name}_optimizer"])
        self._schedule.load_state_dict(found.state["schedule"])

    def _restore_random_state(self) -> None:
        if self._found is not None:
            accelerator = self._shared.accelerator
            state = self._found.tensors[f"random_state_{accelerator.process_index}"]
            restore_random_state(state, accelerator.device)


def _load_weights(module: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Put saved weights and running statistics into a module, in place; where it is sharded, each process its part."""
    targets = module.state_dict()
    with torch.no_grad():
        for name, value in tensors.items():
            targets[name].copy_(like(targets[name], value))


def _finite(term: LossTerms) -> bool:
    return all(value is None or bool(torch.isfinite(value)) for value in (term.lm_sum, term.pre_sum))


def _losses(accelerator: Accelerator, terms: list[LossTerms], targets: int, images: int) -> LogLine:
    lm_sum = accelerator.reduce(sum(t.lm_sum.detach() for t in terms), reduction="sum")
    line: LogLine = {"lm_loss": lm_sum.item() / max(1, targets), "pre_loss": None}
    if terms[0].pre_sum is not None and images:
        pre_sum = accelerator.reduce(sum(t.pre_sum.detach() for t in terms if t.pre_sum is not None), "sum")
        line["pre_loss"] = pre_sum.item() / max(1, images)
    return line


class _AnchorDrift:
    """Mean cosine between today's h_v^0 and that of the stage's start, on a few fixed images."""

    def __init__(self, objective: Objective, inputs: TrainingInputs, device: torch.device) -> None:
        self._projector = objective.model.model.multi_modal_projector
        self._features = None
        if inputs.features is not None:
            self._features = inputs.features.get(inputs.data.image_ids[:8]).to(device)
        self._start = self._project()

    @torch.no_grad()
    def _project(self) -> Tensor | None:
        if self._features is None:
            return None
        projector = whole_copy(self._projector) if is_sharded(self._projector) else self._projector
        return projector(self._features).float()

    def __call__(self) -> float | None:
        now = self._project()
        if now is None or self._start is None:
            return None
        return torch.nn.functional.cosine_similarity(now, self._start, dim=-1).mean().item()
