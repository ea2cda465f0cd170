"""What a readable picture is, how records name it, and the marker that takes the place of one that is not.

A mirror finds unreadable pictures when it is made, and puts a marker in their place: a small picture whose pixels spell
out the reason. It survives what upstream's task code does while it loads a task (converting to RGB, storing as PNG), no
document moves, and the engine turns it into an error instead of asking about it.
"""

from __future__ import annotations

import hashlib
import io
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
from PIL import Image, ImageFile

MAX_PIXELS = 64_000_000
"""Larger images are errors (a 50,000 x 50,000 PNG is a few kilobytes on disk and 7 GB in memory)."""
MAGIC = b"\x89prebench-unreadable\x1a"
MARKER_WIDTH = 16
MAX_REASON = 300
"""Bytes of a reason that a marker keeps."""


@contextmanager
def whole_images() -> Iterator[None]:
    """Let a truncated picture fail: where lmms-eval is imported, PIL fills it up with grey."""
    before = ImageFile.LOAD_TRUNCATED_IMAGES
    ImageFile.LOAD_TRUNCATED_IMAGES = False
    try:
        yield
    finally:
        ImageFile.LOAD_TRUNCATED_IMAGES = before


def require_size(image: Image.Image) -> None:
    """Refuse an image that is too large to be decoded; reads its header alone.

    Raises:
        ValueError: it has more than MAX_PIXELS pixels.
    """
    width, height = image.size
    if width * height > MAX_PIXELS:
        raise ValueError(f"image of {width} x {height} pixels exceeds the limit of {MAX_PIXELS:,} pixels")


def to_rgb(image: Image.Image) -> Image.Image:
    """Return an image in RGB, as processors convert it: the first frame, transparency and orientation tags ignored.

    An image that is in RGB is returned itself.

    16-bit grey is scaled to 8 bits; PIL alone would clip it, which leaves a white picture.

    Raises:
        ValueError: the pixels have no defined range (modes I and F), or the mode can't be converted.
        OSError, ...: the file is broken.
    """
    if image.mode.startswith("I;16"):
        return Image.fromarray((np.asarray(image).astype(np.uint32) // 257).astype(np.uint8)).convert("RGB")
    if image.mode in ("I", "F"):
        raise ValueError(
            f"image of mode {image.mode}: the range of its 32-bit values is not defined; store 8 or 16 bits"
        )
    return image if image.mode == "RGB" else image.convert("RGB")


def pixel_hash(rgb: Image.Image) -> str:
    """Return the content hash by which records name a picture: that of its size and pixels.

    Args:
        rgb: from `to_rgb`.
    """
    return hash_of_pixels(rgb.size, rgb.tobytes())


def hash_of_pixels(size: tuple[int, int], pixels: bytes) -> str:
    """Return what `pixel_hash` does, from width, height and the RGB bytes."""
    digest = hashlib.sha256(f"{size[0]}x{size[1]}:".encode())
    digest.update(pixels)
    return digest.hexdigest()[:16]


def marker(reason: str) -> bytes:
    """Return a PNG that stands for an unreadable image; equal reasons give equal pixels."""
    text = reason.encode()[:MAX_REASON]
    payload = MAGIC + len(text).to_bytes(2, "big") + text
    row = 3 * MARKER_WIDTH
    height = -(-len(payload) // row)
    image = Image.frombytes("RGB", (MARKER_WIDTH, height), payload.ljust(row * height, b"\0"))
    buffer = io.BytesIO()
    image.save(buffer, format="PNG")
    return buffer.getvalue()


def marked_reason(image: Image.Image) -> str | None:
    """Return the reason that a marker carries; None for every other image.

    Args:
        image: in RGB.
    """
    if image.width != MARKER_WIDTH:
        return None
    pixels = image.tobytes()
    if not pixels.startswith(MAGIC):
        return None
    start = len(MAGIC) + 2
    length = int.from_bytes(pixels[len(MAGIC) : start], "big")
    return pixels[start : start + length].decode(errors="ignore")
