"""Probe features of images: one forward pass of the image prefix gives every layer.

Each layer's visual tokens are reduced as the pass reaches them, to a mean and the patch structure of each image and to
sums over all images; means go to disk batch by batch. So memory grows neither with the images nor with the depth.
"""

from __future__ import annotations

import inspect
import zlib
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from prebench.errors import DataError, ModelError
from prebench.images import to_rgb
from prebench.model import architectures, visual_states
from prebench.model.architectures import EncoderStates, View
from prebench.probe.features import ProbeFeatures, RowFile
from prebench.probe.lm_head import Decoder
from prebench.probe.patch_structure import OBJECT_METRICS, STRUCTURE_METRICS, ObjectPatches, assign_patches
from prebench.probe.spectrum import MomentSums

PIXEL_SIDE = 16
"""Side of the picture that the control "raw pixels" reads."""
SAMPLED_TOKENS = 16
"""Tokens of each image that count for the covariance of a layer: all of them would cost a tenth of the pass."""
DECODED_TOKENS = 8
"""Of these, how many go through the LM head, whose cost is that of a large vocabulary."""


def extract_features(
    model: Any,
    processor: Any,
    images: Sequence[Image.Image],
    masks: Sequence[np.ndarray | None],
    batch_size: int = 16,
    report: Callable[[int], None] | None = None,
) -> ProbeFeatures:
    """Run images through vision encoder and decoder and return their probe features.

    The prompt is the chat template of a user turn that holds nothing but the image, cut after the last image token:
    under causal attention nothing behind the image can change it. Where image tokens attend to the text behind them
    (`ProbeFeatures.attention` is "prompt") it is not cut, and the features are those of that prompt. The values do not
    depend on `batch_size` beyond float round-off.

    Args:
        model: a multimodal model of transformers on the device to use; is put into evaluation mode.
        processor: its processor.
        images: n images of any size; read batch by batch, so that a lazy sequence keeps memory flat.
        masks: per image object ids, [H, W] of the image's aspect ratio (0 = background), or None: structure is NaN.
        batch_size: images per forward pass.
        report: is called after each batch with the number of images that are through.

    Raises:
        DataError: no images, other numbers of images and masks, or a mask that does not fit its image.
        ModelError: an architecture that prebench can't read, visual tokens without a grid where there are masks, or
            hidden states that are not finite.
        StoreError: the folder for temporary files is full.
    """
    if not len(images) or len(images) != len(masks):
        raise DataError(f"probe: {len(images)} images and {len(masks)} masks; give each image a mask or None")
    model.eval()
    run = _Pass(model, processor)
    for start in range(0, len(images), batch_size):
        numbers = range(start, min(start + batch_size, len(images)))
        batch = [to_rgb(images[number]) for number in numbers]
        own_masks = [masks[number] for number in numbers]
        for number, image, mask in zip(numbers, batch, own_masks, strict=True):
            _check_mask(model, processor, number, image, mask)
        run.add(batch, own_masks)
        if report is not None:
            report(numbers.stop)
    return run.features()


def _check_mask(model: Any, processor: Any, number: int, image: Image.Image, mask: np.ndarray | None) -> None:
    if mask is None:
        return
    where = f"probe: the mask of image {number}"
    if np.ndim(mask) != 2 or np.size(mask) == 0 or image.width * mask.shape[0] != image.height * mask.shape[1]:
        raise DataError(
            f"{where} has shape {np.shape(mask)}, but the image is {image.height} x {image.width} pixels; a mask may "
            "be of another size, but must be [height, width] of the same aspect ratio"
        )
    resizer = processor.image_processor
    reshaped = getattr(resizer, "do_center_crop", None) or getattr(resizer, "do_pad", None)
    if reshaped and image.width != image.height and model.config.model_type not in architectures.STRETCHED:
        raise DataError(
            f"{where} can't be aligned: the processor crops or pads the image ({image.height} x {image.width} pixels); "
            "give square images"
        )


