"""A CSV or TSV of path, label[, split]: with a header line that names the columns, or without one."""

from __future__ import annotations

import csv
import os
from pathlib import Path

from data_prep.sources.base import UNLABELLED, Item, Source, SourceOptions
from data_prep.sources.folder import FileReader
from moe_cl.config import ConfigError

_PATH = ("path", "file", "filename", "image", "filepath")
_LABEL = ("label", "class", "target", "category", "y")
_SPLIT = ("split", "subset", "partition")


def open_table(path: Path, text: str, options: SourceOptions) -> Source:
    """Rows in their order; labels all whole numbers, or names (numbered in sorted order). Raises ConfigError."""
    try:
        with open(path, newline="", encoding="utf-8-sig") as f:
            delimiter = "\t" if path.suffix.lower() == ".tsv" else ","
            rows = [row for row in csv.reader(f, delimiter=delimiter) if row]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise ConfigError(f"{path}: no readable table: {error}") from None
    head = [c.strip().lower() for c in rows[0]] if rows else []
    columns = [next((head.index(n) for n in names if n in head), None) for names in (_PATH, _LABEL, _SPLIT)]
    at, label_at, split_at = columns
    if at is None:
        at, label_at = 0, 1 if head[1:] else None  # no header line
    else:
        rows = rows[1:]
    wide = max(c for c in (at, label_at, split_at) if c is not None)
    short = next((i for i, row in enumerate(rows, 1) if len(row) <= wide), None)
    if short is not None:
        raise ConfigError(f"{path}: row {short} has fewer than {wide + 1} columns")
    # Classes are numbered over all rows, so that every split of the table numbers them alike.
    words = {row[label_at].strip() for row in rows} - {"", "-1"} if label_at is not None else set()
    names = () if all(word.isdigit() for word in words) else tuple(sorted(words))
    if split_at is not None:
        have = sorted({row[split_at] for row in rows})
        rows = [row for row in rows if row[split_at] == options.split]
        if not rows:
            raise ConfigError(f"{path}: no row of split {options.split!r}; it has {', '.join(have)} (give --split)")
    if not rows:
        raise ConfigError(f"{path}: no rows; expected path,label")
    root = options.root or str(path.parent)
    raw = [row[label_at].strip() if label_at is not None else "" for row in rows]
    number_of = {name: i for i, name in enumerate(names)}
    items, missing = [], []
    for row, value in zip(rows, raw, strict=True):
        try:
            size = os.stat(os.path.join(root, row[at])).st_size
        except OSError:
            missing.append(row[at])
            continue
        label = number_of.get(value, UNLABELLED) if names else int(value or UNLABELLED)
        items.append(Item(row[at], label, size, row[at]))
    if missing:
        raise ConfigError(
            f"{path}: {len(missing)} files do not exist below {root}, the first {missing[0]} (see --root)"
        )
    return Source(path.stem, text, items, names, FileReader(root))
