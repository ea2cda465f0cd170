"""What a training step computes and keeps, by formula: operations and bytes of every part of the model.

Everything is counted for the code that trains here: float32 weights under autocast, decoder layers without a mask, a
language-model head on target positions alone. docs/presets.md states the formulas; the tests compare them with
`FlopCounterMode` and with the tensors that autograd keeps in real steps.

Symbols: b examples of a micro-batch, T tokens each, S = b T, n target tokens, P pictures of N patches, M = P N visual
tokens; D, I, H, V the language model's width, MLP width, heads and vocabulary; w bytes of a matrix product's operand
(2 in bfloat16, 4 in float32).
"""

from __future__ import annotations

from dataclasses import dataclass

from prebench.schema import (
    LanguageModelConfig,
    ModelConfig,
    NormPenaltyConfig,
    PredictiveConfig,
    RegularizerConfig,
    layer_names,
)

TOWER, PROJECTOR, LANGUAGE_MODEL = "vision_tower", "multi_modal_projector", "language_model"
FLOAT = 4
"""Bytes of what autocast leaves in float32: weights, the residual stream, norms and losses."""


@dataclass(frozen=True)
class MicroBatch:
    """What one process computes at once."""

    examples: int
    tokens: float
    """T, of an example, visual tokens included."""
    pictures: float
    """P, of all examples together."""
    targets: float
    """n, of all examples together."""


@dataclass(frozen=True)
class Setup:
    """How a stage trains."""

    model: ModelConfig
    vocabulary: int
    """V, the image token's rows included."""
    trainable: frozenset[str]
    cached_features: bool
    """The tower's output is read, not computed."""
    checkpointing: bool
    half: bool
    """Matrix products in bfloat16 (autocast)."""
    regularizer: RegularizerConfig | None
    anchor_size: int
    """Width of what the predictor predicts."""

    @property
    def width(self) -> int:
        """Return w, the bytes of a matrix product's operand."""
        return 2 if self.half else FLOAT

    @property
    def predictive(self) -> PredictiveConfig | None:
        """Return the regularizer's block where it has a predictor."""
        return self.regularizer if isinstance(self.regularizer, PredictiveConfig) else None

    @property
    def tower_learns(self) -> bool:
        """Tell whether the vision tower is trained."""
        return TOWER in self.trainable

    @property
    def language_learns(self) -> bool:
        """Tell whether the language model is trained."""
        return LANGUAGE_MODEL in self.trainable


@dataclass(frozen=True)
class Work:
    """Floating-point operations, two for a multiplication and its addition."""

    forward: float = 0.0
    backward: float = 0.0
    again: float = 0.0
    """Of the forward pass that activation checkpointing repeats."""

    @property
    def total(self) -> float:
        """Return all of them."""
        return self.forward + self.backward + self.again

    def times(self, factor: float) -> Work:
        """Return so many of these."""
        return Work(self.forward * factor, self.backward * factor, self.again * factor)