class _Pass:
    """Running results over the batches of one extraction."""

    def __init__(self, model: Any, processor: Any) -> None:
        self.model, self.processor = model, processor
        self.depth = visual_states.num_layers(model)
        self.sums, self.encoder_sums = MomentSums(self.depth + 1), MomentSums(1)
        self.decoder = Decoder(model, processor)
        self.attention = architectures.image_attention(model)
        self.rows: dict[str, RowFile] = defaultdict(RowFile)
        self.object_ids: list[np.ndarray] = []
        self.count = 0
        self._checked = model.config.model_type in architectures.TESTED

    @torch.inference_mode()
    def add(self, images: Sequence[Image.Image], masks: Sequence[np.ndarray | None]) -> None:
        inputs, end = prompt_inputs(self.model, self.processor, images)
        if not self._checked:
            self._check_attention(images[:1])
        if self.attention != "prompt":
            inputs = cut(inputs, end)
        batch = _Batch(self, inputs, images, masks)
        # hidden states and encoder output go to the batch while the pass runs
        with (
            architectures.capture_encoder(self.model) as batch.encoder,
            visual_states.capture(
                self.model, inputs["input_ids"], range(self.depth + 1), visit=batch.visit
            ) as batch.states,
        ):
            self.model.base_model(**inputs, use_cache=False)
        batch.finish()

    def _check_attention(self, images: Sequence[Image.Image]) -> None:
        """Measure, for an architecture that no test holds, that text behind the image does not matter."""
        inputs, end = prompt_inputs(self.model, self.processor, images)
        self._checked = True
        if self.attention == "prompt" or inputs["input_ids"].shape[1] == end:
            return
        if architectures.depends_on_later_text(self.model, inputs, end):
            raise ModelError(
                f"{type(self.model).__name__}: image tokens change with the text behind them, so a prefix is not the "
                f'prompt; add {self.model.config.model_type!r} as "prompt" to ATTENTION in '
                "prebench/model/architectures.py"
            )

    def features(self) -> ProbeFeatures:
        rows = {name: file.array() for name, file in self.rows.items()}
        return ProbeFeatures(
            pooled=rows["pooled"],
            encoder_pooled=rows["encoder_pooled"],
            structure=rows["structure"],
            encoder_structure=rows["encoder_structure"],
            pixels=rows["pixels"],
            objects=rows["objects"],
            object_ids=np.concatenate(self.object_ids),
            moments=self.sums.moments(),
            encoder_moments=self.encoder_sums.moments(),
            decoded=self.decoder.result(),
            attention=self.attention,
            injected=architectures.injected_layers(self.model),
        )


def prompt_inputs(model: Any, processor: Any, images: Sequence[Image.Image]) -> tuple[dict[str, Any], int]:
    """Return the forward pass's arguments for a prompt per image that holds nothing else, and the end of the images.

    Returns:
        The keyword arguments, padded on the right, on the model's device; the first position behind all images.

    Raises:
        ModelError: the processor fails, or leaves the image out.
    """
    try:
        made = _processed(processor, images)
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise ModelError(f"{type(processor).__name__}: the processor makes no prompt of one image: {reason}") from error
    known = inspect.signature(model.base_model.forward).parameters
    inputs = {name: _to_model(model, value) for name, value in made.items() if name in known}
    mask_BT = visual_states.visual_mask(model, inputs["input_ids"])
    if not bool(mask_BT.any(dim=1).all()):
        raise ModelError(
            f"{type(model).__name__}: a prompt of one image has no visual tokens (id {model.config.image_token_id}); "
            "check the processor's chat template and image token"
        )
    return inputs, int(mask_BT.any(dim=0).nonzero().max()) + 1


def _processed(processor: Any, images: Sequence[Image.Image]) -> Mapping[str, Any]:
    settings = {"padding": True, "padding_side": "right"}
    if getattr(processor, "chat_template", None) is None:  # such as PaliGemma's
        texts = [processor.image_token] * len(images)
        made = processor(text=texts, images=[[image] for image in images], return_tensors="pt", **settings)
    else:
        turns = [[{"role": "user", "content": [{"type": "image", "image": image}]}] for image in images]
        made = processor.apply_chat_template(
            turns, tokenize=True, return_dict=True, return_tensors="pt", processor_kwargs=settings
        )
    assert isinstance(made, Mapping)
    return made


