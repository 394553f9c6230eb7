"""Headers: told by the bytes, not the name; no pixel limit of Pillow's own; a reason for what is no image."""

import io
import warnings

import pytest

from moe_cl.data.header import BadImage, probe
from tests.data_prep.images import bomb, encoded


@pytest.mark.parametrize(
    ("kind", "mode"),
    [("JPEG", "RGB"), ("JPEG", "L"), ("JPEG", "CMYK"), ("PNG", "RGBA"), ("PNG", "P"), ("WEBP", "RGB"), ("GIF", "P")],
)
def test_format_size_and_mode(kind, mode):
    header = probe(encoded(0, kind, mode, height=21, width=33))
    assert (header.format, header.width, header.height, header.mode) == (kind, 33, 21, mode)


def test_from_a_file_at_its_place():
    data = encoded(0)
    stream = io.BytesIO(b"12345" + data)
    stream.seek(5)
    assert probe(stream).width == 32


def test_a_bomb_is_measured_not_refused():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert probe(bomb()).width == 60_000


@pytest.mark.parametrize(
    "data", [b"", b"hello", encoded(0)[:11], b"\x89PNG\r\n\x1a\n" + b"\0" * 30, b"RIFF1234WEBPjunk"]
)
def test_no_image(data):
    with pytest.raises(BadImage):
        probe(data)


def test_postscript_is_no_image():
    """Pillow would start Ghostscript to read its pixels."""
    data = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\nshowpage\n"
    with pytest.raises(BadImage):
        probe(data)
