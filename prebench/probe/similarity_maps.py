"""Query-patch similarity maps: to which patches of an image is one of them alike, at which layer.

The picture of arXiv 2603.20808's diagnosis, as numbers: in a layer that keeps objects apart, the patches like a query
are those of its object; where structure is lost, the likeness spills over the image.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from prebench.images import pixel_hash, to_rgb
from prebench.model import architectures, visual_states
from prebench.probe.extract import cut, prompt_inputs
from prebench.probe.patch_structure import ZERO_NORM, assign_patches
from prebench.records import SimilarityMap

IMAGES = 4
"""Images that are shown."""
QUERIES = 2
"""Query patches of an image: one of each of its first objects."""
DECIMALS = 4


def shown_images(masks: Sequence[np.ndarray | None], candidates: Sequence[int], count: int = IMAGES) -> list[int]:
    """Return the first images whose mask has two objects; where no mask has, the first images.

    Args:
        masks: of all images; read one by one until there are enough.
        candidates: numbers of the images to choose from: a model that is compared must get the same ones.
        count: how many.
    """
    found: list[int] = []
    for number in candidates:
        mask = masks[number]
        if mask is not None and len(np.unique(mask[mask != 0])) >= QUERIES:
            found.append(number)
        if len(found) == count:
            break
    return found or list(candidates[:count])


@torch.inference_mode()
def similarity_maps(
    model: Any,
    processor: Any,
    images: Sequence[Image.Image],
    masks: Sequence[np.ndarray | None],
    numbers: Sequence[int],
) -> list[SimilarityMap]:
    """Return the maps of some images at layer 0, the middle and the last; none of an image whose tokens form no grid.

    Args:
        model: a multimodal model in evaluation mode.
        processor: its processor.
        images: all images of the probe.
        masks: their object ids, or None.
        numbers: which of them to show.

    Raises:
        ModelError: an architecture that prebench can't read.
        DataError: a mask that can't be read.
    """
    return [found for number in numbers for found in _of_image(model, processor, images[number], masks[number], number)]


def _of_image(
    model: Any, processor: Any, image: Image.Image, mask: np.ndarray | None, number: int
) -> list[SimilarityMap]:
    rgb = to_rgb(image)
    depth = visual_states.num_layers(model)
    layers = sorted({0, depth // 2, depth})
    inputs, end = prompt_inputs(model, processor, [rgb])
    if architectures.prefix_is_exact(model):
        inputs = cut(inputs, end)
    with (
        architectures.capture_encoder(model) as encoder,
        visual_states.capture(model, inputs["input_ids"], layers) as states,
    ):
        model.base_model(**inputs, use_cache=False)
    view = encoder.images(inputs, [int(states.mask_BT.sum())])[0].view
    if view is None:
        return []
    patches = slice(view.start, view.start + view.rows * view.cols)
    objects = np.zeros(view.rows * view.cols, dtype=np.int64)
    if mask is not None:
        objects = assign_patches(mask, (view.rows, view.cols))
    found = []
    for query in query_patches(objects, view.rows, view.cols):
        for layer in layers:
            own = states.at(layer).double().cpu()
            cosine, centred = _likeness(own[patches], own[patches] - own.mean(dim=0), query)
            found.append(
                SimilarityMap(
                    image_id=number,
                    image_hash=pixel_hash(rgb),
                    layer=layer,
                    num_layers=depth,
                    rows=view.rows,
                    cols=view.cols,
                    query=query,
                    object_id=int(objects[query]),
                    objects=objects.tolist(),
                    cosine=cosine,
                    centred=centred,
                )
            )
    return found


def query_patches(objects: np.ndarray, rows: int, cols: int, count: int = QUERIES) -> list[int]:
    """Return a patch of each of the first objects, the nearest to the object's middle; without objects, the image's.

    Args:
        objects: [rows * cols] the owner of each patch, 0 = background.
        rows: of the grid.
        cols: of the grid.
        count: how many objects.
    """
    places = np.stack(np.divmod(np.arange(rows * cols), cols), axis=1).astype(np.float64)
    owners = [owner for owner in np.unique(objects) if owner != 0][:count]
    groups = [np.flatnonzero(objects == owner) for owner in owners] or [np.arange(rows * cols)]
    return [
        int(group[((places[group] - places[group].mean(axis=0)) ** 2).sum(axis=1).argmin()])  # of equals the first
        for group in groups
    ]


def _likeness(tokens_ND: Tensor, centred_ND: Tensor, query: int) -> tuple[list[float], list[float]]:
    """Return the cosines of all tokens with one, raw and centred; 0 where a token has no direction."""
    floor = ZERO_NORM * float(tokens_ND.norm(dim=-1).max())
    found = []
    for values_ND, least in ((tokens_ND, 0.0), (centred_ND, floor)):
        norm = values_ND.norm(dim=-1, keepdim=True)
        unit_ND = torch.where(norm > least, values_ND / norm, 0.0)
        found.append([round(value, DECIMALS) for value in (unit_ND @ unit_ND[query]).tolist()])
    return found[0], found[1]
