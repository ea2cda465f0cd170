"""The training loop: one explicit loop on accelerate for every variant, stage after stage.

Input: a run's configuration and the study's training data. Output: the trained model and `train.jsonl`. The only thing
that differs between two variants is the regularizer block that `build_regularizer` reads.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from transformers import LlavaForConditionalGeneration, get_cosine_schedule_with_warmup

from prebench.data.collator import Batch, ExampleOrder, encode_example, pad
from prebench.data.examples import TrainingData
from prebench.errors import TrainingError
from prebench.model.freezing import freeze_for_stage
from prebench.model.visual_states import num_layers
from prebench.records import content_hash
from prebench.runtime import choose_device, choose_dtype, derive_seed, logger, seed_everything
from prebench.schema import NormPenaltyConfig, RegularizerConfig, StageConfig, TrainConfig
from prebench.train.features import FeatureCache
from prebench.train.objective import LossTerms, Objective
from prebench.train.regularizers.base import Regularizer
from prebench.train.regularizers.norm_penalty import NormPenaltyRegularizer
from prebench.train.regularizers.predictive import PredictiveRegularizer, anchor_statistics
from prebench.train.validation import Validation

STAGES = ("align", "instruct")

LogLine = dict[str, Any]


@dataclass(frozen=True)
class TrainingInputs:
    """What every run of a study shares."""

    data: TrainingData
    processor: Any
    features: FeatureCache | None
    """The frozen tower's outputs; None computes them in every step."""
    external: Mapping[str, FeatureCache] = field(default_factory=dict)
    """Features of external anchors, by `anchor_model`."""


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
        seed: decides the predictors' initial weights.
        external: features of external anchors, by `anchor_model`.
    """
    if config is None:
        return None
    if isinstance(config, NormPenaltyConfig):
        return NormPenaltyRegularizer(config, depth=num_layers(model))
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


def train(
    model: LlavaForConditionalGeneration,
    regularizer: Regularizer | None,
    config: TrainConfig,
    inputs: TrainingInputs,
    seed: int,
    log: Callable[[LogLine], None],
) -> None:
    """Train in place through all stages.

    Args:
        model: the model at its start (float32); trained in place.
        regularizer: the variant's term, or None.
        config: the recipe.
        inputs: data, processor and cached features.
        seed: decides data order; the model's start was decided by its builder.
        log: receives one dict per logged step.

    Raises:
        TrainingError: a loss or gradient norm is not finite (before the optimiser's step).
    """
    seed_everything(derive_seed("train", seed))
    accelerator = build_accelerator(config)
    objective = Objective(model, regularizer)
    for name in STAGES:
        stage: StageConfig = getattr(config, name)
        if stage.steps > 0:
            if "vision_tower" in stage.trainable:
                # From here on the tower is no longer the one whose features were cached.
                inputs = dataclasses.replace(inputs, features=None)
            _train_stage(accelerator, objective, stage, name, config, inputs, seed, log)
    model.to("cpu")
    model.eval()


def build_accelerator(config: TrainConfig) -> Accelerator:
    """Return accelerate's front end for the configured device and precision.

    Raises:
        ConfigError: CUDA was asked for and there is none.
    """
    device = choose_device(config.device)
    bf16 = choose_dtype(config.dtype, device) == torch.bfloat16
    return Accelerator(cpu=device.type == "cpu", mixed_precision="bf16" if bf16 else "no")


class _MicroBatches(Dataset[Batch]):
    """The micro-batches of one process, in order: item k is accumulation part k % A of optimiser step k // A.

    The examples of a step are sorted by length before they are shared out, so that little is padded; `by_length` false
    leaves them as they were drawn. Over a whole step both are the same examples.
    """

    def __init__(
        self, order: ExampleOrder, inputs: TrainingInputs, accelerator: Accelerator, by_length: bool = True
    ) -> None:
        self.order = order
        self.inputs = inputs
        stage = order.stage
        parts = stage.gradient_accumulation_steps * accelerator.num_processes
        if stage.batch_size % parts:
            raise TrainingError(
                f"batch_size {stage.batch_size} is no multiple of accumulation steps x processes = {parts}"
            )
        self._size = stage.batch_size // parts
        self._rank = accelerator.process_index
        self._processes = accelerator.num_processes
        size = inputs.processor.image_processor.size["height"] // inputs.processor.patch_size
        self._num_image_tokens = size * size
        self._by_length = by_length
        self._step = -1
        self._encoded: list[tuple[str, tuple[list[int], list[int]]]] = []

    def __len__(self) -> int:
        return self.order.stage.steps * self.order.stage.gradient_accumulation_steps

    def __getitem__(self, index: int) -> Batch:
        step, part = divmod(index, self.order.stage.gradient_accumulation_steps)
        if step != self._step:
            self._step, self._encoded = step, self._encode(step)
        first = (part * self._processes + self._rank) * self._size
        return self._collate(self._encoded[first : first + self._size])

    def _encode(self, step: int) -> list[tuple[str, tuple[list[int], list[int]]]]:
        """Return (image_id, (input_ids, labels)) of a step's examples, in the order in which they are shared out."""
        processor = self.inputs.processor
        examples = self.order.batch(step)
        encoded = [(e.image_id, encode_example(processor, e.messages, self._num_image_tokens)) for e in examples]
        return sorted(encoded, key=lambda item: len(item[1][0])) if self._by_length else encoded

    def _collate(self, encoded: list[tuple[str, tuple[list[int], list[int]]]]) -> Batch:
        processor = self.inputs.processor
        input_ids, attention_mask, labels = pad([item for _, item in encoded], processor.tokenizer.pad_token_id)
        image_ids = tuple(image_id for image_id, _ in encoded)
        features = pixel_values = None
        if self.inputs.features is not None:
            features = self.inputs.features.get(image_ids)
        else:
            images = [self.inputs.data.image(i) for i in image_ids]
            pixel_values = processor.image_processor(images, return_tensors="pt")["pixel_values"]
        return Batch(input_ids, attention_mask, labels, image_ids, pixel_values, features)


def _train_stage(
    accelerator: Accelerator,
    objective: Objective,
    stage: StageConfig,
    name: str,
    config: TrainConfig,
    inputs: TrainingInputs,
    seed: int,
    log: Callable[[LogLine], None],
) -> None:
    model, regularizer = objective.model, objective.regularizer
    trainable = freeze_for_stage(model, stage.trainable)
    logger.debug("stage %s trains %s", name, trainable)
    by_length = regularizer is None or not regularizer.random_neighbours
    micro_batches = _MicroBatches(ExampleOrder(inputs.data, stage, name, seed), inputs, accelerator, by_length)
    model_parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(model_parameters, lr=stage.learning_rate, weight_decay=stage.weight_decay)
    schedule = get_cosine_schedule_with_warmup(optimizer, stage.warmup_steps, stage.steps)
    # A norm penalty has no predictor: nothing to optimise or to clip.
    predictor = regularizer if isinstance(regularizer, PredictiveRegularizer) else None
    predictor_parameters = list(predictor.parameters()) if predictor is not None else []
    predictor_optimizer = None
    if predictor is not None:
        predictor_optimizer = torch.optim.AdamW(predictor_parameters, lr=predictor.config.learning_rate)
    wrapped = accelerator.prepare(objective)
    wrapped.train()
    if regularizer is not None:
        regularizer.begin_stage(model)  # after prepare: a frozen copy lies on the device where the model lies
    drift = _AnchorDrift(objective, inputs, accelerator.device)
    validation = None
    if config.validate_every and accelerator.is_main_process:
        questions = inputs.data.validation(config.validation_images)
        validation = Validation(questions, inputs.processor, frozen="vision_tower" not in stage.trainable)
    steps = _optimiser_steps(micro_batches, stage.gradient_accumulation_steps)
    for step, batches in enumerate(steps):
        started = time.perf_counter()
        terms, counts = _accumulate(accelerator, wrapped, batches, regularizer)
        norm = accelerator.clip_grad_norm_(model_parameters, stage.max_grad_norm)
        predictor_norm = None
        if predictor is not None:
            predictor_norm = accelerator.clip_grad_norm_(predictor_parameters, predictor.config.max_grad_norm)
        line = _log_line(accelerator, terms, counts, norm, predictor_norm, stage)
        _require_finite(line, name, step, batches)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if predictor_optimizer is not None:
            predictor_optimizer.step()
            predictor_optimizer.zero_grad(set_to_none=True)
        learning_rate = schedule.get_last_lr()[0]
        schedule.step()
        if step % config.log_every == 0 or step == stage.steps - 1:
            line |= {"stage": name, "step": step, "steps": stage.steps, "learning_rate": learning_rate}
            line |= anchor_statistics(terms[-1].anchor) | {"anchor_drift": drift()}
            line |= {
                "batch_hash": content_hash([batch.hash for batch in batches]),
                "seconds": time.perf_counter() - started,
            }
            if accelerator.is_main_process:
                log(line)
        if validation is not None and ((step + 1) % config.validate_every == 0 or step == stage.steps - 1):
            with accelerator.autocast():
                found = validation(model)
            log({"kind": "validation", "stage": name, "step": step, "steps": stage.steps, **found})


def _optimiser_steps(micro_batches: _MicroBatches, accumulation: int) -> Iterator[list[Batch]]:
    group: list[Batch] = []
    for batch in DataLoader(micro_batches, batch_size=None, shuffle=False):
        group.append(batch)
        if len(group) == accumulation:
            yield group
            group = []


def _accumulate(
    accelerator: Accelerator,
    wrapped: Any,
    batches: list[Batch],
    regularizer: Regularizer | None,
) -> tuple[list[LossTerms], tuple[int, int]]:
    """Run forward and backward over the micro-batches, normalised by the counts of the global batch."""
    local = torch.tensor(
        [sum(b.num_targets for b in batches), sum(len(b.image_ids) for b in batches)], device=accelerator.device
    )
    targets, images = accelerator.reduce(local, reduction="sum").tolist()
    weight = regularizer.config.weight if regularizer is not None else 0.0
    terms = []
    for index, batch in enumerate(batches):
        last = index == len(batches) - 1
        with accelerator.autocast(), _maybe_no_sync(accelerator, wrapped, last):
            term = wrapped(batch.to(accelerator.device))
            # Processes average their gradients; the factor turns the mean into the global batch's sum.
            loss = term.total(targets, images, weight) * accelerator.num_processes
            accelerator.backward(loss)
        terms.append(term)
    return terms, (targets, images)


def _maybe_no_sync(accelerator: Accelerator, wrapped: Any, last: bool) -> Any:
    import contextlib

    return contextlib.nullcontext() if last else accelerator.no_sync(wrapped)


def _log_line(
    accelerator: Accelerator,
    terms: list[LossTerms],
    counts: tuple[int, int],
    norm: Tensor,
    predictor_norm: Tensor | None,
    stage: StageConfig,
) -> LogLine:
    targets, images = counts
    lm_sum = accelerator.reduce(sum(t.lm_sum.detach() for t in terms), reduction="sum")
    line: LogLine = {
        "lm_loss": lm_sum.item() / max(1, targets),
        "pre_loss": None,
        "grad_norm": float(norm),
        "clipped": float(norm) > stage.max_grad_norm,
        "predictor_grad_norm": None if predictor_norm is None else float(predictor_norm),
        "num_targets": targets,
    }
    if terms[0].pre_sum is not None:
        pre_sum = accelerator.reduce(sum(t.pre_sum.detach() for t in terms if t.pre_sum is not None), "sum")
        line["pre_loss"] = pre_sum.item() / max(1, images)
    return line


def _require_finite(line: LogLine, stage: str, step: int, batches: list[Batch]) -> None:
    for name in ("lm_loss", "pre_loss", "grad_norm", "predictor_grad_norm"):
        value = line[name]
        if value is not None and not torch.isfinite(torch.tensor(value)):
            images = ", ".join(batches[-1].image_ids[:4])
            raise TrainingError(
                f"{stage} step {step}: {name} is {value}; stopped before the optimiser's step (batch "
                f"{batches[-1].hash}, images {images}, ...); lower train.{stage}.learning_rate"
            )


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
        return None if self._features is None else self._projector(self._features).float()

    def __call__(self) -> float | None:
        now = self._project()
        if now is None or self._start is None:
            return None
        return torch.nn.functional.cosine_similarity(now, self._start, dim=-1).mean().item()
