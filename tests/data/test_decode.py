"""Odd files come out as Pillow's ``convert("RGB")`` gives them; broken ones are refused; big ones decode smaller."""

import io
import struct

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from moe_cl.config import ConfigError
from moe_cl.data import decode as module
from moe_cl.data.decode import BadImage, TooManyPixels, check_decoder, decode
from tests.data.shards import encoded, picture

RGB = Image.fromarray(picture(3, 90)).resize((90, 70))
ALPHA = RGB.copy()
ALPHA.putalpha(Image.linear_gradient("L").resize(RGB.size))


def data_of(image, fmt, **options):
    out = io.BytesIO()
    image.save(out, fmt, **options)
    return out.getvalue()


def rotated():
    exif = Image.Exif()
    exif[0x0112] = 6
    return data_of(RGB, "JPEG", exif=exif)


FILES = {
    "jpeg": data_of(RGB, "JPEG", quality=92),
    "jpeg 4:4:4": data_of(RGB, "JPEG", subsampling=0),
    "jpeg 4:2:2": data_of(RGB, "JPEG", subsampling=1),
    "progressive jpeg": data_of(RGB, "JPEG", progressive=True),
    "grey jpeg": data_of(RGB.convert("L"), "JPEG"),
    "cmyk jpeg": data_of(RGB.convert("CMYK"), "JPEG"),
    "rgb jpeg": data_of(RGB, "JPEG", keep_rgb=True),
    "rotated jpeg": rotated(),
    "jpeg with bytes after its end": data_of(RGB, "JPEG") + b"\0" * 100,
    "jpeg with restart markers": data_of(RGB, "JPEG", restart_marker_rows=1),
    "odd size jpeg": data_of(RGB.resize((17, 31)), "JPEG"),
    "png": data_of(RGB, "PNG"),
    "grey png": data_of(RGB.convert("L"), "PNG"),
    "palette png": data_of(RGB.quantize(16), "PNG"),
    "palette png with transparency": data_of(RGB.quantize(16), "PNG", transparency=3),
    "alpha png": data_of(ALPHA, "PNG"),
    "grey alpha png": data_of(ALPHA.convert("LA"), "PNG"),
    "rgb png with a transparent colour": data_of(RGB, "PNG", transparency=(1, 2, 3)),
    "grey png with a transparent value": data_of(RGB.convert("L"), "PNG", transparency=7),
    "one bit png": data_of(RGB.convert("1"), "PNG"),
    "16 bit png": data_of(Image.fromarray(np.arange(6300, dtype=np.uint16).reshape(70, 90) * 9), "PNG"),
    "webp": data_of(RGB, "WEBP"),
    "lossless webp": data_of(RGB, "WEBP", lossless=True),
    "alpha webp": data_of(ALPHA, "WEBP"),
    "bmp": data_of(RGB, "BMP"),
    "gif": data_of(RGB, "GIF"),
    "tiff": data_of(RGB, "TIFF"),
}


@pytest.mark.parametrize("decoder", ["auto", "opencv", "torchvision", "pil"])
@pytest.mark.parametrize("name", FILES)
def test_as_pillow_gives_it(name, decoder):
    expected = np.array(Image.open(io.BytesIO(FILES[name])).convert("RGB"))
    found = decode(FILES[name], decoder=decoder)
    assert found.dtype == np.uint8 and found.flags.c_contiguous and found.flags.writeable
    assert np.array_equal(found, expected)


@pytest.mark.parametrize("name", ["jpeg", "progressive jpeg", "cmyk jpeg", "png", "alpha png", "webp"])
def test_broken_files_are_refused(name):
    data = FILES[name]
    for cut in (len(data) // 2, 40, 3, 1):
        with pytest.raises(BadImage):
            decode(data[:cut])


@pytest.mark.parametrize("data", [b"", b"<html></html>", b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n", b"%!PS-Adobe-3.0 EPSF"])
def test_no_image_at_all(data):
    with pytest.raises(BadImage):
        decode(data)


@settings(max_examples=250, deadline=None)
@given(st.sampled_from(sorted(FILES)), st.data())
def test_damage_gives_what_pillow_gives_or_is_refused(name, data):
    """Never another exception and never other pixels than Pillow's, whatever the bytes are."""
    damaged = bytearray(FILES[name])
    for _ in range(data.draw(st.integers(1, 4))):
        damaged[data.draw(st.integers(0, len(damaged) - 1))] ^= data.draw(st.integers(1, 255))
    try:
        found = decode(bytes(damaged), max_pixels=10**6)
    except (BadImage, TooManyPixels):
        return
    assert np.array_equal(found, decode(bytes(damaged), decoder="pil"))


def bomb_png(width, height):
    """A PNG whose header promises far more than it holds."""
    import zlib

    def chunk(kind, body):
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"0")) + chunk(b"IEND", b"")


@pytest.mark.parametrize("decoder", ["auto", "pil"])
@pytest.mark.parametrize("name", ["jpeg", "cmyk jpeg", "png", "palette png", "webp", "bmp"])
def test_pixels_are_counted_before_decoding(name, decoder, monkeypatch):
    decode(FILES[name], max_pixels=6300, decoder=decoder)
    with pytest.raises(TooManyPixels, match="90 x 70"):
        decode(FILES[name], max_pixels=6299, decoder=decoder)


def test_decompression_bombs():
    for size in ((30_000, 30_000), (60_000, 60_000)):
        with pytest.raises(TooManyPixels):
            decode(bomb_png(*size))


@pytest.mark.parametrize("decoder", ["auto", "opencv", "pil"])
def test_big_jpegs_decode_as_small_as_the_views_allow(decoder):
    data = encoded(np.array(Image.fromarray(picture(1, 64)).resize((1200, 800))), "JPEG", quality=95)
    assert decode(data, decoder=decoder).shape == (800, 1200, 3)
    assert decode(data, shorter=401, decoder=decoder).shape == (800, 1200, 3)
    for shorter, expected in ((400, (400, 600)), (150, (200, 300)), (100, (100, 150)), (20, (100, 150))):
        found = decode(data, shorter=shorter, decoder=decoder)
        assert found.shape[:2] == expected
        reference = np.array(Image.fromarray(decode(data)).resize(expected[::-1], Image.Resampling.BOX))
        assert np.abs(found.astype(int) - reference).mean() < 2.0


def test_unknown_decoder_is_said():
    check_decoder("pil")
    for name in module.DECODERS:
        check_decoder(name)
    with pytest.raises(ConfigError, match="data.decoder"):
        check_decoder("gpu")
