"""What a probe pass leaves of its images: per-image means and structure on disk, and sums over all tokens."""

from __future__ import annotations

import json
import math
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from prebench.errors import DataError, StoreError
from prebench.probe.lm_head import DecodedTokens
from prebench.probe.patch_structure import STRUCTURE_METRICS
from prebench.probe.spectrum import Moments
from prebench.store import write_chunks

COPY_BYTES = 1 << 24


@dataclass(frozen=True)
class ProbeFeatures:
    """What the probes know of n images: L decoder layers give L + 1 rows (visual_states), the encoder one more.

    The arrays of n rows may lie on disk (`numpy.memmap`); read a part of them at a time.
    """

    pooled: np.ndarray
    """[n, L + 1, D] float32: mean visual token at each layer."""
    encoder_pooled: np.ndarray
    """[n, D_v] float32: mean token of the vision encoder's output (the reference R)."""
    structure: np.ndarray
    """[n, L + 1, K] float32: patch structure at each layer; NaN where undefined."""
    encoder_structure: np.ndarray
    """[n, K] float32: patch structure of the vision encoder's output."""
    pixels: np.ndarray | None = None
    """[n, P] float32: the image itself, scaled down (a control); None in features of an older version."""
    objects: np.ndarray | None = None
    """[O, L + 2, 4] float32: patch structure of each object (`OBJECT_METRICS`) at the encoder and at each layer; NaN
    where undefined, None in features of an older version."""
    object_ids: np.ndarray | None = None
    """[O, 2] int64: the image's row and the object's id in its mask, in this order."""
    moments: Moments | None = None
    """Sums over tokens at each layer, and at the encoder; None in features of an older version."""
    encoder_moments: Moments | None = None
    decoded: DecodedTokens | None = None
    """Last layer's visual tokens through the LM head; None where the model has none."""
    attention: str = "causal"
    """What image tokens attend to (`prebench.model.architectures.image_attention`)."""
    injected: tuple[int, ...] = ()
    """Layers at whose input features of the encoder are added (`injected_layers`)."""
    structure_metrics: tuple[str, ...] = STRUCTURE_METRICS
    """Names of the K columns."""

    def __len__(self) -> int:
        """Return n, the number of images."""
        return len(self.pooled)

    @property
    def num_layers(self) -> int:
        """Return L, the number of decoder layers."""
        return self.pooled.shape[1] - 1

    def save(self, path: Path) -> None:
        """Write a safetensors file atomically.

        Raises:
            StoreError: the folder can't be written.
        """
        arrays = {name: getattr(self, name) for name in (*ROWS, *_OBJECTS) if getattr(self, name) is not None}
        for name in _SUMS:
            if (sums := getattr(self, name)) is not None:
                arrays |= {f"{name}.{key}": value for key, value in sums.arrays().items()}
        metadata = {"attention": self.attention, "injected": self.injected, "structure_metrics": self.structure_metrics}
        if self.decoded is not None:
            metadata["texts"] = self.decoded.texts
        write_chunks(path, _safetensors(arrays, {name: json.dumps(value) for name, value in metadata.items()}))

    @classmethod
    def load(cls, path: Path) -> ProbeFeatures:
        """Open what `save` wrote; arrays of n rows stay on disk.

        Raises:
            StoreError: the file is missing, damaged or holds something else.
        """
        if not path.is_file():
            raise StoreError(f"{path}: not found")
        try:
            arrays, metadata = _open_safetensors(path)
            decoded = _fields(arrays, "decoded")
            texts = tuple(json.loads(metadata["texts"])) if decoded else ()
            return cls(
                pooled=arrays["pooled"],
                encoder_pooled=arrays["encoder_pooled"],
                structure=arrays["structure"],
                encoder_structure=arrays["encoder_structure"],
                pixels=arrays.get("pixels"),
                objects=arrays.get("objects"),
                object_ids=arrays.get("object_ids"),
                moments=Moments(**own) if (own := _fields(arrays, "moments")) else None,
                encoder_moments=Moments(**own) if (own := _fields(arrays, "encoder_moments")) else None,
                decoded=DecodedTokens(decoded["ids"], decoded["counts"], texts) if decoded else None,
                attention=json.loads(metadata.get("attention", '"causal"')),
                injected=tuple(json.loads(metadata.get("injected", "[]"))),
                structure_metrics=tuple(json.loads(metadata["structure_metrics"])),
            )
        except (KeyError, TypeError, ValueError, OSError) as error:
            raise StoreError(f"{path}: no probe features ({error}); delete it to compute it again") from error

    @classmethod
    def concatenate(cls, parts: Sequence[ProbeFeatures]) -> ProbeFeatures:
        """Return the images of all parts, one part after another; sums are joined.

        Raises:
            DataError: there are no parts, or they come from models of different shape.
        """
        if not parts:
            raise DataError("probe features: no parts to concatenate; extract features of at least one image")
        if len(parts) == 1:
            return parts[0]
        if len({part._shape() for part in parts}) > 1:
            raise DataError("probe features: the parts have different shapes; take all from one model and version")
        first = parts[0]
        joined: dict[str, Any] = {}
        for name in ROWS:
            if getattr(first, name) is not None:
                joined[name] = np.concatenate([getattr(part, name) for part in parts])
        if first.objects is not None:
            starts = np.cumsum([0, *(len(part) for part in parts)])
            joined["objects"] = np.concatenate([part.objects for part in parts if part.objects is not None])
            known = [part.object_ids for part in parts if part.object_ids is not None]
            joined["object_ids"] = np.concatenate(
                [np.add(ids, [start, 0]) for ids, start in zip(known, starts, strict=False)]
            )
        for name in _SUMS:
            if getattr(first, name) is not None:
                joined[name] = type(getattr(first, name)).join([getattr(part, name) for part in parts])
        return replace(first, **joined)

    def take(self, order: np.ndarray) -> ProbeFeatures:
        """Return the images in another order; the sums, which know no order, stay.

        Args:
            order: a permutation of 0..n-1.
        """
        if np.array_equal(order, np.arange(len(self))):
            return self
        rows = {name: getattr(self, name)[order] for name in ROWS if getattr(self, name) is not None}
        if self.objects is not None and self.object_ids is not None:
            ids = np.stack([np.argsort(order)[self.object_ids[:, 0]], self.object_ids[:, 1]], axis=1)
            places = np.lexsort((ids[:, 1], ids[:, 0]))
            rows |= {"objects": self.objects[places], "object_ids": ids[places]}
        return replace(self, **rows)

    def _shape(self) -> tuple[Any, ...]:
        arrays = (getattr(self, name) for name in (*ROWS, "objects"))
        known = tuple(getattr(self, name) is not None for name in _SUMS)
        return (*(None if a is None else a.shape[1:] for a in arrays), known, self.attention, self.structure_metrics)


