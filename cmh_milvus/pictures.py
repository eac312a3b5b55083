"""Pictures from strangers: opened safely, always the same way.

Only JPEG, PNG, WebP, GIF and BMP are read (other Pillow decoders have had open advisories), and the number of
pixels is checked before one of them is decoded.
"""

from __future__ import annotations

import base64
import hashlib
import io
import stat
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TypeAlias

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from cmh_milvus.errors import PictureError, SettingsError

PictureSource: TypeAlias = Path | bytes | Image.Image

FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP")
FORMAT_NAMES = "JPEG, PNG, WebP, GIF or BMP"
PICTURE_SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp"})
MAX_PIXELS = 50_000_000
MAX_FILE_BYTES = 512 * 1024 * 1024

_KINDS = (
    (stat.S_ISDIR, "a directory"),
    (stat.S_ISFIFO, "a named pipe"),
    (stat.S_ISCHR, "a device"),
    (stat.S_ISBLK, "a device"),
    (stat.S_ISSOCK, "a socket"),
)

# `warnings.catch_warnings` changes the whole process, so two threads must not be inside it at once.
_warnings_lock = threading.Lock()


@contextmanager
def _quiet() -> Iterator[None]:
    """Without Pillow's warnings on damaged metadata: a picture is either read or refused."""
    with _warnings_lock, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def read_picture_bytes(path: Path) -> bytes:
    """The bytes of a picture file.

    Args:
        path: A regular file of at most 512 MiB (links are followed).

    Raises:
        PictureError: It is missing, unreadable, empty, too large, or not a regular file.
    """
    try:
        status = path.stat()  # before opening: opening a named pipe would wait for ever
        if not stat.S_ISREG(status.st_mode):
            kind = next((name for test, name in _KINDS if test(status.st_mode)), "not a file")
            raise PictureError(f"{_name(path)} is {kind}, not a picture file")
        if status.st_size > MAX_FILE_BYTES:
            raise PictureError(
                f"{_name(path)} has {status.st_size:,} bytes; a picture may have {MAX_FILE_BYTES:,} at most"
            )
        data = path.read_bytes()
    except FileNotFoundError:
        raise PictureError(f"{_name(path)} does not exist") from None
    except (OSError, ValueError) as error:  # ValueError: a NUL in the name
        reason = getattr(error, "strerror", None) or error
        raise PictureError(f"{_name(path)} cannot be read: {reason}") from error
    if not data:
        raise PictureError(f"{_name(path)} is empty (0 bytes)")
    return data


def open_picture(source: PictureSource) -> Image.Image:
    """A picture as RGB, upright, transparency laid on white; the first frame of an animation.

    Args:
        source: A path, the bytes of a picture file, or a Pillow image (left unchanged).

    Returns:
        An image of mode RGB that holds its pixels in memory.

    Raises:
        PictureError: It is not a readable JPEG, PNG, WebP, GIF or BMP of at most 50 million pixels; the text
            says what is wrong with it.
        SettingsError: It is none of these three.

    Example:
        >>> open_picture(Image.new("L", (3, 2))).mode
        'RGB'
    """
    if isinstance(source, Image.Image):
        return _rgb(source, "the picture")
    if isinstance(source, bytes):
        name, data = f"the picture of {len(source):,} bytes", source
        if not data:
            raise PictureError("the picture is empty (0 bytes)")
    elif isinstance(source, Path):
        name, data = _name(source), read_picture_bytes(source)
    else:
        raise SettingsError(
            f"a picture is a pathlib.Path, the bytes of a file or a PIL.Image.Image, not a {type(source).__name__}"
            + (f": give Path({source!r})" if isinstance(source, str) else "")
        )
    try:
        with _quiet():
            image = Image.open(io.BytesIO(data), formats=FORMATS)
    except Image.DecompressionBombError:
        raise PictureError(f"{name} has more than {MAX_PIXELS:,} pixels: make it smaller first") from None
    except UnidentifiedImageError:
        raise PictureError(f"{name} is not a picture in {FORMAT_NAMES} format, or is cut off near its start") from None
    except Exception as error:  # decoders raise nearly any type on damaged bytes
        raise PictureError(f"{name} is damaged: {error}") from error
    with image:
        return _rgb(image, name)


def thumbnail_data_uri(source: PictureSource, size: int = 96) -> str:
    """A small copy of a picture as a `data:` URI, for a page that stands alone.

    Args:
        source: As for `open_picture`.
        size: Longest side, in pixels.

    Raises:
        PictureError: The picture cannot be read.
    """
    image = open_picture(source)
    image.thumbnail((size, size))
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=80)
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode("ascii")


def content_hash(source: Path | bytes) -> str:
    """SHA-256 of the bytes of a picture file, hexadecimal.

    Raises:
        PictureError: The file cannot be read.
    """
    data = source if isinstance(source, bytes) else read_picture_bytes(source)
    return hashlib.sha256(data).hexdigest()


def _name(path: Path) -> str:
    return repr(str(path))  # repr: a file name may hold line ends and bytes that are not text


def _rgb(image: Image.Image, name: str) -> Image.Image:
    if image.width * image.height > MAX_PIXELS:
        raise PictureError(
            f"{name} has {image.width:,} x {image.height:,} pixels, more than {MAX_PIXELS:,}: make it smaller first"
        )
    if not image.width or not image.height:
        raise PictureError(f"{name} has no pixels ({image.width} x {image.height})")
    try:
        image.load()
        image = _upright(image)
        if image.mode == "I" or image.mode.startswith("I;16"):  # 16 bits a pixel; Pillow would clip at 255
            values = np.asarray(image).astype(np.float64).clip(0, 65_535) / 257
            image = Image.fromarray(values.round().astype(np.uint8))
        elif image.has_transparency_data:
            image = image.convert("RGBA")
            white = Image.new("RGBA", image.size, "white")
            white.alpha_composite(image)
            image = white
        return image.convert("RGB")
    except Exception as error:
        raise PictureError(f"{name} is damaged or cut off: {error}") from error


def _upright(image: Image.Image) -> Image.Image:
    with _quiet():
        try:
            return ImageOps.exif_transpose(image)
        except Exception:  # damaged metadata on good pixels: keep them as they lie
            return image
