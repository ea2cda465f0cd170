"""Files of data sets on the Hugging Face Hub: what a revision holds, which of it a table needs, and checked downloads.

The address is HF_ENDPOINT and the token the one that huggingface_hub finds (`hf auth login`, HF_TOKEN).
"""

from __future__ import annotations

import hashlib
import io
import os
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import yaml

from prebench.errors import DataError
from prebench.runtime import file_sha256

README = "README.md"
DESCRIPTIONS = (README, ".huggingface.yaml", "dataset_infos.json")
"""Files that decide how `datasets` divides a data set into configs and splits."""
TIMEOUT = 60.0
"""Seconds until a silent server is given up."""


@dataclass(frozen=True)
class HubFile:
    """One file at a revision."""

    size: int
    sha256: str | None
    """Of large files (LFS); None for small ones."""
    blob_id: str | None
    """Git's hash, by which small files are checked."""


@dataclass(frozen=True)
class Listing:
    """All files of a data set at one commit."""

    repo: str
    commit: str
    files: Mapping[str, HubFile]


@dataclass(frozen=True)
class Table:
    """One config and split, and where its rows lie."""

    config: str
    split: str
    files: tuple[str, ...]
    """In the order of the rows."""
    image_columns: tuple[str, ...]
    """Columns that the data set's description declares as pictures; the Parquet files may declare more."""


class Hub:
    """A Hugging Face Hub."""

    def __init__(self, endpoint: str | None = None) -> None:
        """Take the address; HF_ENDPOINT, or the public Hub, by default."""
        from huggingface_hub import HfApi
        from huggingface_hub.utils import disable_progress_bars

        disable_progress_bars()
        self._api = HfApi(endpoint)
        self.endpoint = self._api.endpoint

    def listing(self, repo: str, revision: str | None) -> Listing:
        """Return the files of a revision (the main branch by default) and the commit that it names.

        Raises:
            DataError: no such data set or revision, no access, or no answer.
        """
        with self._explained(repo, revision):
            info = self._api.dataset_info(repo, revision=revision, files_metadata=True, timeout=TIMEOUT)
        files = {}
        for sibling in info.siblings or []:
            path = PurePosixPath(sibling.rfilename)
            if path.is_absolute() or ".." in path.parts or "\\" in sibling.rfilename:
                raise DataError(f"{self.endpoint}: data set {repo} has a file of unsafe name {sibling.rfilename!r}")
            sha256 = sibling.lfs.sha256 if sibling.lfs else None
            files[sibling.rfilename] = HubFile(sibling.size or 0, sha256, sibling.blob_id)
        if not info.sha:
            raise DataError(f"{self.endpoint}: names no commit for data set {repo}; is it a Hugging Face Hub?")
        return Listing(repo, info.sha, files)

    def fetch(
        self, listing: Listing, name: str, target: Path, partial: Path, report: Callable[[int], None] = lambda _: None
    ) -> str:
        """Download a file unless it is there, going on where an earlier call was cut off, and return its SHA-256.

        Args:
            listing: its data set.
            name: its path there.
            target: where a complete and checked file lies.
            partial: where it lies until then.
            report: called with the number of bytes that came.

        Raises:
            DataError: no access, no answer, or another content than the Hub's checksum; then neither file is left.
        """
        expected = listing.files[name]
        if target.is_file() and target.stat().st_size == expected.size:
            digest = file_sha256(target)
            if _agrees(target, digest, expected):
                return digest
        partial.parent.mkdir(parents=True, exist_ok=True)
        target.parent.mkdir(parents=True, exist_ok=True)
        with self._explained(listing.repo, listing.commit, name):
            self._download(listing, name, partial, report)
        digest = file_sha256(partial)
        if not _agrees(partial, digest, expected):
            partial.unlink()
            raise DataError(
                f"{listing.repo}/{name} at {listing.commit[:12]}: the download has another content than the Hub's "
                f"checksum says ({expected.sha256 or expected.blob_id}); it was deleted, start again"
            )
        partial.replace(target)
        return digest

    def _download(self, listing: Listing, name: str, partial: Path, report: Callable[[int], None]) -> None:
        # hf_hub_download drops a file that was cut off: a kill or a bad line would cost up to a whole large file.
        from huggingface_hub import hf_hub_url
        from huggingface_hub.file_download import http_get
        from huggingface_hub.utils import build_hf_headers

        size = listing.files[name].size
        url = hf_hub_url(listing.repo, name, repo_type="dataset", revision=listing.commit, endpoint=self.endpoint)
        headers = {**build_hf_headers(), "Accept-Encoding": "identity"}
        with _CountedFile(partial, report) as file:
            if file.tell() > size:
                file.truncate(0)
            http_get(url, file, resume_size=file.tell(), headers=headers, expected_size=size, displayed_filename=name)
            os.fsync(file.fileno())

    def tables(self, listing: Listing, wanted: Sequence[tuple[str | None, str]]) -> tuple[list[Table], str]:
        """Return which files hold the wanted configs and splits, and the data set's README.

        `datasets` itself decides, on a folder of empty files with the data set's names and its true descriptions.

        Args:
            listing: the data set.
            wanted: config (None: the only or default one) and split.

        Raises:
            DataError: there is no such config or split, or a description can't be downloaded.
        """
        from datasets import load_dataset_builder

        with tempfile.TemporaryDirectory(prefix="prebench-") as scratch:
            root = Path(scratch).resolve() / "data"
            for name in listing.files:
                (root / name).parent.mkdir(parents=True, exist_ok=True)
                (root / name).touch()
            for name in DESCRIPTIONS:
                if name in listing.files:
                    self.fetch(listing, name, root / name, root.with_name("partial") / name)
            tables = []
            for config, split in wanted:
                try:
                    builder = load_dataset_builder(str(root), config, cache_dir=str(root.with_name("cache")))
                    found = {str(key): files for key, files in builder.config.data_files.items()}[split]
                except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
                    what = f"split {split!r}" if config is None else f"config {config!r} with split {split!r}"
                    raise DataError(
                        f"data set {listing.repo} at {listing.commit[:12]}: no {what} of plain data files "
                        f"({type(error).__name__}: {' '.join(str(error).split())[:200]})"
                    ) from error
                files = tuple(Path(path).relative_to(root).as_posix() for path in found)
                tables.append(Table(builder.config.name, split, files, tuple(_images(builder.info.features or {}))))
            readme = root / README
            return tables, readme.read_text(encoding="utf-8", errors="replace") if readme.is_file() else ""

    @contextmanager
    def _explained(self, repo: str, revision: str | None, name: str = "") -> Iterator[None]:
        """Turn what a request can raise into one line that says what to do."""
        from huggingface_hub import errors

        what = f"data set {repo}" + (f", file {name}" if name else "")
        try:
            yield
        except errors.GatedRepoError as error:
            raise DataError(
                f"{what}: access is restricted; accept the terms at {self.endpoint}/datasets/{repo}, log in with "
                "`hf auth login` (or set HF_TOKEN) and start again"
            ) from error
        except errors.RepositoryNotFoundError as error:
            raise DataError(
                f"{what}: not found at {self.endpoint}; it was moved or deleted, or it is private, and then "
                "`hf auth login` (or HF_TOKEN) gives access"
            ) from error
        except errors.RevisionNotFoundError as error:
            raise DataError(f"{what}: has no revision {revision} at {self.endpoint}") from error
        except errors.OfflineModeIsEnabled as error:
            raise DataError(f"{what}: HF_HUB_OFFLINE is set; unset it to download") from error
        except (errors.HTTPError, OSError) as error:
            if isinstance(error, OSError) and error.errno is not None and not isinstance(error, ConnectionError):
                raise  # the disk's fault
            reason = " ".join(str(error).split()) or type(error).__name__
            raise DataError(
                f"{what}: {self.endpoint} can't be reached or refuses ({reason[:300]}); what has come is kept, start "
                "again"
            ) from error
        except (ValueError, KeyError, TypeError) as error:
            raise DataError(f"{what}: {self.endpoint} doesn't answer as a Hugging Face Hub does ({error})") from error


