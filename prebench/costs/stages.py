"""What training a preset costs: parameters, memory of one process, operations and hours. Nothing is loaded or computed.

The formulas are those of `prebench.costs.formulas`; docs/presets.md states them with their sources. Bytes are bytes,
and GB are 10^9 of them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

import torch
from transformers import AutoConfig, LlavaConfig, LlavaForConditionalGeneration

from prebench.costs import formulas
from prebench.costs.formulas import FLOAT, MicroBatch, Setup, Work
from prebench.costs.lengths import Lengths
from prebench.errors import ConfigError, ModelError, first_line
from prebench.model.builder import build_tokenizer, text_config, vision_config
from prebench.model.freezing import PARTS, freeze_for_stage, part_modules
from prebench.model.published import padded_vocabulary, shape_config
from prebench.schema import STAGES, ModelConfig, PresetConfig, RegularizerConfig, StageConfig, layer_names

PREDICTOR = "predictor"
ADAM = 8
"""Bytes per trained weight: two float32 averages."""

Sharding = Literal["ddp", "fsdp"]


@dataclass(frozen=True)
class Machine:
    """What trains, and how the model lies on it."""

    processes: int
    sharding: Sharding = "ddp"
    half: bool = True
    """bfloat16 autocast."""
    cuda: bool = True
    """PyTorch updates weights in groups there, which takes one more float32 tensor per trained weight for a moment."""
    speed: float | None = None
    """Operations per second that one process reaches; None: no hours."""


@dataclass(frozen=True)
class Counts:
    """Parameters by part, and how many of them learn."""

    total: Mapping[str, int]
    trained: Mapping[str, int]


@dataclass(frozen=True)
class Memory:
    """Bytes of one process while a micro-batch of the longest examples is trained on."""

    weights: float
    """float32, frozen ones and the predictor included."""
    half_weights: float
    """bfloat16 copies of matrices; with fsdp what is gathered for a moment."""
    gradients: float
    optimizer: float
    buckets: float
    """Of DDP, in which gradients travel."""
    log: float
    """h_v^0 of a micro-batch and the projector at the stage's start, kept for the log."""
    activations: float
    """What autograd keeps of tower, projector, decoder and regularizer."""
    logits: float
    """Kept log-probabilities."""
    moments: Mapping[str, float]
    """Bytes in all at the moments at which most is needed."""

    @property
    def peak(self) -> float:
        """Return the bytes at the worst moment."""
        return max(self.moments.values())

    @property
    def worst(self) -> str:
        """Return the name of the worst moment."""
        return max(self.moments, key=lambda name: self.moments[name])


@dataclass(frozen=True)
class StageCost:
    """What a stage costs."""

    name: str
    steps: int
    batch_size: int
    accumulation: int
    micro_batch: int
    """Examples that a process computes at once."""
    lengths: Lengths
    cached_features: bool
    counts: Counts
    work: Mapping[str, Work]
    """Operations of the whole stage, by part."""
    memory: Memory
    seconds: float | None

    @property
    def operations(self) -> float:
        """Return the operations of all parts."""
        return sum(work.total for work in self.work.values())


def vocabulary(config: ModelConfig, num_tokens: int | None) -> int:
    """Return the rows of the embeddings in training.

    Args:
        config: the preset's model.
        num_tokens: of the tokenizer with the image token; None: rows are added for it as if there were none to spare.
    """
    if not config.language_model.has_own_tokenizer:
        return len(build_tokenizer())
    rows = config.language_model.vocab_size
    assert rows is not None, "the schema asks for it"
    return padded_vocabulary(rows, rows + 1 if num_tokens is None else num_tokens)


def shape_model(config: ModelConfig, rows: int, device: str = "meta") -> LlavaForConditionalGeneration:
    """Return a model of the preset's shape with `rows` embeddings; on the meta device it has no weights."""
    language = config.language_model
    text: Any = shape_config(language) if language.has_own_tokenizer else text_config(language, build_tokenizer())
    text.vocab_size = rows
    with torch.device(device):
        return LlavaForConditionalGeneration(
            LlavaConfig(
                vision_config=vision_config(config.vision_tower),
                text_config=text,
                image_token_index=rows - 1,
                vision_feature_layer=config.vision_tower.feature_layer,
                vision_feature_select_strategy="default" if config.vision_tower.architecture == "clip" else "full",
                tie_word_embeddings=language.tie_word_embeddings,
            )
        )