ROWS = ("pooled", "encoder_pooled", "structure", "encoder_structure", "pixels")
"""Fields with a row per image."""
_SUMS = ("moments", "encoder_moments", "decoded")
_OBJECTS = ("objects", "object_ids")
"""Fields with a row per object."""
assert {*ROWS, *_SUMS, *_OBJECTS} < {field.name for field in fields(ProbeFeatures)}


def _fields(arrays: Mapping[str, np.ndarray], name: str) -> dict[str, np.ndarray]:
    """Return the arrays of one of the sums by field, in memory."""
    return {key.removeprefix(f"{name}."): np.array(a) for key, a in arrays.items() if key.startswith(f"{name}.")}


class RowFile:
    """Rows of images, appended batch by batch to an unnamed file in the folder for temporary files."""

    def __init__(self) -> None:
        self._file: BinaryIO | None = None
        self._shape: tuple[int, ...] = ()
        self._count = 0

    def append(self, rows: np.ndarray) -> None:
        """Append [b, ...] rows, as float32.

        Raises:
            StoreError: the disk is full, or the folder can't be written.
        """
        self._shape = rows.shape[1:]
        self._count += len(rows)
        try:
            self._file = self._file or tempfile.TemporaryFile(prefix="prebench-probe-")  # noqa: SIM115
            self._file.write(np.ascontiguousarray(rows, dtype=np.float32).tobytes())
        except OSError as error:
            raise StoreError(f"{tempfile.gettempdir()}: can't be written ({error.strerror or error})") from error

    def array(self) -> np.ndarray:
        """Return all rows, [n, ...] float32, on disk."""
        assert self._file is not None
        if self._count == 0:  # an empty file can't be mapped
            return np.zeros((0, *self._shape), dtype=np.float32)
        self._file.flush()
        return np.memmap(self._file, dtype=np.float32, mode="r", shape=(self._count, *self._shape))


_TYPES = {"float32": "F32", "float64": "F64", "int64": "I64"}


def _safetensors(arrays: Mapping[str, np.ndarray], metadata: Mapping[str, str]) -> Iterator[bytes]:
    """Yield a safetensors file piece by piece: `safetensors.numpy.save` would need all of it in memory."""
    header: dict[str, Any] = {"__metadata__": dict(metadata)}
    offset = 0
    for name, array in arrays.items():
        end = offset + array.size * array.itemsize
        header[name] = {"dtype": _TYPES[array.dtype.name], "shape": array.shape, "data_offsets": (offset, end)}
        offset = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    yield len(text).to_bytes(8, "little") + text
    for array in arrays.values():
        if array.ndim == 0 or array.size == 0:
            yield array.tobytes()
            continue
        step = max(1, COPY_BYTES // max(1, array[0].size * array.itemsize))
        for start in range(0, len(array), step):
            yield np.ascontiguousarray(array[start : start + step]).tobytes()


def _open_safetensors(path: Path) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """Return a safetensors file's arrays, on disk, and its metadata.

    Raises:
        ValueError, KeyError, TypeError: the file is none, or is cut off.
    """
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if not 0 < length <= path.stat().st_size:
            raise ValueError("its header is damaged")
        header = json.loads(file.read(length))
    metadata = header.pop("__metadata__")
    types = {code: np.dtype(name) for name, code in _TYPES.items()}
    found = {}
    for name, entry in header.items():
        dtype, shape, (start, end) = types[entry["dtype"]], tuple(entry["shape"]), entry["data_offsets"]
        if end - start != math.prod(shape) * dtype.itemsize:
            raise ValueError(f"{name} has another size than its shape says")
        place = 8 + length + start
        found[name] = (
            np.memmap(path, dtype=dtype, mode="r", offset=place, shape=shape) if end > start else np.zeros(shape, dtype)
        )
    return found, metadata