def _key_width(lm: LanguageModelConfig) -> int:
    """Return K, the width of all keys of a token, and of its values."""
    return (lm.num_key_value_heads or lm.num_attention_heads) * (lm.hidden_size // lm.num_attention_heads)


def layer_matrices(model: ModelConfig) -> int:
    """Return the weights of a decoder layer's seven matrices."""
    lm = model.language_model
    keys = _key_width(lm)
    return lm.hidden_size * (2 * lm.hidden_size + 2 * keys + 3 * lm.intermediate_size)


def tower_layer_matrices(model: ModelConfig) -> int:
    """Return the weights of a tower layer's six matrices."""
    tower = model.vision_tower
    return tower.hidden_size * (4 * tower.hidden_size + 2 * tower.intermediate_size)


def projector_matrices(model: ModelConfig) -> int:
    """Return the weights of the projector's two matrices."""
    return model.language_model.hidden_size * (model.vision_tower.hidden_size + model.language_model.hidden_size)


def predictor_matrices(setup: Setup) -> int:
    """Return the weights of the predictors' matrices, over all regularised layers; 0 without a predictor."""
    block = setup.predictive
    if block is None:
        return 0
    size = setup.model.language_model.hidden_size
    return len(layer_names(block.layer)) * (block.hidden_size or size) * (size + setup.anchor_size)


def tower_tokens(model: ModelConfig) -> int:
    """Return the tokens inside the tower per picture: CLIP has a class token."""
    return model.vision_tower.num_tokens + (model.vision_tower.architecture == "clip")


def used_tower_layers(model: ModelConfig) -> int:
    """Return how many tower layers lie before the hidden state that the projector reads."""
    return model.vision_tower.num_hidden_layers + model.vision_tower.feature_layer + 1


def operations(setup: Setup, micro: MicroBatch) -> dict[str, Work]:
    """Return the work of a micro-batch, by part.

    Norms, activations, the optimiser and other element-wise work are left out; attention counts the whole T x T square,
    and its backward pass twice the forward one (fused kernels that compute scores again do half as much more).
    """
    return {
        "vision tower": _tower_work(setup, micro),
        "projector": _projector_work(setup, micro),
        "language model": _decoder_work(setup, micro),
        "LM head": _head_work(setup, micro),
        "regularizer": _regularizer_work(setup, micro),
    }


def _tower_work(setup: Setup, micro: MicroBatch) -> Work:
    if setup.cached_features:
        return Work()
    tower = setup.model.vision_tower
    tokens = tower_tokens(setup.model)
    patches = 2 * tower.num_tokens * 3 * tower.patch_size**2 * tower.hidden_size
    linear = 2 * tokens * tower_layer_matrices(setup.model)
    attention = 4 * tokens**2 * tower.hidden_size
    forward = patches + tower.num_hidden_layers * (linear + attention)
    if not setup.tower_learns:
        return Work(forward).times(micro.pictures)
    used = used_tower_layers(setup.model)
    # The repetition ends before a layer's last matrix: nothing behind it is kept.
    repeated = linear + attention - 2 * tokens * tower.hidden_size * tower.intermediate_size
    again = used * repeated if setup.checkpointing else 0
    return Work(forward, patches + used * 2 * (linear + attention), again).times(micro.pictures)


def _projector_work(setup: Setup, micro: MicroBatch) -> Work:
    size = setup.model.language_model.hidden_size
    first = 2 * setup.model.vision_tower.hidden_size * size
    second = 2 * size * size
    learns = PROJECTOR in setup.trainable
    backward = (first + second) * learns + second * (learns or setup.tower_learns) + first * setup.tower_learns
    return Work(first + second, backward).times(micro.pictures * setup.model.vision_tower.num_tokens)


def _decoder_work(setup: Setup, micro: MicroBatch) -> Work:
    lm = setup.model.language_model
    tokens = micro.examples * micro.tokens
    linear = 2 * tokens * layer_matrices(setup.model)
    attention = 4 * tokens * micro.tokens * lm.hidden_size
    repeated = linear + attention - 2 * tokens * lm.hidden_size * lm.intermediate_size
    backward = linear * (1 + setup.language_learns) + 2 * attention
    work = Work(linear + attention, backward, repeated if setup.checkpointing else 0)
    return work.times(lm.num_hidden_layers)


def _head_work(setup: Setup, micro: MicroBatch) -> Work:
    forward = 2 * micro.targets * setup.model.language_model.hidden_size * setup.vocabulary
    return Work(forward, forward * (1 + setup.language_learns))


def _regularizer_work(setup: Setup, micro: MicroBatch) -> Work:
    block = setup.predictive
    if block is None:
        return Work()
    size = setup.model.language_model.hidden_size
    width = block.hidden_size or size
    rows = _predicted_rows(setup, micro)
    first, second = 2 * size * width, 2 * width * setup.anchor_size
    work = Work(first + second, first * (1 + (block.weight > 0)) + 2 * second)
    work = work.times(rows * len(layer_names(block.layer)))
    if block.anchor == "frozen_copy":
        visual = micro.pictures * setup.model.vision_tower.num_tokens
        work = Work(work.forward + 2 * visual * projector_matrices(setup.model), work.backward)
    return work


def _predicted_rows(setup: Setup, micro: MicroBatch) -> float:
    assert setup.predictive is not None
    return micro.pictures * (setup.model.vision_tower.num_tokens if setup.predictive.level == "patch" else 1)


def decoder_layer_bytes(setup: Setup, micro: MicroBatch) -> float:
    """Return what autograd keeps of one decoder layer, without copies of weights.

    Both norms: the residual stream (float32), a scale per token and, where their weights learn, the normed tokens.
    Attention: queries, keys and values of their own heads, output, log-sum-exp. MLP: gate, its activation and the up
    projection. Where the matrices learn, also their inputs (autocast casts one anew for every matrix; the attention's
    outputs of all sequences are copied into one row).
    """
    lm, w = setup.model.language_model, setup.width
    size, inner = lm.hidden_size, lm.intermediate_size
    per_token = (
        2 * (FLOAT * size + FLOAT) + 2 * w * (size + _key_width(lm)) + FLOAT * lm.num_attention_heads + 3 * w * inner
    )
    if setup.language_learns:
        inputs = 6 if setup.half else 3
        per_token += 2 * FLOAT * size + inputs * w * size + w * inner
    return micro.examples * micro.tokens * per_token


def decoder_bytes(setup: Setup, micro: MicroBatch) -> float:
    """Return what autograd keeps of the decoder: all of each layer, or its input alone; and the final norm."""
    lm = setup.model.language_model
    stream = FLOAT * lm.hidden_size * micro.examples * micro.tokens
    each = stream if setup.checkpointing else decoder_layer_bytes(setup, micro)
    return lm.num_hidden_layers * each + stream * (1 + setup.language_learns)


def tower_layer_bytes(setup: Setup, micro: MicroBatch) -> float:
    """Return what autograd keeps of one layer of a tower that learns."""
    tower, w = setup.model.vision_tower, setup.width
    size, inner = tower.hidden_size, tower.intermediate_size
    inputs = 4 if setup.half else 2
    activation = 2 if tower.architecture == "clip" else 1  # CLIP's quick GELU keeps its sigmoid, too
    per_token = 2 * (FLOAT * size + 8) + (inputs + 4) * w * size + FLOAT * tower.num_attention_heads
    per_token += (activation + 1) * w * inner
    return micro.pictures * tower_tokens(setup.model) * per_token


def tower_bytes(setup: Setup, micro: MicroBatch) -> float:
    """Return what autograd keeps of the tower; 0 where it is frozen."""
    if not setup.tower_learns:
        return 0.0
    tower = setup.model.vision_tower
    stream = FLOAT * tower.hidden_size * micro.pictures * tower_tokens(setup.model)
    each = stream if setup.checkpointing else tower_layer_bytes(setup, micro)
    pixels = setup.width * 3 * tower.image_size**2 * micro.pictures
    return used_tower_layers(setup.model) * each + pixels + stream * (tower.architecture == "clip")


def frozen_tower_bytes(setup: Setup, micro: MicroBatch) -> float:
    """Return the most that the forward pass of a frozen tower holds: the hidden states of all layers."""
    if setup.tower_learns or setup.cached_features:
        return 0.0
    tower = setup.model.vision_tower
    tokens = micro.pictures * tower_tokens(setup.model)
    states = (tower.num_hidden_layers + 1) * FLOAT * tower.hidden_size
    return tokens * (states + 2 * setup.width * tower.intermediate_size)


def projector_bytes(setup: Setup, micro: MicroBatch) -> float:
    """Return what autograd keeps of the projector."""
    size = setup.model.language_model.hidden_size
    learns = PROJECTOR in setup.trainable
    per_token = size * (learns or setup.tower_learns) + (setup.model.vision_tower.hidden_size + size) * learns
    return micro.pictures * setup.model.vision_tower.num_tokens * setup.width * per_token


def regularizer_bytes(setup: Setup, micro: MicroBatch) -> float:
    """Return what autograd keeps of the regularizer: the predictors' inputs, and prediction and anchor in float32.

    Of a type of another package nothing is known.
    """
    block, size = setup.regularizer, setup.model.language_model.hidden_size
    if isinstance(block, NormPenaltyConfig):
        visual = micro.pictures * setup.model.vision_tower.num_tokens
        return len(layer_names(block.layer)) * (block.weight > 0) * FLOAT * size * visual
    if not isinstance(block, PredictiveConfig):
        return 0.0
    width = block.hidden_size or size
    per_row = setup.width * (size + 2 * width) + 2 * FLOAT * setup.anchor_size + 12
    return len(layer_names(block.layer)) * per_row * _predicted_rows(setup, micro)


def kept_logits_bytes(setup: Setup, micro: MicroBatch) -> float:
    """Return what autograd keeps of the loss: log-probabilities in float32, and the head's input where it learns."""
    size = setup.model.language_model.hidden_size
    return micro.targets * (FLOAT * setup.vocabulary + setup.width * size * setup.language_learns)


def passing_logits_bytes(setup: Setup, micro: MicroBatch) -> float:
    """Return what the loss needs for a moment: two more float32 tensors of the logits' size as the backward begins."""
    return 2 * FLOAT * micro.targets * setup.vocabulary


def passing_layer_bytes(setup: Setup, micro: MicroBatch) -> float:
    """Return what the backward pass of a decoder layer needs for a moment.

    The gradient of the residual stream, those of the MLP's three inner tensors and, with checkpointing, the layer's own
    activations, computed again.
    """
    lm = setup.model.language_model
    tokens = micro.examples * micro.tokens
    gradients = tokens * (2 * FLOAT * lm.hidden_size + 3 * setup.width * lm.intermediate_size)
    return gradients + (decoder_layer_bytes(setup, micro) if setup.checkpointing else 0)


def half_weight_bytes(setup: Setup) -> float:
    """Return the bfloat16 copies of matrices that autocast or autograd holds through a micro-batch; 0 in float32.

    Autocast keeps those of weights that learn until the backward pass has ended. Of frozen matrices of the language
    model autograd keeps its own until it has passed them; with checkpointing, one layer's and the head's.
    """
    if not setup.half:
        return 0.0
    model = setup.model
    lm, tower = model.language_model, model.vision_tower
    layers = 1 if setup.checkpointing and not setup.language_learns else lm.num_hidden_layers
    matrices = layers * layer_matrices(model) + lm.hidden_size * setup.vocabulary
    matrices += projector_matrices(model) + predictor_matrices(setup)
    if setup.tower_learns:
        patches = 3 * tower.patch_size**2 * tower.hidden_size
        matrices += patches + used_tower_layers(model) * tower_layer_matrices(model)
    return 2.0 * matrices
