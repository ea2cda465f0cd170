"""Pictures to probe on, with labels, masks or both: from a local data set that the library `datasets` can read."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from prebench.errors import DataError, did_you_mean
from prebench.images import require_size, whole_images
from prebench.probe.summary import SUBSETS, AttributeLike
from prebench.records import content_hash
from prebench.runtime import derive_seed, file_hash

SPLITS = {"train": "train", "validation": "val", "val": "val", "dev": "val", "valid": "val", "test": "test"}
"""What a split's name says; a data set of other splits, or of one, is divided by `SHARES`."""
SHARES = (1 / 2, 1 / 6)
"""Of an undivided data set, for training and for choosing the penalty; the rest tests."""
VAL_SHARE = 1 / 4
"""Of the training images, to choose the penalty where no split is for that."""


@dataclass(frozen=True)
class Attribute:
    """What the linear probes decode."""

    name: str
    kind: str = ""
    """Which of the model's texts mention it: "asked", "unasked", "rare"; "" where nobody knows."""


@dataclass(frozen=True)
class ProbeData:
    """n images to probe on; `images` and `masks` are decoded when asked for."""

    name: str
    images: Sequence[Image.Image]
    masks: Sequence[np.ndarray | None]
    """Per image object ids, [H, W], 0 = background; or None."""
    labels: dict[str, np.ndarray]
    """[n] integers per attribute."""
    subsets: np.ndarray
    """[n] of "train", "val", "test"; all "test" where there are no labels."""
    attributes: tuple[AttributeLike, ...]
    has_masks: bool
    digest: str
    """Hash of what decides the rows: files and columns."""
    categories: Sequence[Sequence[str]] | None = None
    """Per image the category of each object, that of mask id 1 first; None: not known."""

    def __len__(self) -> int:
        """Return n."""
        return len(self.subsets)


@dataclass(frozen=True)
class Columns:
    """Which columns of a data set to read; None: the usual name, where there is such a column."""

    image: str = "image"
    labels: tuple[str, ...] | None = None
    """By default `label`."""
    mask: str | None = None
    """By default `mask`."""
    subset: str | None = None
    """Names train, val or test per image; by default `subset`, else the splits decide."""
    ignored: tuple[int, ...] = ()
    """Mask ids that are no object, such as 255 for "void"."""
    categories: str | None = field(default=None, repr=False)
    """Per image a list of its objects' categories, that of mask id 1 first; by default `object_categories`."""
    semantic: bool = field(default=False, repr=False)
    """Mask ids are classes, the same in all images; each is its own category."""


def open_data(path: Path, columns: Columns, cache: Path) -> ProbeData:
    """Open an image folder, a folder of Parquet files, one Parquet file, or what `Dataset.save_to_disk` wrote.

    Args:
        path: the folder or file; nothing is fetched.
        columns: which to read.
        cache: folder for what `datasets` writes.

    Raises:
        DataError: there is no data set, a column is missing, or labels are no classes.
    """
    if not path.exists():
        raise DataError(f"{path}: not found; --data takes a local folder or Parquet file (or the word scenes)")
    splits = _splits(path, cache)
    dataset, parts = _joined(splits)
    where = str(path)
    mask = _column(where, dataset, columns.mask, "mask")
    subset = _column(where, dataset, columns.subset, "subset")
    category = None if columns.semantic else _column(where, dataset, columns.categories, "object_categories")
    if columns.image not in dataset.column_names:
        raise DataError(f"{where}: no column {columns.image!r}{did_you_mean(columns.image, dataset.column_names)}")
    labels = _labels(where, dataset, columns.labels)
    if not labels and mask is None:
        raise DataError(
            f"{where}: neither a column of labels nor one of masks is known; name one with --label-columns or "
            f"--mask-column (columns: {', '.join(dataset.column_names)})"
        )
    told = ["semantic"] if columns.semantic else [category] if category else []
    subsets = _subsets(where, dataset, subset, parts) if labels else np.full(len(dataset), "test")
    return ProbeData(
        name=path.resolve().name,
        images=_Decoded(where, "image", dataset, columns.image, _picture),
        masks=_Masks(where, dataset, mask, columns.ignored),
        labels=labels,
        subsets=subsets,
        attributes=tuple(Attribute(name) for name in labels),
        has_masks=mask is not None,
        digest=content_hash([_files(path), repr(columns), *told]),
        categories=_object_categories(where, dataset, columns, category),
    )


class _Ids(Sequence[str]):
    """Every mask id as the name of a category."""

    def __len__(self) -> int:
        return np.iinfo(np.int32).max

    def __getitem__(self, index: Any) -> Any:
        return str(index + 1)


def _object_categories(
    where: str, dataset: Any, columns: Columns, category: str | None
) -> Sequence[Sequence[str]] | None:
    if columns.semantic:
        return [_Ids()] * len(dataset)
    return None if category is None else _categories(where, dataset, category)


def _splits(path: Path, cache: Path) -> dict[str, Any]:
    import datasets

    datasets.disable_progress_bars()
    try:
        if path.is_file():
            if path.suffix != ".parquet":
                raise DataError(f"{path}: no Parquet file; give one, or the folder of a data set")
            return dict(datasets.load_dataset("parquet", data_files=str(path), cache_dir=str(cache)))
        if any((path / name).is_file() for name in ("dataset_info.json", "dataset_dict.json")):
            found = datasets.load_from_disk(str(path))
            return dict(found) if isinstance(found, datasets.DatasetDict) else {"train": found}
        return dict(datasets.load_dataset(str(path.resolve()), cache_dir=str(cache)))
    except (OSError, ValueError, KeyError, TypeError, datasets.exceptions.DatasetsError) as error:
        cause = error.__cause__ or error
        reason = next((line.strip() for line in str(cause).splitlines() if line.strip()), type(cause).__name__)
        raise DataError(f"{path}: `datasets` can't read it: {reason}") from error