def cut(inputs: Mapping[str, Any], end: int) -> dict[str, Any]:
    """Return the arguments for the first `end` positions of each prompt."""
    shape = inputs["input_ids"].shape
    return {
        name: value[:, :end] if isinstance(value, Tensor) and value.shape == shape else value
        for name, value in inputs.items()
    }


def _to_model(model: Any, value: Any) -> Any:
    if not isinstance(value, Tensor):
        return value
    return value.to(model.device, model.dtype) if value.is_floating_point() else value.to(model.device)


@dataclass(frozen=True)
class _Group:
    """Images of a batch with equally many tokens, whose tokens stack."""

    images: list[int]
    tokens: Tensor | None
    """[b * N] positions among the batch's tokens; None where the group is the whole batch."""
    size: int
    view: View | None
    sample: Tensor
    """[b, m] which of its tokens count for the covariance."""
    objects: list[ObjectPatches | None]

    def stack(self, tokens_MD: Tensor) -> Tensor:
        """Return the group's tokens, [b, N, D] float32."""
        own = tokens_MD if self.tokens is None else tokens_MD[self.tokens]
        return own.unflatten(0, (len(self.images), self.size)).float()


class _Batch:
    """Reduces the layers of one forward pass as they come."""

    encoder: EncoderStates
    states: visual_states.VisualStates

    def __init__(
        self, run: _Pass, inputs: dict[str, Any], images: Sequence[Image.Image], masks: Sequence[np.ndarray | None]
    ) -> None:
        self._run, self._inputs, self._masks = run, inputs, masks
        # by content, so that it matters neither where an image stands nor which process reads it
        self._seeds = [zlib.crc32(image.tobytes()) for image in images]
        self._pooled: list[np.ndarray] = []
        self._structure: list[np.ndarray] = []
        self._groups: list[_Group] = []
        self._objects_of: dict[tuple[int, int, int], ObjectPatches] = {}
        self._measured: list[dict[int, tuple[np.ndarray, np.ndarray]]] = []
        self._last: list[Tensor] = []
        small = [image.resize((PIXEL_SIDE, PIXEL_SIDE), Image.Resampling.BOX) for image in images]
        run.rows["pixels"].append(np.stack([np.asarray(image, dtype=np.float32).reshape(-1) / 255 for image in small]))

    def visit(self, layer: int, tokens_MD: Tensor) -> None:
        """Take the visual tokens of one layer; layer 0 comes first, when the vision encoder is through."""
        run = self._run
        if layer == 0:
            self._start(tokens_MD.device)
        pooled, structure = self._reduce(self._groups, tokens_MD, run.sums, layer)
        self._pooled.append(pooled)
        self._structure.append(structure)
        if layer == run.depth:
            for group in self._groups:
                rows = torch.arange(len(group.images), device=tokens_MD.device)[:, None]
                own = tokens_MD if group.tokens is None else tokens_MD[group.tokens]
                own = own.unflatten(0, (len(group.images), group.size))
                self._last.append(own[rows, group.sample[:, :DECODED_TOKENS]].flatten(0, 1))

    def _start(self, device: torch.device) -> None:
        images = self.encoder.images(self._inputs, self.states.mask_BT.sum(dim=1).tolist())
        self._groups = self._group([image.num_tokens for image in images], [i.view for i in images], device)
        sizes = [len(image.encoder) for image in images]
        groups = self._group(sizes, [image.encoder_view for image in images], device)
        rows = torch.cat([image.encoder for image in images])
        _, structure = self._reduce(groups, rows, self._run.encoder_sums, 0)
        # each from its own view: a copy in another layout of memory is summed in another order, to other last bits
        pooled = torch.stack([image.encoder.float().mean(dim=0) for image in images]).cpu().numpy()
        self._run.rows["encoder_pooled"].append(pooled)
        self._run.rows["encoder_structure"].append(structure)

    def _group(self, sizes: Sequence[int], views: Sequence[View | None], device: torch.device) -> list[_Group]:
        alike: dict[Any, list[int]] = defaultdict(list)
        for number, (size, view) in enumerate(zip(sizes, views, strict=True)):
            alike[size, view].append(number)
        ends = np.cumsum(sizes)
        groups = []
        for (size, view), members in alike.items():
            rows = None
            if len(alike) > 1:
                rows = torch.cat([torch.arange(ends[i] - size, ends[i]) for i in members]).to(device)
            sample = np.stack([self._sample(i, size) for i in members])
            objects = [self._objects(i, view, size) for i in members]
            groups.append(_Group(members, rows, size, view, torch.from_numpy(sample).to(device), objects))
        return groups

    def _sample(self, number: int, size: int) -> np.ndarray:
        return np.random.default_rng(self._seeds[number]).permutation(size)[:SAMPLED_TOKENS]

    def _objects(self, number: int, view: View | None, size: int) -> ObjectPatches | None:
        """Return which patches belong to the objects of an image's mask; None without a mask.

        Raises:
            ModelError: there is a mask, but the tokens form no grid.
        """
        mask = self._masks[number]
        if mask is None:
            return None
        if view is None:
            raise ModelError(f"probe: {size} visual tokens of an image form no square grid; patch structure needs one")
        key = (number, view.rows, view.cols)
        if key not in self._objects_of:
            self._objects_of[key] = ObjectPatches(assign_patches(mask, (view.rows, view.cols)))
        return self._objects_of[key]

    def _reduce(
        self, groups: Sequence[_Group], tokens_MD: Tensor, sums: MomentSums, layer: int
    ) -> tuple[np.ndarray, np.ndarray]:
        """Return each image's mean token, [B, D], and patch structure, [B, K], at one layer.

        The layer's tokens are added to the sums, and the structure of single objects is kept.
        """
        count = len(self._masks)
        pooled = np.empty((count, tokens_MD.shape[1]), dtype=np.float32)
        structure = np.full((count, len(STRUCTURE_METRICS)), np.nan, dtype=np.float32)
        measured: dict[int, tuple[np.ndarray, np.ndarray]] = {}
        for group in groups:
            tokens_BND = group.stack(tokens_MD)
            pooled[group.images] = tokens_BND.mean(dim=1).cpu().numpy()
            sums.add(layer, tokens_BND, group.sample)
            for row, (number, objects) in enumerate(zip(group.images, group.objects, strict=True)):
                if objects is not None and group.view is not None:
                    start, size = group.view.start, group.view.rows * group.view.cols
                    whole, each = objects.measure(tokens_BND[row, start : start + size])
                    structure[number], measured[number] = whole.numpy(), (objects.ids, each.numpy())
        self._measured.append(measured)
        if not np.isfinite(pooled).all():
            raise ModelError(
                "probe: the model's hidden states have NaN or infinite values; check its weights and dtype"
            )
        return pooled, structure

    def _finish_objects(self) -> None:
        """Hand on each object's structure at the encoder, which came first, and at every layer.

        The encoder's grid may be another one: an object without a patch there has NaN.
        """
        run = self._run
        encoder, *layers = self._measured
        rows, ids = [np.empty((0, len(self._measured), len(OBJECT_METRICS)))], [np.empty((0, 2), dtype=np.int64)]
        for number, (own, _) in sorted(layers[0].items()):
            values = np.full((len(own), len(self._measured), len(OBJECT_METRICS)), np.nan)
            known, each = encoder.get(number, (own[:0], values[:0, 0]))
            found = np.isin(known, own)
            values[np.searchsorted(own, known[found]), 0] = each[found]
            for place, layer in enumerate(layers, start=1):
                values[:, place] = layer[number][1]
            rows.append(values)
            ids.append(np.stack([np.full(len(own), run.count + number), own], axis=1))
        run.rows["objects"].append(np.concatenate(rows))
        run.object_ids.append(np.concatenate(ids))
        run.count += len(self._masks)

    def finish(self) -> None:
        """Hand on what the layers gave, once the pass is over."""
        self._run.rows["pooled"].append(np.stack(self._pooled, axis=1))
        self._run.rows["structure"].append(np.stack(self._structure, axis=1))
        self._finish_objects()
        for states in self._last:
            self._run.decoder.add(states)
        # They refer back to this batch: its tokens would wait for a full garbage collection, and memory would grow.
        del self.encoder, self.states
