"""What becomes of an image's bytes on the way into a shard: kept, resized, or made PNG where shards lack the format."""

from __future__ import annotations

import io

import numpy as np
from PIL import Image

from moe_cl.data.header import KEPT, BadImage, Header, probe, reason


def prepare(data: bytes, shorter: int | None, quality: int) -> tuple[bytes, str, int, int]:
    """(bytes, extension, width, height) as they go into the shard. Raises BadImage.

    Args:
        shorter: target of the shorter side; images that are not larger stay as they are. None keeps every size.
        quality: of the JPEG that a resized image becomes.
    """
    header = probe(data)
    if shorter is not None and min(header.width, header.height) > shorter:
        return _resized(data, header, shorter, quality)
    if header.format in KEPT:
        return data, KEPT[header.format], header.width, header.height
    out = io.BytesIO()
    image = _load(data)
    if image.mode not in ("1", "L", "LA", "P", "RGB", "RGBA", "I", "I;16"):
        image = image.convert("RGB")
    image.save(out, "PNG")
    return out.getvalue(), "png", header.width, header.height


def _resized(data: bytes, header: Header, shorter: int, quality: int) -> tuple[bytes, str, int, int]:
    import cv2  # a tenth of a second that runs without re-encoding need not spend
    import simplejpeg

    cv2.setNumThreads(1)  # the workers are processes
    scale = shorter / min(header.width, header.height)
    width, height = (max(round(side * scale), shorter) for side in (header.width, header.height))
    gray = header.mode in ("L", "1", "LA", "I;16")
    space = "GRAY" if gray else "RGB"
    if header.format == "JPEG" and header.mode in ("L", "RGB"):
        try:
            # The decoder's own scaling (n/8 in the DCT) does most of the shrinking, and never goes below the target.
            pixels = simplejpeg.decode_jpeg(data, space, min_height=height, min_width=width, min_factor=1)
        except ValueError as error:
            raise BadImage(str(error)) from None
    else:
        pixels = np.asarray(_load(data).convert("L" if gray else "RGB"))
    if pixels.shape[:2] != (height, width):
        pixels = cv2.resize(np.squeeze(pixels), (width, height), interpolation=cv2.INTER_AREA)
    pixels = np.ascontiguousarray(pixels.reshape(height, width, -1))
    encoded = simplejpeg.encode_jpeg(
        pixels, quality=quality, colorspace=space, colorsubsampling="Gray" if gray else "420"
    )
    return encoded, "jpg", width, height


def _load(data: bytes) -> Image.Image:
    try:
        image = Image.open(io.BytesIO(data))
        image.load()
        return image
    except (OSError, ValueError, SyntaxError, EOFError, Image.DecompressionBombError) as error:
        raise BadImage(reason(error)) from None