@lru_cache(maxsize=16)
def model_counts(config: ModelConfig, rows: int, trainable: tuple[str, ...]) -> Counts:
    """Return the model's parameters by part, and how many of them learn where `trainable` parts do."""
    model = shape_model(config, rows)
    freeze_for_stage(model, trainable)
    total, trained = {}, {}
    for part in PARTS:
        modules = part_modules(model, part)
        parameters = {id(p): p for module in modules for p in module.parameters()}.values()  # tied ones count once
        total[part] = sum(p.numel() for p in parameters)
        trained[part] = sum(p.numel() for p in parameters if p.requires_grad)
    return Counts(total, trained)


def stage_counts(setup: Setup) -> Counts:
    """Return the parameters of a stage by part, the predictor included."""
    model = model_counts(setup.model, setup.vocabulary, tuple(sorted(setup.trainable)))
    predictor = {PREDICTOR: predictor_parameters(setup)}
    return Counts({**model.total, **predictor}, {**model.trained, **predictor})


def predictor_parameters(setup: Setup) -> int:
    """Return the predictors' weights and biases, over all regularised layers; 0 without a predictor."""
    block = setup.predictive
    if block is None:
        return 0
    width = block.hidden_size or setup.model.language_model.hidden_size
    return formulas.predictor_matrices(setup) + len(layer_names(block.layer)) * (width + setup.anchor_size)


def external_width(folder: Path) -> int:
    """Return the width of an external anchor's features: that of the model's last hidden state.

    Raises:
        ModelError: the folder's config.json can't be read.
    """
    try:
        found = AutoConfig.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
    except (OSError, ValueError, KeyError) as error:
        raise ModelError(f"{folder}: config.json can't be read ({first_line(error)})") from error
    vision = getattr(found, "vision_config", found)
    sizes = getattr(vision, "hidden_sizes", None) or [getattr(vision, "hidden_size", None)]
    if not isinstance(sizes[-1], int):
        raise ModelError(f"{folder}/config.json: names no hidden_size")
    return sizes[-1]


def stage_costs(
    preset: PresetConfig,
    regularizer: RegularizerConfig | None,
    machine: Machine,
    lengths: Mapping[str, Lengths],
    rows: int,
    anchor_size: int | None = None,
) -> list[StageCost]:
    """Return what every stage that has steps costs.

    Args:
        preset: model, data and recipe.
        regularizer: the variant's block.
        machine: what trains.
        lengths: of the examples, by stage.
        rows: of the embeddings (`vocabulary`).
        anchor_size: width of an external anchor; the others' are known.

    Raises:
        ConfigError: a stage's batch can't be shared out among the processes.
    """
    found = []
    tower_moved = False
    for name in STAGES:
        stage: StageConfig = getattr(preset.train, name)
        if not stage.steps:
            continue
        tower_moved |= "vision_tower" in stage.trainable
        cached = preset.train.cache_vision_features and preset.model.vision_tower.pretrained is not None
        setup = Setup(
            model=preset.model,
            vocabulary=rows,
            trainable=frozenset(stage.trainable),
            cached_features=cached and not tower_moved,
            checkpointing=preset.train.gradient_checkpointing,
            half=machine.half,
            regularizer=regularizer,
            anchor_size=_anchor_size(preset.model, regularizer, anchor_size),
        )
        found.append(_stage_cost(name, stage, setup, machine, lengths[name]))
    return found


def _anchor_size(model: ModelConfig, regularizer: RegularizerConfig | None, external: int | None) -> int:
    anchor = getattr(regularizer, "anchor", "")
    if anchor == "external":
        assert external is not None, "whoever asks reads the external model's width"
        return external
    return model.vision_tower.hidden_size if anchor == "pre_projector" else model.language_model.hidden_size


