"""PRe in a training loop that is not prebench's: the loss of `prebench run` for any supported model.

    regularizer = PredictiveRegularizer(model, layer="half", anchor="pre_llm", weight=0.5)
    ...
    loss = model(**batch).loss + regularizer.loss()
    ...
    regularizer.step()  # beside optimizer.step()

Hooks read the visual tokens while the model's own forward pass runs; its class, parameters and state dict stay as they
are, so whatever saves the model saves it without a trace. `docs/your_own_trainer.md` tells what an own loop has to
mind; in transformers' Trainer and TRL's SFTTrainer, `prebench.train.trainer_mixin` minds it.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Self

import torch
import torch.distributed as dist
from accelerate.utils import extract_model_from_parallel
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from prebench.config import validate
from prebench.errors import ConfigError, ModelError, TrainingError
from prebench.model.architectures import EncoderStates, capture_encoder, encoder_width, image_of_placeholder
from prebench.model.visual_states import VisualStates, capture, num_layers, visual_mask
from prebench.runtime import derive_seed
from prebench.schema import PredictiveConfig
from prebench.train.optimizer_state import flatten_state, restore_state
from prebench.train.regularizers import predictive

ANCHORS = ("pre_llm", "pre_projector")
"""The others are controls of a study, or need pictures by name: `prebench run` trains them."""
OPTIMIZER = "optimizer."
PREDICTOR = "predictor."


@dataclass(frozen=True)
class _ForwardPass:
    """What one forward pass left behind."""

    inputs: Mapping[str, Any]
    states: VisualStates
    encoder: EncoderStates | None
    """None where the anchor does not need it."""


class PredictiveRegularizer:
    """Predictive Regularization (arXiv 2603.20808) on a model that something else trains.

    On purpose no nn.Module: as an attribute of the model it would be saved with it.

    Args:
        model: any supported multimodal model of transformers (`prebench.model.architectures`), plain or wrapped by
            PEFT, DDP or accelerate; it may also be wrapped after this.
        layer: decoder layer l whose input predicts: quarter, half, three_quarters, last, a number from 1 on, or a list.
        anchor: what is predicted: `pre_llm`, the visual tokens as they enter the decoder, or `pre_projector`, the
            vision encoder's output.
        weight: lambda; 0 fits the predictor to detached states, which the model does not feel.
        level: `patch`, or `global` for the mean token of each image.
        hidden_size: width of the predictor's hidden layer; None: the language model's.
        learning_rate: of the predictor's own AdamW (constant), which `step` uses.
        max_grad_norm: clipping of the predictor's gradients, apart from the model's, in `step`.
        seed: decides the predictor's initial weights; the global random state is not touched.

    Raises:
        ConfigError: an argument is wrong.
        ModelError: the model's visual tokens can't be found, or a layer lies outside of it.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        layer: str | int | Sequence[str | int] = "half",
        anchor: str = "pre_llm",
        weight: float = 0.5,
        level: str = "patch",
        hidden_size: int | None = None,
        learning_rate: float = 1e-3,
        max_grad_norm: float = 1.0,
        seed: int = 0,
    ) -> None:
        if anchor not in ANCHORS:
            raise ConfigError(f"PredictiveRegularizer: anchor {anchor!r}: choose {' or '.join(ANCHORS)}")
        values = {"layer": layer, "anchor": anchor, "weight": weight, "level": level, "hidden_size": hidden_size}
        values |= {"learning_rate": learning_rate, "max_grad_norm": max_grad_norm}
        self.config = validate(PredictiveConfig, values, "PredictiveRegularizer")
        self._model = unwrapped(model)
        if anchor == "pre_projector" and getattr(self._model.config, "image_grid_pinpoints", None) is not None:
            raise ModelError(
                f"{type(self._model).__name__} puts the tokens of an image's tiles into another order than its encoder "
                "and drops some: take anchor pre_llm"
            )
        width = self._model.config.get_text_config().hidden_size
        self._term = predictive.PredictiveRegularizer(
            self.config,
            hidden_size=width,
            anchor_size=encoder_width(self._model) if anchor == "pre_projector" else width,
            depth=num_layers(self._model),
            generator=torch.Generator().manual_seed(derive_seed("predictor", seed)),
        )
        self._synchronised: nn.Module | None = None
        self._optimizer: torch.optim.Optimizer | None = None
        self._capturing: ExitStack | None = None
        self._pass: _ForwardPass | None = None
        self.pre_loss: Tensor | None = None
        """The last unweighted loss, a detached scalar, for logs."""
        base = self._model.base_model
        self._handles = [
            base.register_forward_pre_hook(self._begin, with_kwargs=True),
            base.register_forward_hook(self._end, always_call=True),
        ]

    def __enter__(self) -> Self:
        """Return the regularizer itself; the end of the `with` block takes its hooks away."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Take the hooks away."""
        self.close()

    def close(self) -> None:
        """Take the hooks away: the model is as it was before."""
        for handle in self._handles:
            handle.remove()
        self._end()
        self._pass = None

    def parameters(self) -> Iterator[nn.Parameter]:
        """Return the predictor's parameters, for an optimizer of your own; `step` is then not called."""
        return self._term.parameters()

    def loss(self, num_images: float | None = None) -> Tensor:
        """Return weight * L_PRe of the last forward pass in training mode, to be added to the model's loss.

        Args:
            num_images: what the sum over images is divided by. None: the images of this micro-batch, so that the loss
                is their mean. Under gradient accumulation, pass the images of the whole optimizer step (on several
                processes: of all of them, divided by their number, as DDP takes the mean over processes).

        Returns:
            A scalar with gradient; 0 without images, and then the predictor gets zeros for a gradient.

        Raises:
            TrainingError: there was no such forward pass since the last call, or its states carry no gradient.
            ModelError: visual tokens can't be matched to images.
        """
        found, self._pass = self._pass, None
        if found is None:
            raise TrainingError(
                "PredictiveRegularizer.loss: no forward pass since the last call; call it once after each forward pass "
                "in training mode (model.train(), gradients on)"
            )
        image_of_token = self._image_of_token(found)
        self._require_gradient(found.states, len(image_of_token))
        images = int(image_of_token[-1]) + 1 if len(image_of_token) else 0
        features = self._encoder_features(found, image_of_token)
        hidden = found.states.hidden(0)
        # Weights of 16 bits without autocast: the predictor keeps 32 and is computed like the model.
        half = hidden.dtype if hidden.dtype in (torch.bfloat16, torch.float16) else None
        with torch.autocast(hidden.device.type, dtype=half) if half else ExitStack():
            pre_sum: Tensor = self._module(hidden.device)(found.states, features, image_of_token)
        mean = pre_sum / max(1, images if num_images is None else num_images)
        self.pre_loss = mean.detach()
        return (self.config.weight if self.config.weight > 0 else 1.0) * mean

    def step(self) -> float:
        """Clip the predictor's gradients, let its own AdamW make a step, and clear them; call it beside the optimizer.

        Returns:
            The norm of the gradients before clipping.

        Raises:
            TrainingError: it is not finite; no step is made.
        """
        norm = float(nn.utils.clip_grad_norm_(self.parameters(), self.config.max_grad_norm))
        if not math.isfinite(norm):
            raise TrainingError(
                f"PredictiveRegularizer.step: the norm of the predictor's gradients is {norm}; stopped before its step"
            )
        optimizer = self._own_optimizer()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return norm

    def count_images(self, inputs: Mapping[str, Any]) -> int:
        """Return how many images a micro-batch has, as `loss` counts them.

        Args:
            inputs: the model's keyword arguments, `input_ids` among them.
        """
        index = image_of_placeholder(self._model, inputs)
        return int(index[-1]) + 1 if len(index) else 0

    def state_dict(self) -> dict[str, Tensor]:
        """Return the predictor's weights and its optimizer's state as one flat mapping, fit for safetensors."""
        state = {PREDICTOR + name: value.detach() for name, value in self._term.state_dict().items()}
        if self._optimizer is not None:
            state |= {OPTIMIZER + name: value for name, value in flatten_state(self._optimizer).items()}
        return state

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Go on from a `state_dict`.

        Raises:
            ModelError: it is that of another predictor.
        """
        weights = {name.removeprefix(PREDICTOR): value for name, value in state.items() if name.startswith(PREDICTOR)}
        try:
            self._term.load_state_dict(weights)
        except RuntimeError as error:
            raise ModelError(f"PredictiveRegularizer: the state of another predictor ({error})") from error
        flat = {name.removeprefix(OPTIMIZER): value for name, value in state.items() if name.startswith(OPTIMIZER)}
        if flat:
            restore_state(self._own_optimizer(), flat)

    def _begin(self, _module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Start to read a forward pass, if it is one to train on: no evaluation, no generation, no metric."""
        self._end()
        if not (self._model.training and torch.is_grad_enabled()):
            return
        inputs = kwargs if "input_ids" in kwargs or not args else {**kwargs, "input_ids": args[0]}
        if not isinstance(inputs.get("input_ids"), Tensor):
            raise ModelError(
                f"{type(self._model).__name__}: a forward pass without input_ids; they tell where visual tokens stand"
            )
        self._capturing = ExitStack()
        states = self._capturing.enter_context(capture(self._model, inputs["input_ids"], self._term.layers))
        encoder = None
        if self.config.anchor == "pre_projector":
            encoder = self._capturing.enter_context(capture_encoder(self._model))
        self._pass = _ForwardPass(inputs, states, encoder)

    def _end(self, *_: Any) -> None:
        if self._capturing is not None:
            self._capturing.close()
            self._capturing = None

    def _image_of_token(self, found: _ForwardPass) -> Tensor:
        """Return which image each visual token belongs to, [M]; line breaks between them belong to none."""
        placeholders_BT = visual_mask(self._model, found.inputs["input_ids"])
        kept = found.states.mask_BT[placeholders_BT]
        return image_of_placeholder(self._model, found.inputs)[kept]

    def _encoder_features(self, found: _ForwardPass, image_of_token: Tensor) -> Tensor:
        """Return the anchor "pre_projector" as [1, M, D_v]; nothing for another."""
        if found.encoder is None or not len(image_of_token):
            width = self._term.predictors[0][-1].out_features  # type: ignore[index]
            return torch.zeros((0, 1, int(width)), device=image_of_token.device)
        counts = torch.bincount(image_of_token).tolist()
        rows = [image.encoder for image in found.encoder.images(found.inputs, counts)]
        return torch.cat(rows).detach()[None]

    def _require_gradient(self, states: VisualStates, num_tokens: int) -> None:
        if self.config.weight == 0 or not num_tokens:
            return
        for layer in self._term.regularised_layers:
            if not states.hidden(layer).requires_grad:
                raise TrainingError(
                    f"PredictiveRegularizer: no gradient reaches layer {layer}: nothing before it trains, or activation"
                    " checkpointing is re-entrant (pass gradient_checkpointing_kwargs={'use_reentrant': False})"
                )

    def _module(self, device: torch.device) -> nn.Module:
        """Return the term where the states are; on several processes, wrapped so that they average its gradients."""
        self._term.to(device)
        if self._synchronised is None:
            together = dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1
            self._synchronised = DistributedDataParallel(self._term) if together else self._term
        return self._synchronised

    def _own_optimizer(self) -> torch.optim.Optimizer:
        if self._optimizer is None:
            self._optimizer = torch.optim.AdamW(self.parameters(), lr=self.config.learning_rate)
        return self._optimizer


def unwrapped(model: nn.Module) -> Any:
    """Return transformers' own model inside the wrappers of DDP, accelerate, torch.compile and PEFT."""
    inner = extract_model_from_parallel(model, keep_torch_compile=False)
    return inner.get_base_model() if hasattr(inner, "get_base_model") else inner
