"""``stats``: how many samples each class has, how large the images are, and a sheet of some of them as a PNG."""

from __future__ import annotations

import argparse
import io
import json
from collections import Counter
from typing import Any

import numpy as np
from PIL import Image, ImageDraw

from data_prep.console import byte_text, note, table
from moe_cl.arguments import whole
from moe_cl.config import ConfigError
from moe_cl.data.header import FORMATS
from moe_cl.data.index import Dataset, open_file, resolve, write_atomic

TILE, CAPTION = 112, 14  # pixels of a picture on the sheet, and of the line below it


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of the verb."""
    parser.add_argument("pattern", help="shards, as the loader takes them (folder, FOLDER/SPLIT, brace pattern)")
    parser.add_argument("--sheet", metavar="FILE.png", help="write a contact sheet")
    parser.add_argument("--count", type=whole(1), default=64, help="pictures on it (default: %(default)s)")
    parser.add_argument("--seed", type=whole(0), default=0, help="of the choice of pictures (default: %(default)s)")
    parser.add_argument("--json", metavar="FILE", help="write the numbers as JSON")
    parser.add_argument("--classes", type=whole(1), default=20, help="lines of the class table (default: %(default)s)")


def run(args: argparse.Namespace) -> int:
    """The verb. Raises ConfigError."""
    if args.count < 1:
        raise ConfigError("--count must be at least 1")
    dataset = resolve(args.pattern)
    tree = collect(dataset)
    rows = [(k, byte_text(v) if k == "bytes" else v) for k, v in tree.items() if not isinstance(v, dict)]
    rows += [
        (k, ", ".join(f"{q} {n:,}" for q, n in tree[k].items())) for k in ("width", "height", "file bytes", "format")
    ]
    table(("", args.pattern), rows)
    _histogram(tree["classes"], args.classes)
    if args.json:
        write_atomic(args.json, json.dumps(tree, indent=1) + "\n")
    if args.sheet:
        sheet(dataset, args.count, args.seed).save(args.sheet, "PNG")
        note(f"contact sheet: {args.sheet}")
    return 0


def collect(dataset: Dataset) -> dict[str, Any]:
    """All numbers from the indexes alone: no image is read."""
    columns: dict[str, list] = {"width": [], "height": [], "size": [], "label": []}
    formats: Counter[str] = Counter()
    for shard in range(len(dataset.shards)):
        index = dataset.index(shard)
        formats.update(index.ext)
        for name, parts in columns.items():
            parts.append(getattr(index, name))
    width, height, size, label = (np.concatenate(parts) for parts in columns.values())
    names = dataset.class_names
    counts = Counter(label.tolist())
    return {
        "shards": len(dataset.shards),
        "samples": len(dataset),
        "bytes": sum(s.bytes for s in dataset.shards),
        "without a label": counts.pop(-1, 0),
        "header not readable": int((width == 0).sum()),
        "width": _quantiles(width[width > 0]),
        "height": _quantiles(height[height > 0]),
        "file bytes": _quantiles(size),
        "format": dict(sorted(formats.items())),
        "classes": {names[k] if k < len(names) else str(k): counts[k] for k in sorted(counts)},
    }


def _quantiles(values: np.ndarray) -> dict[str, int]:
    """Smallest, quartiles and largest; empty for no values."""
    names = ("least", "25 %", "median", "75 %", "most")
    if not len(values):
        return {}
    return {name: int(q) for name, q in zip(names, np.quantile(values, (0, 0.25, 0.5, 0.75, 1)), strict=True)}


def _histogram(classes: dict[str, int], lines: int) -> None:
    """The largest and the smallest classes with bars."""
    if not classes:
        return
    ordered = sorted(classes.items(), key=lambda pair: (-pair[1], pair[0]))
    shown = (
        ordered if len(ordered) <= lines else ordered[: lines // 2] + [("...", 0)] + ordered[-(lines - lines // 2) :]
    )
    most = ordered[0][1]
    rows = [(name, count or "", "#" * round(40 * count / most)) for name, count in shown]
    table(("class", "samples", ""), rows, title=f"{len(classes)} classes, {ordered[-1][1]:,} to {most:,} samples")


def sheet(dataset: Dataset, count: int, seed: int) -> Image.Image:
    """A grid of ``count`` samples drawn by seed, shrunk to fit, each with its class below; a bad one is red."""
    count = min(count, len(dataset))
    ids = np.sort(np.random.Generator(np.random.Philox(key=seed)).choice(len(dataset), count, replace=False))
    across = int(np.ceil(np.sqrt(count)))
    grid = Image.new("RGB", (across * TILE, -(-count // across) * (TILE + CAPTION)), "white")
    draw = ImageDraw.Draw(grid)
    for place, sample in enumerate(ids.tolist()):
        x, y = place % across * TILE, place // across * (TILE + CAPTION)
        shard, row = dataset.locate(sample)
        index = dataset.index(shard)
        tile = _tile(dataset.shards[shard].url, int(index.offset[row]), int(index.size[row]))
        grid.paste(tile, (x + (TILE - tile.width) // 2, y + (TILE - tile.height) // 2))
        label, names = int(index.label[row]), dataset.class_names
        text = names[label] if 0 <= label < len(names) else str(label) if label >= 0 else ""
        draw.text((x + 2, y + TILE + 1), text.encode("ascii", "replace").decode()[:18], fill="black")
    return grid


def _tile(url: str, offset: int, size: int) -> Image.Image:
    side = TILE - 4
    try:
        with open_file(url) as f:
            f.seek(offset)
            image = Image.open(io.BytesIO(f.read(size)), formats=FORMATS)
            image.draft("RGB", (side, side))
            image = image.convert("RGB")
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError):
        return Image.new("RGB", (side, side), "red")
    scale = side / max(image.size)
    target = (max(round(image.width * scale), 1), max(round(image.height * scale), 1))
    return image.resize(target, Image.Resampling.LANCZOS if scale < 1 else Image.Resampling.NEAREST)