def _stage_cost(name: str, stage: StageConfig, setup: Setup, machine: Machine, lengths: Lengths) -> StageCost:
    parts = stage.gradient_accumulation_steps * machine.processes
    if stage.batch_size % parts:
        raise ConfigError(
            f"train.{name}.batch_size {stage.batch_size} is no multiple of gradient_accumulation_steps x processes = "
            f"{parts}; change --gpus or --set train.{name}.gradient_accumulation_steps"
        )
    size = stage.batch_size // parts
    counts = stage_counts(setup)
    mean = MicroBatch(size, lengths.tokens, size * lengths.pictures, size * lengths.targets)
    longest = MicroBatch(size, lengths.longest, size * lengths.most_pictures, size * lengths.most_targets)
    micro_batches = stage.steps * parts
    work = {part: each.times(micro_batches) for part, each in formulas.operations(setup, mean).items()}
    total = sum(each.total for each in work.values())
    return StageCost(
        name=name,
        steps=stage.steps,
        batch_size=stage.batch_size,
        accumulation=stage.gradient_accumulation_steps,
        micro_batch=size,
        lengths=lengths,
        cached_features=setup.cached_features,
        counts=counts,
        work=work,
        memory=memory(setup, counts, machine, longest, stage.gradient_accumulation_steps),
        seconds=None if machine.speed is None else total / (machine.speed * machine.processes),
    )


def memory(setup: Setup, counts: Counts, machine: Machine, micro: MicroBatch, accumulation: int) -> Memory:
    """Return what a process needs for a micro-batch, and at which moment most.

    Args:
        setup: how the stage trains.
        counts: its parameters.
        machine: what trains.
        micro: the longest micro-batch.
        accumulation: micro-batches of a step.
    """
    shards = machine.processes if machine.sharding == "fsdp" else 1
    trained = FLOAT * sum(counts.trained.values())
    weights, gradients = FLOAT * sum(counts.total.values()) / shards, trained / shards
    optimizer = ADAM * sum(counts.trained.values()) / shards
    buckets = trained if machine.sharding == "ddp" and machine.processes > 1 else 0.0
    half = _gathered(setup, counts) if shards > 1 else formulas.half_weight_bytes(setup)
    size = setup.model.language_model.hidden_size
    anchors = FLOAT * size * micro.pictures * setup.model.vision_tower.num_tokens
    projector = FLOAT * counts.total[formulas.PROJECTOR]
    copies = 1 + (setup.predictive is not None and setup.predictive.anchor == "frozen_copy")
    log = anchors + copies * projector
    activations = formulas.decoder_bytes(setup, micro) + formulas.tower_bytes(setup, micro)
    activations += formulas.projector_bytes(setup, micro) + formulas.regularizer_bytes(setup, micro)
    logits = formulas.kept_logits_bytes(setup, micro)

    base = weights + optimizer + buckets + log
    head = FLOAT * size * setup.vocabulary * setup.language_learns / shards
    before = gradients if accumulation > 1 else head  # at the first micro-batch the head's gradient comes first
    last_layer = 0.0 if setup.checkpointing else formulas.decoder_layer_bytes(setup, micro)
    passing = formulas.passing_layer_bytes(setup, micro)
    start = max(formulas.passing_logits_bytes(setup, micro), passing)
    moments = {
        "vision tower's forward pass": base + before + formulas.frozen_tower_bytes(setup, micro),
        "start of the backward pass": base + half + before + activations + logits + start,
        "end of the backward pass": base + half + gradients + last_layer + passing,
        "optimiser's step": base + gradients + (gradients if machine.cuda else 0),
    }
    return Memory(weights, half, gradients, optimizer, buckets, log, activations, logits, moments)


def _gathered(setup: Setup, counts: Counts) -> float:
    """Return what fsdp holds whole for a moment: two decoder layers, and what lies outside the layers.

    The latter's gradients are whole, too, in the operands' precision and in float32, in which they are summed up.
    """
    layer = formulas.layer_matrices(setup.model)
    layers = setup.model.language_model.num_hidden_layers * layer
    outside = {part: number for part, number in counts.total.items() if part != formulas.TOWER}
    learning = sum(counts.trained[part] for part in outside) - layers * setup.language_learns
    return setup.width * (2 * layer + sum(outside.values()) - layers) + (setup.width + FLOAT) * learning