def _joined(splits: dict[str, Any]) -> tuple[Any, list[tuple[str, int]]]:
    """Return all splits as one data set, and each split's name and size."""
    import datasets

    parts = [(name, len(split)) for name, split in splits.items()]
    return datasets.concatenate_datasets(list(splits.values())), parts


def _column(where: str, dataset: Any, named: str | None, usual: str) -> str | None:
    if named is None:
        return usual if usual in dataset.column_names else None
    if named not in dataset.column_names:
        raise DataError(f"{where}: no column {named!r}{did_you_mean(named, dataset.column_names)}")
    return named


def _labels(where: str, dataset: Any, named: tuple[str, ...] | None) -> dict[str, np.ndarray]:
    names = named if named is not None else tuple({"label"} & set(dataset.column_names))
    return {name: _classes(f"{where}: column {name!r}", _values(where, dataset, name)) for name in names}


def _categories(where: str, dataset: Any, column: str) -> list[list[str]]:
    found = _values(where, dataset, column)
    for row, names in enumerate(found):
        if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
            raise DataError(
                f"{where}: column {column!r}: row {row} is {names!r:.40}; a list of texts is expected, that of mask "
                "id 1 first"
            )
    return found


def _values(where: str, dataset: Any, name: str) -> list[Any]:
    column = _column(where, dataset, name, "")
    return list(dataset.select_columns([column])[:][column])


def _classes(where: str, values: list[Any]) -> np.ndarray:
    """Return labels as integers; texts are numbered in alphabetical order."""
    for row, value in enumerate(values):
        if value is None or not isinstance(value, (str, int)):
            shown = "empty" if value is None else f"{value!r:.40}, which is no class"
            raise DataError(f"{where}: row {row} is {shown}; a label is a whole number or a text")
    if all(isinstance(value, int) for value in values):
        return np.asarray(values, dtype=np.int64)
    return np.unique(np.asarray([str(value) for value in values]), return_inverse=True)[1].astype(np.int64)


def _subsets(where: str, dataset: Any, column: str | None, parts: list[tuple[str, int]]) -> np.ndarray:
    """Return each image's subset: from a column, from the splits, or drawn by a fixed seed."""
    rng = np.random.default_rng(derive_seed("probe subsets"))
    if column is not None:
        found = np.asarray([SPLITS.get(str(value), str(value)) for value in _values(where, dataset, column)])
        wrong = sorted({str(value) for value in found} - set(SUBSETS))
        if wrong:
            raise DataError(f"{where}: column {column!r} holds {wrong[0]!r}; expected {', '.join(SUBSETS)}")
        return found
    named = [SPLITS.get(name, "") for name, _ in parts]
    if "train" not in named or len(set(named)) == 1:
        order = rng.permutation(len(dataset))
        train, val = (round(share * len(dataset)) for share in SHARES)
        found = np.full(len(dataset), "test", dtype="<U5")
        found[order[:train]], found[order[train : train + val]] = "train", "val"
        return found
    if "test" not in named:  # a public benchmark often keeps its test labels to itself
        named = ["test" if name == "val" else name for name in named]
    found = np.repeat(np.asarray(named, dtype="<U5"), [size for _, size in parts])
    if "val" not in named:
        train_rows = np.flatnonzero(found == "train")
        found[rng.permutation(train_rows)[: round(VAL_SHARE * len(train_rows))]] = "val"
    return found


class _Decoded(Sequence[Any]):
    """One column of pictures, decoded one by one."""

    def __init__(self, where: str, what: str, dataset: Any, column: str, convert: Callable[[Any], Any]) -> None:
        self._where, self._what, self._column, self._convert = where, what, column, convert
        self._rows = dataset.select_columns([column])

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: Any) -> Any:
        try:
            with whole_images():
                return self._convert(self._rows[index][self._column])
        except (OSError, ValueError, SyntaxError, TypeError, AttributeError, Image.DecompressionBombError) as error:
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            raise DataError(f"{self._where}: {self._what} {index} can't be read: {reason}") from error


class _Masks(Sequence[Any]):
    """Masks of images, None throughout where there is no such column."""

    def __init__(self, where: str, dataset: Any, column: str | None, ignored: tuple[int, ...]) -> None:
        self._count, self._ignored = len(dataset), ignored
        self._column = None if column is None else _Decoded(where, "mask", dataset, column, self._mask)

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, index: Any) -> Any:
        return None if self._column is None else self._column[index]

    def _mask(self, value: Any) -> np.ndarray | None:
        if value is None:
            return None
        mask = np.asarray(value)
        if mask.ndim != 2:
            raise ValueError(f"shape {mask.shape}, but it must be [height, width]: one object id per pixel")
        return np.where(np.isin(mask, self._ignored), 0, mask) if self._ignored else mask


def _picture(value: Any) -> Image.Image:
    if not isinstance(value, Image.Image):
        raise ValueError(f"{type(value).__name__} is no picture; store the column as `datasets.Image`")
    require_size(value)
    return value


def _files(path: Path) -> list[tuple[str, str]]:
    """Return name and content hash of every file."""
    if path.is_file():
        return [(path.name, file_hash(path))]
    files = sorted(file for file in path.rglob("*") if file.is_file() and not file.name.startswith("."))
    return [(str(file.relative_to(path)), file_hash(file)) for file in files]
