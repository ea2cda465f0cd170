"""Image files that data sets hold and decoders stumble over, made in memory."""

from __future__ import annotations

import io
import struct
import zlib

import numpy as np
from PIL import Image


def picture(seed: int, mode: str = "RGB") -> Image.Image:
    """A smooth picture of 48 x 64 pixels; smooth, so that JPEG keeps it."""
    rng = np.random.default_rng(seed)
    x, y = np.meshgrid(np.linspace(0, 1, 64), np.linspace(0, 1, 48))
    channels = [127 + 120 * np.sin(6 * (x * rng.normal() + y * rng.normal() + rng.random())) for _ in range(3)]
    return Image.fromarray(np.stack(channels, axis=2).astype(np.uint8)).convert(mode)


def encoded(image: Image.Image, form: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, form, **options)
    return buffer.getvalue()


def opened(content: bytes) -> Image.Image:
    return Image.open(io.BytesIO(content))


def png(width: int, height: int, bit_depth: int, color_type: int, rows: bytes) -> bytes:
    """Write a PNG by hand, whatever its header claims; `rows` are the filtered scan lines."""
    header = struct.pack(">IIBBBBB", width, height, bit_depth, color_type, 0, 0, 0)
    chunks = [(b"IHDR", header), (b"IDAT", zlib.compress(rows)), (b"IEND", b"")]
    parts = [struct.pack(">I", len(d)) + t + d + struct.pack(">I", zlib.crc32(t + d)) for t, d in chunks]
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


def bomb(width: int = 50_000, height: int = 50_000) -> bytes:
    """A PNG of a few hundred bytes that would take gigabytes in memory."""
    return png(width, height, 8, 2, bytes(100_000))


def rgb16(image: Image.Image) -> bytes:
    """A PNG with 16 bits per channel that shows an 8-bit picture."""
    pixels = np.asarray(image.convert("RGB")).astype(">u2") * 257
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in pixels)
    return png(image.width, image.height, 16, 2, rows)


def grey16(image: Image.Image) -> bytes:
    """A grey PNG with 16 bits that shows an 8-bit picture."""
    return encoded(Image.fromarray(np.asarray(image.convert("L")).astype(np.uint16) * 257), "PNG")


def transparent(image: Image.Image) -> Image.Image:
    """A picture whose left half is transparent."""
    alpha = np.full((image.height, image.width), 255, dtype=np.uint8)
    alpha[:, : image.width // 2] = 0
    image = image.copy()
    image.putalpha(Image.fromarray(alpha))
    return image


def rotated(image: Image.Image) -> bytes:
    """A JPEG whose EXIF orientation asks for a quarter turn."""
    exif = Image.Exif()
    exif[0x0112] = 6
    return encoded(image, "JPEG", exif=exif)


def animated(*frames: Image.Image) -> bytes:
    return encoded(frames[0], "GIF", save_all=True, append_images=list(frames[1:]))


def answered() -> dict[str, tuple[bytes, Image.Image]]:
    """Files that must be answered: name to (content, the plain RGB picture that must get the same answer)."""
    contents = {
        "jpeg": encoded(picture(1), "JPEG"),
        "cmyk": encoded(picture(2, "CMYK"), "JPEG"),
        "palette": encoded(picture(3).quantize(16), "PNG", transparency=0),
        "palette-bytes": encoded(picture(4).quantize(16), "PNG", transparency=bytes([0, 128] + [255] * 14)),
        "rgba": encoded(transparent(picture(5)), "PNG"),
        "la": encoded(transparent(picture(6, "L")), "PNG"),
        "bilevel": encoded(picture(7, "1"), "PNG"),
        "1x1": encoded(picture(8).crop((5, 5, 6, 6)), "PNG"),
        "1x64": encoded(picture(9).crop((0, 5, 64, 6)), "PNG"),
        "3x3": encoded(picture(10).crop((0, 0, 3, 3)), "PNG"),
    }
    found = {name: (content, opened(content).convert("RGB")) for name, content in contents.items()}
    found["16-bit grey"] = grey16(picture(11)), picture(11, "L").convert("RGB")
    found["16-bit colour"] = rgb16(picture(12)), picture(12)
    gif = animated(picture(13), picture(14))
    found["animated"] = gif, opened(gif).convert("RGB")
    return found


def failing() -> dict[str, tuple[bytes, str]]:
    """Files that must become errors: name to (content, a part of the reason)."""
    whole = encoded(picture(20), "PNG", compress_level=0)
    return {
        "truncated": (whole[: len(whole) // 2], "truncated"),
        "zero bytes": (b"", "cannot identify"),
        "no image": (b"<html>not found</html>", "cannot identify"),
        "bomb": (bomb(), "2500000000 pixels"),
        "too large": (bomb(8001, 8000), "8001 x 8000 pixels"),
        "32-bit float": (encoded(Image.new("F", (20, 20), 0.5), "TIFF"), "mode F"),
    }
