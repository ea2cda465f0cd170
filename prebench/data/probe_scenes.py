"""The scenes of the visual probe, drawn when asked for: what the mirror's `prebench/visual_probe` holds."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image

from prebench.data.scenes import Scene, generate_scene, labels, render
from prebench.schema import ProbeConfig


@dataclass(frozen=True)
class ProbeScenes:
    """n scenes, in the order of the task's documents."""

    images: Sequence[Image.Image]
    masks: Sequence[np.ndarray | None]
    labels: dict[str, np.ndarray]
    """[n] integers per attribute of the configuration."""
    subsets: np.ndarray
    """[n] of "train", "val", "test"."""
    categories: list[list[str]]
    """Per scene the shape of each object, in the order of the mask's ids."""


def probe_scenes(probe: ProbeConfig, seed: int) -> ProbeScenes:
    """Return the scenes of a suite's probe.

    Args:
        probe: numbers of scenes, and the attributes.
        seed: the suite's `mirror_seed`.
    """
    subsets, scenes = zip(*drawn(probe, seed), strict=True)
    known = [labels(scene) for scene in scenes]
    return ProbeScenes(
        images=_Rendered(scenes, 0),
        masks=_Rendered(scenes, 1),
        labels={a.name: np.array([values[a.name] for values in known]) for a in probe.attributes},
        subsets=np.array(subsets),
        categories=[[item.shape for item in scene.objects] for scene in scenes],
    )


def drawn(probe: ProbeConfig, seed: int) -> Iterator[tuple[str, Scene]]:
    """Yield subset and scene of every document."""
    sizes = {"train": probe.num_train, "val": probe.num_val, "test": probe.num_test}
    subsets = [subset for subset, size in sizes.items() for _ in range(size)]
    for index, subset in enumerate(subsets):
        yield subset, generate_scene(seed, "probe", index)


class _Rendered(Sequence[Any]):
    def __init__(self, scenes: Sequence[Scene], part: int) -> None:
        self._scenes, self._part = scenes, part

    def __len__(self) -> int:
        return len(self._scenes)

    def __getitem__(self, index: Any) -> Any:
        return render(self._scenes[index])[self._part]
