"""What differs between multimodal architectures beyond the decoder: attention, injected features, encoder output, grid.

Everything follows transformers' conventions (seen with 5.23) and is read from a forward pass by hooks on the
projector, so that tiles, dynamic resolution and positions stay transformers' business. Seen to work, each by a test on
a tiny instance (tests/model/test_architectures.py): LLaVA, LLaVA-NeXT, LLaVA-OneVision, Qwen2-VL, Qwen2.5-VL, Qwen3-VL,
InternVL, Idefics3, SmolVLM, PaliGemma, Gemma 3. Another architecture works where it keeps to the conventions; where
not, an error says what is missing.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from prebench.errors import ModelError
from prebench.model.visual_states import num_layers, visual_mask

ImageAttention = Literal["causal", "image", "prompt"]

ATTENTION: dict[str, ImageAttention] = {"gemma3": "image", "paligemma": "prompt"}
"""What image tokens see besides all that stands before them, by `model_type`; nothing more, unless listed here."""
TESTED = (
    *("llava", "llava_next", "llava_onevision", "qwen2_vl", "qwen2_5_vl", "qwen3_vl", "internvl"),
    *("idefics3", "smolvlm", "paligemma", "gemma3"),
)
"""Values of `model_type` whose attention a test holds; that of another is measured before its prefix is trusted."""
STRETCHED = ("llava_next", "llava_onevision", "idefics3", "smolvlm")
"""Architectures that stretch an image to the view of the whole, though their processor also crops or pads (tiles)."""
WHOLE_VIEW_LAST = ("internvl", "idefics3", "smolvlm")
"""Architectures that put an image's tiles before the view of the whole image; the others put them behind it."""
ONE_SIZE = ("gemma3", "llava", "paligemma")
"""Architectures in which every image has the same number of tokens; in the others text stands between images."""
PROJECTORS = ("multi_modal_projector", "connector", "visual.merger")
"""Where the module stands, in `base_model`, that turns the vision encoder's output into visual tokens."""


def image_attention(model: Any) -> ImageAttention:
    """Return what image tokens attend to.

    Returns:
        "causal": what stands before them; "image": their own image's tokens behind them, too; "prompt": the whole
        prompt, the question included.
    """
    text = getattr(model.config, "text_config", None)
    switch = getattr(text, "use_bidirectional_attention", None)
    if switch in (True, "all"):
        return "prompt"
    return "image" if switch == "vision" else ATTENTION.get(model.config.model_type, "causal")


def prefix_is_exact(model: Any) -> bool:
    """Tell whether a pass of the prompt up to its last image token gives the states of the whole prompt.

    False where image tokens attend to the question behind them. True for "image", given the processor's
    `token_type_ids`: an image's tokens lie in one prefix.
    """
    return image_attention(model) != "prompt"


def injected_layers(model: Any) -> tuple[int, ...]:
    """Return the layers l > 0 at whose input the vision encoder's features are added to the visual tokens.

    Qwen3-VL adds features of its encoder's inner layers behind the first decoder blocks ("deepstack"): there a visual
    token is not what the decoder made of layer 0 alone.
    """
    taps = getattr(getattr(model.config, "vision_config", None), "deepstack_visual_indexes", None) or ()
    return tuple(range(1, min(len(taps), num_layers(model)) + 1))


@dataclass(frozen=True)
class View:
    """The tokens of an image that show it as a whole, in a grid: `start` .. `start + rows * cols` of its tokens."""

    start: int
    rows: int
    cols: int


@dataclass(frozen=True)
class ImageTokens:
    """One image: how many visual tokens it has, what the vision encoder gave for it, and where the whole image is."""

    num_tokens: int
    """Visual tokens at a decoder layer."""
    view: View | None
    """Their whole-image grid; None where they form none."""
    encoder: Tensor
    """[M, D_v]: the encoder's output in front of the projector, a row per visual token that the projector makes: the
    mean of the patches that it merges (4 in Qwen-VL, InternVL and Idefics3, 16 in Gemma 3). M is `num_tokens`, or more
    in LLaVA-NeXT, which drops tokens of padding."""
    encoder_view: View | None
    """The grid of these rows."""


