"""Tables of `datasets`: The Cauldron's and FineVision's columns (images, texts), and messages as TRL reads them.

Read from Parquet files, a folder of them, or a data set on the Hub at a pinned commit. Of a stream the first rows are
fetched once and kept in the cache of `datasets`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import datasets
from datasets import Dataset, IterableDataset

from prebench.data.llava_json import IMAGE
from prebench.data.records import Record, image_part, require_text, text_part
from prebench.errors import DataError
from prebench.schema import TableConfig

ROLES = ("system", "user", "assistant")


class Table:
    """The rows of one table.

    Args:
        config: where it lies, and its columns.

    Raises:
        DataError: it can't be read, or a column is missing.
    """

    def __init__(self, config: TableConfig) -> None:
        self.config = config
        self.name = config.path if config.revision is None else f"{config.path}@{config.revision[:8]}"
        rows = _load(config)
        text_column = config.columns.texts if config.type == "cauldron" else config.columns.messages
        if text_column not in rows.column_names:
            field = "texts" if config.type == "cauldron" else "messages"
            known = ", ".join(rows.column_names)
            raise DataError(f"{self.name}: no column {text_column!r} (columns.{field}); it has {known}")
        self._text_column = text_column
        self._image_column = config.columns.images if config.columns.images in rows.column_names else None
        columns = [text_column, *([self._image_column] if self._image_column else [])]
        self._rows = _undecoded(rows.select_columns(columns), self._image_column)
        self.key = str(rows._fingerprint)

    def __len__(self) -> int:
        return len(self._rows)

    def where(self, index: int) -> str:
        """Return how messages name a row."""
        return f"{self.name}: row {index}"

    def record(self, index: int) -> Record:
        """Return a row's messages and the names of its pictures: their places in the row.

        Raises:
            DataError: the row is malformed; the field is named.
        """
        row = self._rows[index]
        count = len(self._pictures(row))
        value = row[self._text_column]
        if self.config.type == "cauldron":
            messages = cauldron_messages(value, count, self._text_column)
        else:
            messages = trl_messages(value, count, self._text_column)
        return Record(messages, tuple(str(number) for number in range(count)))

    def image(self, index: int, name: str) -> bytes:
        """Return a picture's bytes.

        Raises:
            DataError: the row holds none; paths in tables are never followed.
        """
        picture = self._pictures(self._rows[index])[int(name)]
        content = picture.get("bytes") if isinstance(picture, Mapping) else None
        if content is None:
            raise DataError(f"{self._image_column}[{name}]: the row holds no bytes of this picture")
        return bytes(content)

    def _pictures(self, row: Mapping[str, Any]) -> list[Any]:
        value = row[self._image_column] if self._image_column else None
        return [] if value is None else list(value) if isinstance(value, list) else [value]


def _load(config: TableConfig) -> Dataset:
    try:
        rows = _open(config)
        if isinstance(rows, IterableDataset):
            assert config.num_examples is not None
            return Dataset.from_generator(_first_rows, gen_kwargs={"rows": rows, "number": config.num_examples})
        return rows if config.num_examples is None else rows.select(range(min(config.num_examples, len(rows))))
    except DataError:
        raise
    except Exception as error:  # `datasets` raises its own, pyarrow's, fsspec's and the Hub's errors
        reason = " ".join(str(error).split())[:300]
        raise DataError(f"{config.path}: can't be read as a table ({type(error).__name__}: {reason})") from error


def _open(config: TableConfig) -> Dataset | IterableDataset:
    path = Path(config.path).expanduser()
    if path.is_file() or path.is_dir():
        files = [path] if path.is_file() else sorted(path.rglob("*.parquet"))
        if not files:
            raise DataError(f"{path}: no Parquet files in this folder")
        datasets.disable_progress_bars()  # of the copy in its cache
        return datasets.load_dataset(
            "parquet", data_files=[str(file) for file in files], split="train", streaming=config.streaming
        )
    if config.path.startswith((".", "/", "~")) or config.path.count("/") != 1 or config.path.endswith(".parquet"):
        raise DataError(f"{config.path}: no such file or folder, and no id of a data set on the Hub")
    if config.revision is None:
        raise DataError(f"{config.path}: a data set on the Hub needs its commit in `revision` (40 hex digits)")
    return datasets.load_dataset(
        config.path, config.subset, split=config.split, revision=config.revision, streaming=config.streaming
    )


def _first_rows(rows: IterableDataset, number: int) -> Iterator[dict[str, Any]]:
    names = [name for name, feature in (rows.features or {}).items() if _is_image(feature)]
    for name in names:
        rows = rows.cast_column(name, _raw(rows.features[name]))
    yield from rows.take(number)


def _is_image(feature: Any) -> bool:
    return isinstance(getattr(feature, "feature", feature), datasets.Image)


def _raw(feature: Any) -> Any:
    image = datasets.Image(decode=False)
    return datasets.List(image) if hasattr(feature, "feature") else image


def _undecoded(rows: Dataset, column: str | None) -> Dataset:
    if column is None:
        return rows
    feature = rows.features[column]
    return rows.cast_column(column, _raw(feature)) if _is_image(feature) else rows


def cauldron_messages(value: Any, num_images: int, field: str) -> list[dict[str, Any]]:
    """Return a row's turns as chat messages; its pictures open the first turn.

    Args:
        value: list of {user, assistant}.
        num_images: pictures of the row.
        field: the column, for messages.

    Raises:
        DataError: the turns are malformed.
    """
    if not isinstance(value, list) or not value:
        raise DataError(f"{field}: a list of {{user, assistant}} is expected")
    messages: list[dict[str, Any]] = []
    for number, turn in enumerate(value):
        where = f"{field}[{number}]"
        if not isinstance(turn, Mapping):
            raise DataError(f"{where}: {{user, assistant}} is expected")
        texts = {role: require_text(turn.get(role), f"{where}.{role}") for role in ("user", "assistant")}
        for role, text in texts.items():
            if not text.strip() and not (role == "user" and number == 0 and num_images):
                raise DataError(f"{where}.{role}: empty")
            if IMAGE in text:
                raise DataError(f"{where}.{role}: {IMAGE} in a text; the column of images places them")
        pictures = [image_part()] * (num_images if number == 0 else 0)
        question = [text_part(texts["user"])] if texts["user"] else []
        messages.append({"role": "user", "content": [*pictures, *question]})
        messages.append({"role": "assistant", "content": [text_part(texts["assistant"])]})
    return messages


def trl_messages(value: Any, num_images: int, field: str) -> list[dict[str, Any]]:
    """Return a row's messages with every content as a list of parts.

    Where no part places a picture, the pictures open the first user turn, as TRL has it.

    Args:
        value: list of {role, content}; the content a text or a list of parts.
        num_images: pictures of the row.
        field: the column, for messages.

    Raises:
        DataError: the messages are malformed.
    """
    if not isinstance(value, list) or not value:
        raise DataError(f"{field}: a list of {{role, content}} is expected")
    messages = []
    for number, message in enumerate(value):
        where = f"{field}[{number}]"
        if not isinstance(message, Mapping) or message.get("role") not in ROLES:
            raise DataError(f"{where}.role: one of {', '.join(ROLES)} is expected")
        content = _parts(message.get("content"), f"{where}.content", message["role"])
        messages.append({"role": message["role"], "content": content})
    _require_turns(messages, field)
    placed = sum(part["type"] == "image" for message in messages for part in message["content"])
    if placed == 0 and num_images:
        first = next(message for message in messages if message["role"] == "user")
        first["content"] = [image_part()] * num_images + first["content"]
    elif placed != num_images:
        raise DataError(f"{field}: {placed} parts of type image for {num_images} images")
    return messages


def _parts(content: Any, where: str, role: str) -> list[dict[str, str]]:
    parts = [{"type": "text", "text": content}] if isinstance(content, str) else content
    if not isinstance(parts, list) or not parts:
        raise DataError(f"{where}: a text or a list of parts is expected")
    found = []
    for number, part in enumerate(parts):
        kind = part.get("type") if isinstance(part, Mapping) else None
        if kind == "image" and role == "user":
            found.append(image_part())
        elif kind == "text":
            text = require_text(part.get("text"), f"{where}[{number}].text")
            if not text.strip():
                raise DataError(f"{where}[{number}].text: empty")
            found.append(text_part(text))
        else:
            allowed = "'text' or 'image'" if role == "user" else "'text'"
            raise DataError(f"{where}[{number}].type: {allowed} is expected in a {role} turn")
    # What an assistant says is one text, so that no template stands between its parts.
    return found if role == "user" else [text_part("".join(part["text"] for part in found))]


def _require_turns(messages: Sequence[Mapping[str, Any]], field: str) -> None:
    first = 1 if messages[0]["role"] == "system" else 0
    for number, message in enumerate(messages[first:], first):
        expected = "user" if (number - first) % 2 == 0 else "assistant"
        if message["role"] != expected:
            raise DataError(f"{field}[{number}].role: {expected!r} is expected, user and assistant take turns")
    if messages[-1]["role"] != "assistant":
        raise DataError(f"{field}[{len(messages) - 1}]: the last turn has no answer")
