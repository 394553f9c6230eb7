"""What an image's header says, without decoding a pixel: format, width, height, mode.

Pillow's plugins read only the header when a file is opened. They are called by the file's own magic bytes, never by its
name (ImageNet has a PNG named ``.JPEG``), and without Pillow's size limit: how many pixels are too many is the caller's
decision, from the numbers returned here.
"""

from __future__ import annotations

import io
import re
import struct
import warnings
from dataclasses import dataclass
from functools import partial
from typing import BinaryIO

from PIL import Image, JpegImagePlugin, PngImagePlugin, WebPImagePlugin

EXTENSIONS = ("jpg", "jpeg", "png", "webp", "bmp", "gif", "tif", "tiff", "ppm", "pgm")
FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF", "PPM")  # never EPS: Pillow starts Ghostscript for it
KEPT = {"JPEG": "jpg", "PNG": "png", "WEBP": "webp"}  # formats whose bytes a shard keeps, and the member's extension


class BadImage(ValueError):
    """Bytes that no image reader takes."""


@dataclass(frozen=True)
class Header:
    """``format`` as Pillow names it (JPEG, PNG, WEBP, BMP, ...), size in pixels as stored, Pillow's ``mode``."""

    format: str
    width: int
    height: int
    mode: str


def probe(source: bytes | BinaryIO) -> Header:
    """The header of an image. Raises BadImage with the reason.

    Args:
        source: the file's bytes, or a seekable binary file that stands at the image's start.
    """
    stream = io.BytesIO(source) if isinstance(source, (bytes, bytearray, memoryview)) else source
    magic = stream.read(16)
    stream.seek(-len(magic), io.SEEK_CUR)
    if not magic:
        raise BadImage("no bytes")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            image = _reader(magic)(stream)
    except Image.DecompressionBombError as error:
        raise BadImage(f"decompression bomb: {error}") from None
    except (OSError, SyntaxError, ValueError, EOFError, struct.error, KeyError, IndexError, OverflowError) as error:
        raise BadImage(reason(error)) from None
    width, height = image.size
    if width < 1 or height < 1:
        raise BadImage(f"header says {width} x {height} pixels")
    return Header("JPEG" if image.format == "MPO" else image.format, width, height, image.mode)


def reason(error: Exception) -> str:
    """One line of what Pillow says, the same in every run: without the address of the file object."""
    return " ".join(re.sub(r" <[^>]* at 0x[0-9a-f]+>", "", str(error)).split()) or type(error).__name__


def _reader(magic: bytes):
    if magic.startswith(b"\xff\xd8\xff"):
        return JpegImagePlugin.JpegImageFile
    if magic.startswith(b"\x89PNG\r\n\x1a\n"):
        return PngImagePlugin.PngImageFile
    if magic.startswith(b"RIFF") and magic[8:12] == b"WEBP":
        return WebPImagePlugin.WebPImageFile
    return partial(Image.open, formats=FORMATS)
