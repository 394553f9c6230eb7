"""Debian's ``openclipart-png`` as a labelled colour set: drawings, classes = the folders of the collection.

The package (Open Clip Art Library 0.18, public domain) has 6,900 drawings in 22 folders. ``unsorted`` is no class, nor
is a folder of fewer than 15; at most 300 of a folder are taken, because half of the collection are icon themes and
shapes. Links are left out, so a drawing is in one class only. A fifth of every class is its test part. Which drawings,
and which part, follow from a hash of their path. Series of one author resemble each other and lie on both sides.
"""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

from PIL import Image

from data_prep.sources.folder import images_below
from moe_cl.config import ConfigError

LEAST, MOST, TEST = 15, 300, 5  # of a class; one in TEST of it is for testing
NO_CLASS = ("unsorted",)
SIDE = 96  # shorter side, pixels
MAX_PIXELS = 30_000_000


def choose(root: Path) -> dict[str, tuple[list[str], list[str]]]:
    """Paths below ``root`` of each class: (training part, test part), in a fixed order."""
    out = {}
    for name in sorted(e.name for e in os.scandir(root) if e.is_dir() and e.name not in NO_CLASS):
        paths = [path for path, _ in images_below(str(root), name) if not _linked(root, path)]
        if len(paths) < LEAST:
            continue
        chosen = sorted(paths, key=lambda path: hashlib.sha256(path.encode()).digest())[:MOST]
        cut = len(chosen) // TEST
        out[name] = (chosen[cut:], chosen[:cut])
    return out


def write(root: Path, out: Path) -> str:
    """``out/train/CLASS/*.png`` and ``out/test/CLASS/*.png``, on white, shorter side ``SIDE``; a line about it.

    Raises:
        ConfigError: no class folder with enough drawings.
    """
    classes = choose(root)
    if not classes:
        raise ConfigError(f"{root}: no folder with at least {LEAST} drawings; is this openclipart's png folder?")
    counts, large = {"train": 0, "test": 0}, 0
    for name, parts in classes.items():
        for split, paths in zip(("train", "test"), parts, strict=True):
            (out / split / name).mkdir(parents=True, exist_ok=True)
            for path in paths:
                target = out / split / name / (path.partition("/")[2].replace("/", "--"))
                if not target.exists():
                    drawing = on_white(root / path)
                    if drawing is None:
                        large += 1
                        continue
                    part = target.with_name(target.name + ".part")
                    drawing.save(part, "PNG")
                    os.replace(part, target)
                counts[split] += 1
    left = f", {large} left out (over {MAX_PIXELS:,} pixels)" if large else ""
    return f"{len(classes)} classes, {counts['train']:,} drawings to train on, {counts['test']:,} to test on{left}"


def on_white(path: Path) -> Image.Image | None:
    """A drawing without transparency, its shorter side at most ``SIDE``; None if it is too large to decode."""
    header = path.open("rb").read(24)
    if int.from_bytes(header[16:20]) * int.from_bytes(header[20:24]) > MAX_PIXELS:
        return None
    with Image.open(path) as image:
        drawing = image.convert("RGBA")
    factor = SIDE / min(drawing.size)
    if factor < 1:
        # with the alpha premultiplied, so that invisible pixels give no colour
        size = tuple(max(1, round(side * factor)) for side in drawing.size)
        drawing = drawing.convert("RGBa").resize(size, Image.Resampling.BOX).convert("RGBA")
    white = Image.new("RGBA", drawing.size, "white")
    white.alpha_composite(drawing)
    return white.convert("RGB")


def _linked(root: Path, path: str) -> bool:
    at = root
    for part in path.split("/"):
        at = at / part
        if at.is_symlink():
            return True
    return False
