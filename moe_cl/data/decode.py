"""Image bytes to RGB, once a sample for all its views, the way Pillow's ``convert("RGB")`` gives it.

Usual JPEGs go through libjpeg-turbo (simplejpeg) and usual PNGs through OpenCV, both equal to Pillow byte for byte and
two to four times as fast (benchmarks/README.md). Whatever is odd (CMYK, palette, alpha, 16 bit, WebP ...) and whatever
those two refuse goes to Pillow itself, and Pillow's word on a broken file is final. EXIF orientation is not applied, as
in ``convert("RGB")`` and so in the published pipelines.
"""

from __future__ import annotations

import io
import struct
import warnings
import zlib
from collections.abc import Callable

import cv2
import numpy as np
import simplejpeg
from PIL import Image, JpegImagePlugin, PngImagePlugin, WebPImagePlugin

from moe_cl.config import ConfigError
from moe_cl.data.header import reason

cv2.setNumThreads(0)  # parallel over samples, not inside one; and a pool of threads does not survive a fork
_JPEG, _PNG = b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n"
_OTHERS = ("BMP", "GIF", "TIFF", "PPM")  # never EPS: Pillow would start Ghostscript for it
_PLAIN = {"YCbCr", "Gray", "RGB"}  # colour spaces of a JPEG that need no conversion of our own
_PILLOW_ERRORS = (OSError, SyntaxError, ValueError, EOFError, KeyError, IndexError, OverflowError, struct.error)


class BadImage(ValueError):
    """Bytes that no decoder takes; the text is the reason."""


class TooManyPixels(ValueError):
    """The header promises more than ``max_pixels``; nothing was decoded."""


def decode(data: bytes, *, max_pixels: int = 100_000_000, shorter: int = 0, decoder: str = "auto") -> np.ndarray:
    """(H, W, 3) uint8 RGB.

    Args:
        data: the file's bytes.
        max_pixels: gate on the header's width * height, before anything is decoded.
        shorter: a JPEG may come out smaller (1/2, 1/4, 1/8, in the DCT) if its shorter side stays at least this long;
            0 = never.
        decoder: of usual JPEGs: auto (= simplejpeg), opencv, torchvision or pil.

    Raises:
        TooManyPixels, BadImage.
    """
    if data[:3] == _JPEG:
        return _jpeg(data, max_pixels, shorter, decoder)
    if data[:8] == _PNG and decoder != "pil" and _is_plain_png(data):
        width, height = struct.unpack(">II", data[16:24])
        _gate(width, height, max_pixels)
        image = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR_RGB | cv2.IMREAD_IGNORE_ORIENTATION)
        if image is not None and image.shape[:2] == (height, width):
            return image
    return _pillow(data, max_pixels, 0)


def _jpeg(data: bytes, max_pixels: int, shorter: int, decoder: str) -> np.ndarray:
    try:
        height, width, space, _ = simplejpeg.decode_jpeg_header(data, strict=False)
    except (ValueError, KeyError):  # KeyError: a colour space that it has no name for
        return _pillow(data, max_pixels, shorter)
    _gate(width, height, max_pixels)
    if space in _PLAIN and decoder != "pil":
        factor = next((f for f in (8, 4, 2) if shorter and min(width, height) >= f * shorter), 1)
        try:
            return DECODERS[decoder](data, factor)
        except (ValueError, KeyError, RuntimeError, cv2.error):
            pass  # not strictly valid: Pillow forgives what its users are used to, and names what is broken
    return _pillow(data, max_pixels, shorter)


def _simplejpeg(data: bytes, factor: int) -> np.ndarray:
    if factor == 1:
        return simplejpeg.decode_jpeg(data)
    height, width, _, _ = simplejpeg.decode_jpeg_header(data)
    return simplejpeg.decode_jpeg(data, min_height=height // factor, min_width=width // factor, min_factor=factor)


def _opencv(data: bytes, factor: int) -> np.ndarray:
    flag = {1: cv2.IMREAD_COLOR, 2: cv2.IMREAD_REDUCED_COLOR_2, 4: cv2.IMREAD_REDUCED_COLOR_4}
    flag = flag.get(factor, cv2.IMREAD_REDUCED_COLOR_8) | cv2.IMREAD_IGNORE_ORIENTATION
    image = cv2.imdecode(np.frombuffer(data, np.uint8), flag)
    if image is None:
        raise ValueError("OpenCV cannot read it")
    return cv2.cvtColor(image, cv2.COLOR_BGR2RGB, image)


def _torchvision(data: bytes, factor: int) -> np.ndarray:
    import torch
    from torchvision.io import ImageReadMode, decode_jpeg

    tensor = decode_jpeg(torch.frombuffer(bytearray(data), dtype=torch.uint8), mode=ImageReadMode.RGB)
    return np.ascontiguousarray(tensor.permute(1, 2, 0).numpy())


DECODERS: dict[str, Callable[[bytes, int], np.ndarray]] = {
    "auto": _simplejpeg, "simplejpeg": _simplejpeg, "opencv": _opencv, "torchvision": _torchvision,
}  # fmt: skip


def check_decoder(name: str) -> None:
    """Raises ConfigError if ``name`` is no decoder."""
    if name != "pil" and name not in DECODERS:
        raise ConfigError(f"data.decoder: {name!r} is not one of {', '.join([*DECODERS, 'pil'])}")


def _is_plain_png(data: bytes) -> bool:
    """8-bit grey or RGB, no transparency, every checksum right: what OpenCV reads as Pillow does (and silently)."""
    if len(data) < 33 or data[24] != 8 or data[25] not in (0, 2):
        return False
    view, at = memoryview(data), 8
    while at + 12 <= len(data):
        length = int.from_bytes(view[at : at + 4])
        kind, end = data[at + 4 : at + 8], at + 8 + length
        if kind == b"tRNS" or int.from_bytes(view[end : end + 4]) != zlib.crc32(view[at + 4 : end]):
            return False
        if kind == b"IEND":
            return True
        at = end + 4
    return False


def _gate(width: int, height: int, max_pixels: int) -> None:
    if width * height > max_pixels:
        raise TooManyPixels(f"{width} x {height} pixels are more than data.max_pixels = {max_pixels}")


def _pillow(data: bytes, max_pixels: int, shorter: int) -> np.ndarray:
    stream = io.BytesIO(data)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # EXIF and palette warnings: one a sample would fill the log
        try:
            image = _open(data, stream)
            _gate(*image.size, max_pixels)
            if shorter and min(image.size) >= 2 * shorter:
                image.draft(None, (shorter, shorter))
            return np.array(image.convert("RGB"))
        except TooManyPixels:
            raise
        except Image.DecompressionBombError as error:
            raise TooManyPixels(str(error)) from None
        except _PILLOW_ERRORS as error:
            raise BadImage(reason(error)) from None


def _open(data: bytes, stream: io.BytesIO) -> Image.Image:
    """The usual formats by their magic bytes, without Pillow's own size limit (``_gate`` is ours)."""
    if data[:3] == _JPEG:
        return JpegImagePlugin.JpegImageFile(stream)
    if data[:8] == _PNG:
        return PngImagePlugin.PngImageFile(stream)
    if data[:4] == b"RIFF" and data[8:12] == b"WEBP":
        return WebPImagePlugin.WebPImageFile(stream)
    return Image.open(stream, formats=_OTHERS)