class _CountedFile(io.FileIO):
    """A file at whose end is written; reports what is written."""

    def __init__(self, path: Path, report: Callable[[int], None]) -> None:
        super().__init__(path, "ab")
        self._report = report

    def write(self, data: Any) -> int:
        written = super().write(data)
        self._report(written)
        return written


def _agrees(path: Path, digest: str, expected: HubFile) -> bool:
    if expected.sha256 is not None:
        return digest == expected.sha256
    if expected.blob_id is None:
        return path.stat().st_size == expected.size
    content = path.read_bytes()
    return hashlib.sha1(b"blob %d\0" % len(content) + content, usedforsecurity=False).hexdigest() == expected.blob_id


def _images(features: Mapping[str, Any]) -> Iterator[str]:
    """Yield the columns that hold pictures or lists of them."""
    from datasets import Image

    for name, feature in features.items():
        if isinstance(feature, Image) or isinstance(getattr(feature, "feature", None), Image):
            yield name


def narrowed_readme(text: str, tables: Sequence[Mapping[str, Any]]) -> str:
    """Return a data set's README with certain configs and splits and no others.

    `datasets` prepares all splits of a config, and counts them against the README.

    Args:
        text: the README on the Hub.
        tables: `config`, `split` and `files` of those that are to stay.
    """
    from huggingface_hub import DatasetCard

    card = DatasetCard(text, ignore_metadata_errors=True)
    front = card.data.to_dict()
    configs: dict[str, dict[str, Any]] = {}
    for table in tables:
        configs.setdefault(table["config"], {})[table["split"]] = table["files"]
    known = {config["config_name"]: config for config in front.get("configs") or []}
    dropped = ("data_files", "data_dir")
    kept = {name: {k: v for k, v in known.get(name, {}).items() if k not in dropped} for name in configs}
    front["configs"] = [
        {"config_name": name, **kept[name], "data_files": [{"split": s, "path": list(f)} for s, f in splits.items()]}
        for name, splits in configs.items()
    ]
    infos = front.pop("dataset_info", None) or []
    features = [
        {key: info[key] for key in ("config_name", "features") if key in info}
        for info in (infos if isinstance(infos, list) else [infos])
        if info.get("config_name", "default") in configs and "features" in info
    ]
    if features:
        front["dataset_info"] = features
    return f"---\n{yaml.safe_dump(front, sort_keys=False, allow_unicode=True)}---\n{card.text}"


def image_columns(path: Path, declared: Sequence[str]) -> dict[str, bool]:
    """Return the columns of a Parquet file that hold pictures, and whether a row holds a list of them.

    Args:
        path: the file.
        declared: columns of pictures by the data set's description.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq
    from datasets import Features

    schema = pq.read_schema(path)
    names = {*declared, *_images(Features.from_arrow_schema(schema))}
    found = {}
    for field in schema:
        is_list = pa.types.is_list(field.type) or pa.types.is_large_list(field.type)
        inner = field.type.value_type if is_list else field.type
        if field.name in names and pa.types.is_struct(inner) and inner.get_field_index("bytes") >= 0:
            found[field.name] = is_list
    return found