class EncoderStates:
    """The projector's input and output in one forward pass."""

    def __init__(self, model: Any) -> None:
        self._model = model
        self.seen: list[tuple[Tensor, Tensor]] = []

    def images(self, inputs: Mapping[str, Any], counts: Sequence[int]) -> list[ImageTokens]:
        """Return what is known of each image, in the order of the prompts, one image per prompt.

        Args:
            inputs: the keyword arguments of the forward pass.
            counts: visual tokens per image (`VisualStates.mask_BT`).

        Raises:
            ModelError: the projector did not run once, or its output can't be matched to the visual tokens.
        """
        name = type(self._model).__name__
        if len(self.seen) != 1:
            raise ModelError(f"{name}: the projector ran {len(self.seen)} times in one forward pass, not once")
        patches, projected = self.seen[0]
        if "image_grid_thw" in inputs:
            if sum(counts) != len(projected):
                raise ModelError(f"{name}: {len(projected)} projected tokens for {sum(counts)} visual tokens")
            return self._packed(patches, projected, inputs["image_grid_thw"], counts)
        tokens = merge_patches(self._model, patches, projected.shape[-2])
        tiles = self._tiles(inputs, counts, tokens.shape[1])
        if sum(tiles) != len(tokens):
            raise ModelError(
                f"{name}: the projector gave {len(tokens)} views of {tokens.shape[1]} tokens for images of "
                f"{', '.join(map(str, counts))} visual tokens; prebench can't tell which belong to which image"
            )
        last = self._model.config.model_type in WHOLE_VIEW_LAST
        size = tokens.shape[1]
        found = []
        for count, own in zip(counts, tokens.split(tiles), strict=True):
            view, encoder_view = (_square(total - size if last else 0, size) for total in (count, own[..., 0].numel()))
            found.append(ImageTokens(count, view, own.flatten(0, 1), encoder_view))
        return found

    def _packed(self, patches: Tensor, projected: Tensor, grid_I3: Tensor, counts: Sequence[int]) -> list[ImageTokens]:
        """Qwen-VL: the images' patches one after another, those that are merged side by side."""
        merge = math.isqrt(len(patches) // len(projected))
        tokens = patches.unflatten(0, (len(projected), -1)).mean(dim=1)
        vision: Any = self._model.config.vision_config
        if hasattr(vision, "fullatt_block_indexes"):  # Qwen2.5-VL runs its encoder window by window
            from transformers.vision_utils import get_vision_window_index

            order, _ = get_vision_window_index(grid_I3, merge, vision.window_size, vision.patch_size)
            tokens = tokens[order.argsort()]
        found = []
        for count, own, (time, rows, cols) in zip(counts, tokens.split(list(counts)), grid_I3.tolist(), strict=True):
            side = math.isqrt(rows * cols // count)
            view = View(0, rows // side, cols // side) if time == 1 else None
            found.append(ImageTokens(count, view, own, view))
        return found

    def _tiles(self, inputs: Mapping[str, Any], counts: Sequence[int], size: int) -> list[int]:
        """Return how many views of `size` tokens the encoder saw of each image."""
        pinpoints = getattr(self._model.config, "image_grid_pinpoints", None)
        if pinpoints is None:
            return [count // size for count in counts]
        from transformers.models.llava_next.modeling_llava_next import image_size_to_num_patches

        side = self._model.config.vision_config.image_size
        return [image_size_to_num_patches(own, pinpoints, side) for own in inputs["image_sizes"]]


@contextmanager
def capture_encoder(model: Any) -> Iterator[EncoderStates]:
    """Record the vision encoder's output, as the projector reads it, in the forward pass inside the `with` block.

    Raises:
        ModelError: there is no projector where transformers' models have it.
    """
    states = EncoderStates(model)

    def hook(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor) -> None:
        states.seen.append((args[0] if args else next(iter(kwargs.values())), output))

    handle = projector(model).register_forward_hook(hook, with_kwargs=True)
    try:
        yield states
    finally:
        handle.remove()


def projector(model: Any) -> nn.Module:
    """Return the module that turns the vision encoder's output into visual tokens.

    Raises:
        ModelError: there is none where transformers' models have it.
    """
    base = getattr(model, "base_model", model)
    for name in PROJECTORS:
        try:
            found = base.get_submodule(name)
        except AttributeError:
            continue
        assert isinstance(found, nn.Module)
        return found
    raise ModelError(
        f"{type(model).__name__}: no projector found at base_model.{', .'.join(PROJECTORS)}; probes read the vision "
        "encoder's output there: add its place to PROJECTORS in prebench/model/architectures.py"
    )


def encoder_width(model: Any) -> int:
    """Return D_v, the width of the vision encoder's output in front of the projector."""
    vision = model.config.vision_config
    layers = getattr(model.config, "vision_feature_layer", None)
    stacked = len(layers) if isinstance(layers, list | tuple) else 1
    own = vision.embed_dim if model.config.model_type == "qwen2_vl" else vision.hidden_size
    return int(own) * stacked


def image_of_placeholder(model: Any, inputs: Mapping[str, Any]) -> Tensor:
    """Return which image each position that image features fill belongs to, [P], 0..I-1 in the order of the prompts.

    An image is a run of such positions. A model whose images are all of one size may have several in a run; their
    number is that of `pixel_values`, or of the projected images in `mm_encoder_outputs`. Idefics3 and SmolVLM put text
    between the tiles of an image: there each tile counts as one.

    Args:
        model: a multimodal model of transformers (unwrapped).
        inputs: the keyword arguments of its forward pass, `input_ids` [B, T] among them.

    Raises:
        ModelError: the positions of a model with images of one size can't be shared out among its images.
    """
    placeholders_BT = visual_mask(model, inputs["input_ids"])
    if model.config.model_type not in ONE_SIZE or not placeholders_BT.any():
        before_BT = torch.nn.functional.pad(placeholders_BT[:, :-1], (1, 0))
        starts_BT = placeholders_BT & ~before_BT
        return starts_BT.flatten().cumsum(0).reshape(starts_BT.shape)[placeholders_BT] - 1
    projected = inputs.get("mm_encoder_outputs")
    images = projected["image"].pooler_output if projected else inputs.get("pixel_values")
    count, total = 0 if images is None else len(images), int(placeholders_BT.sum())
    if not count or total % count:
        raise ModelError(f"{type(model).__name__}: {total} positions for image features and {count} images")
    return torch.arange(total, device=placeholders_BT.device) // (total // count)


def merge_patches(model: Any, patches: Tensor, size: int) -> Tensor:
    """Return the encoder's output with a row per visual token, [V, size, D_v]: the mean of the patches it is made of.

    Args:
        model: tells whether the patches were merged before the projector (InternVL stacks their channels).
        patches: [V, P, D_v], the projector's input, or [V, size, m^2 D_v] where channels are stacked.
        size: visual tokens that the projector makes of a view.

    Raises:
        ModelError: P patches are no m x m blocks of `size` tokens in a square.
    """
    if hasattr(model.config, "downsample_ratio"):
        return patches.unflatten(-1, (-1, model.config.vision_config.hidden_size)).mean(dim=2)
    count = patches.shape[1]
    if count == size:
        return patches
    side, merge = math.isqrt(size), math.isqrt(count // size)
    if side * side != size or merge * merge * size != count:
        raise ModelError(f"{type(model).__name__}: {count} patches become {size} visual tokens, which form no blocks")
    blocks = patches.unflatten(1, (side, merge, side, merge))
    return blocks.mean(dim=(2, 4)).flatten(1, 2)


def _square(start: int, size: int) -> View | None:
    side = math.isqrt(size)
    return View(start, side, side) if side * side == size and start >= 0 else None


def depends_on_later_text(model: Any, inputs: Mapping[str, Any], end: int) -> bool:
    """Measure whether the tokens before `end` change with the tokens at or behind it: two passes of equal shape.

    Args:
        model: a multimodal model in evaluation mode.
        inputs: the keyword arguments of its forward pass; `input_ids` is [B, T] with T > end.
        end: the first position of the later text.
    """
    later = inputs["input_ids"][:, end:]
    changed = torch.cat([inputs["input_ids"][:, :end], torch.where(later == 0, 1, 0)], dim=1)
    base = getattr(model, "base_model", model)
    with torch.inference_mode():
        one, other = (
            base(**{**inputs, "input_ids": ids}, use_cache=False).last_hidden_state[:, :end]
            for ids in (inputs["input_ids"], changed)
        )
    return not torch.equal(one, other)
