"""Small real shards for the tests: seeded images whose pixels tell their id."""

import io
import json
import tarfile
from pathlib import Path

import numpy as np
from PIL import Image

from moe_cl.data.index import save, scan


def picture(number: int, size: int = 16) -> np.ndarray:
    """(size, size, 3) uint8, different for each number."""
    pixels = np.random.Generator(np.random.Philox(key=[7, number])).integers(0, 256, (4, 4, 3), dtype=np.uint8)
    return np.array(Image.fromarray(pixels).resize((size, size), Image.Resampling.BILINEAR))


def encoded(image: np.ndarray, fmt: str = "PNG", **options) -> bytes:
    """The image as a file of that format."""
    out = io.BytesIO()
    Image.fromarray(image).save(out, fmt, **options)
    return out.getvalue()


def members(number: int, size: int = 16, fmt: str = "PNG") -> dict[str, bytes]:
    """One sample's members by extension."""
    ext = {"PNG": "png", "JPEG": "jpg"}[fmt]
    return {ext: encoded(picture(number, size), fmt), "cls": str(number % 10).encode(), "json": json.dumps({}).encode()}


def write_tar(path: Path, samples: list[tuple[str, dict[str, bytes | tarfile.TarInfo]]], indexed: bool = True) -> Path:
    """A tar of (key, members by extension); a TarInfo in place of bytes is written as it is (links)."""
    with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as tar:
        for key, parts in samples:
            for ext, data in parts.items():
                if isinstance(data, tarfile.TarInfo):
                    tar.addfile(data)
                    continue
                info = tarfile.TarInfo(f"{key}.{ext}")
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
    if indexed:
        save(scan(str(path)), path)
    return path


def make_shards(folder: Path, counts: list[int], size: int = 16, fmt: str = "PNG", name: str = "set") -> str:
    """Shards with these numbers of samples; returns their brace pattern."""
    folder.mkdir(parents=True, exist_ok=True)
    start = 0
    for n, count in enumerate(counts):
        samples = [(f"{i:06d}", members(i, size, fmt)) for i in range(start, start + count)]
        write_tar(folder / f"{name}-train-{n:06d}.tar", samples)
        start += count
    return f"{folder}/{name}-train-{{000000..{len(counts) - 1:06d}}}.tar"
