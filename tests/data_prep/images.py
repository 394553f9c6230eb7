"""Small real image files, ordinary and odd, and folders and tars of them."""

from __future__ import annotations

import io
import struct
import tarfile
import zlib
from pathlib import Path

import numpy as np
from PIL import Image


def pixels(seed: int, height: int = 24, width: int = 32) -> np.ndarray:
    """A smooth random picture (H, W, 3) uint8: noise alone would make large JPEGs."""
    rng = np.random.default_rng(seed)
    small = Image.fromarray(rng.integers(0, 256, (4, 5, 3), dtype=np.uint8))
    return np.asarray(small.resize((width, height), Image.Resampling.BICUBIC))


def encoded(seed: int, kind: str = "JPEG", mode: str = "RGB", height: int = 24, width: int = 32, **options) -> bytes:
    out = io.BytesIO()
    Image.fromarray(pixels(seed, height, width)).convert(mode).save(out, kind, **options)
    return out.getvalue()


def bomb(width: int = 60_000, height: int = 60_000) -> bytes:
    """A PNG of a few bytes whose header claims 3.6e9 pixels."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0" * 64)) + chunk(b"IEND", b"")
    )


def image_folder(root: Path, classes: int = 3, each: int = 5) -> Path:
    """``root/n00/n00_0.JPEG`` ...; every picture is another."""
    for c in range(classes):
        folder = root / f"n{c:02d}"
        folder.mkdir(parents=True)
        for i in range(each):
            (folder / f"n{c:02d}_{i}.JPEG").write_bytes(encoded(100 * c + i))
    return root


def write_tar(path: Path, members: list[tuple[str, bytes]], **options) -> Path:
    with tarfile.open(path, "w", **options) as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


def shard_members(count: int, start: int = 0) -> list[tuple[str, bytes]]:
    """``count`` ordinary samples with jpg and cls."""
    return [
        pair
        for i in range(start, start + count)
        for pair in ((f"{i:05d}.jpg", encoded(i)), (f"{i:05d}.cls", str(i % 3).encode()))
    ]


def tree(folder: Path) -> dict[str, bytes]:
    """Every file of a folder with its bytes."""
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}
