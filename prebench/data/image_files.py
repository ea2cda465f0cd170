"""Pictures of training data: found within their folder only, checked, and read whole."""

from __future__ import annotations

import hashlib
import io
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path, PurePosixPath

from PIL import Image

from prebench.errors import DataError
from prebench.images import require_size, to_rgb, whole_images


class ImageFolders:
    """Image paths of an annotation file to files: in one folder, or in one for each first part of the paths.

    Args:
        root: the folder, or folders by the first part of the path that they replace.

    Raises:
        DataError: a folder does not exist.
    """

    def __init__(self, root: str | Path | Mapping[str, str]) -> None:
        named = {"": root} if isinstance(root, (str, Path)) else root
        self._roots = {part: Path(folder).expanduser() for part, folder in named.items()}
        for folder in self._roots.values():
            if not folder.is_dir():
                raise DataError(f"{folder}: no such folder; name the images' folder in image_root")
        self._resolved = {part: folder.resolve() for part, folder in self._roots.items()}

    def find(self, name: str) -> Path:
        """Return the file of an image path.

        Raises:
            DataError: the path is absolute, has a "..", leads out of its folder by a link, or names no file.
        """
        path = PurePosixPath(name)
        if not name.strip() or "\0" in name or "\\" in name:
            raise DataError(f"image path {name!r}: not a path of a file")
        if path.is_absolute() or ".." in path.parts or Path(name).drive:
            raise DataError(f"image path {name!r}: absolute paths and '..' are refused")
        part = "" if "" in self._roots else path.parts[0]
        if part not in self._roots:
            raise DataError(f"image path {name!r}: image_root names no folder for {part!r}")
        inner = PurePosixPath(*path.parts[1:]) if part else path
        try:
            found = (self._roots[part] / inner).resolve(strict=True)
        except (OSError, RuntimeError) as error:
            raise DataError(f"image {name!r}: no such file in {self._roots[part]}") from error
        if not found.is_relative_to(self._resolved[part]):
            raise DataError(f"image path {name!r}: a link leads out of {self._roots[part]}; refused")
        if not found.is_file():
            raise DataError(f"image {name!r}: no file")
        return found


def read_bytes(path: Path) -> bytes:
    """Return a file's content.

    Raises:
        DataError: it can't be read.
    """
    try:
        return path.read_bytes()
    except OSError as error:
        raise DataError(f"{path}: can't be read ({error.strerror})") from error


def decode(content: bytes, what: str) -> Image.Image:
    """Return a picture in RGB.

    Args:
        content: the encoded picture.
        what: its name for messages.

    Raises:
        DataError: it is no whole picture of a size that is allowed.
    """
    with _opened(content, what) as image:
        image.load()
        return to_rgb(image)


def check(content: bytes, what: str, whole: bool) -> str:
    """Check a picture and return its content's hash.

    Args:
        content: the encoded picture.
        what: its name for messages.
        whole: decode it; otherwise its header alone is read.

    Raises:
        DataError: as `decode`.
    """
    with _opened(content, what) as image:
        if whole:
            image.load()
            to_rgb(image)
    return hashlib.sha256(content).hexdigest()


@contextmanager
def _opened(content: bytes, what: str) -> Iterator[Image.Image]:
    """Open a picture, its pixels not read yet; whatever a decoder raises becomes one line."""
    try:
        with whole_images():
            if not content:
                raise ValueError("the file is empty")
            image: Image.Image = Image.open(io.BytesIO(content))
            require_size(image)
            yield image
    except Exception as error:
        reason = " ".join(re.sub("<_io.BytesIO object[^>]*>", "the file", str(error)).split())
        raise DataError(f"image {what!r}: {type(error).__name__}: {reason[:200]}") from error


def pad_to_square(image: Image.Image, color: tuple[int, int, int]) -> Image.Image:
    """Return a picture in the middle of a square of one colour, as LLaVA reads it; a square one as it is."""
    side = max(image.size)
    if image.width == image.height:
        return image
    square = Image.new("RGB", (side, side), color)
    square.paste(image, ((side - image.width) // 2, (side - image.height) // 2))
    return square
