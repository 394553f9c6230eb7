"""An image folder tree: the first folder level is the class, images may lie deeper."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from data_prep.sources.base import UNLABELLED, Item, Reader, Sample, Source, SourceOptions
from data_prep.sources.labels import read_labels
from moe_cl.config import ConfigError
from moe_cl.data.header import EXTENSIONS


@dataclass(frozen=True)
class FileReader(Reader):
    """Reads items whose ``at`` is a path below ``root``."""

    root: str

    def read(self, item: Item) -> Sample:
        with open(os.path.join(self.root, item.at), "rb", buffering=0) as f:
            return Sample(f.read(), {}, {})


def open_folder(folder: Path, text: str, options: SourceOptions) -> Source:
    """Lists ``folder``, or ``folder/SPLIT`` where that exists. Raises ConfigError if there is no image in it."""
    split = folder / options.split
    used = split if split.is_dir() else folder
    classes = sorted(e.name for e in os.scandir(used) if e.is_dir() and not e.name.startswith("."))
    if options.labels or not classes:
        labels = read_labels(options.labels, options.devkit) if options.labels else None
        found = sorted(images_below(str(used), ""))
        items = [Item(path, labels.of(path) if labels else UNLABELLED, size, path) for path, size in found]
        names = labels.class_names if labels else ()
    else:
        items = [
            Item(path, label, size, path)
            for label, name in enumerate(classes)
            for path, size in sorted(images_below(str(used), name))
        ]
        names = tuple(classes)
    if not items:
        raise ConfigError(f"{used} holds no image ({', '.join(EXTENSIONS)}); a class is a folder of images")
    notes = [f"reads {used}"] if used != folder else []
    if classes and not options.labels:
        empty = set(range(len(classes))) - {item.label for item in items}
        notes += [f"class folder without an image: {classes[label]}" for label in sorted(empty)[:10]]
    return Source(folder.resolve().name, text, items, names, FileReader(str(used)), notes)


def images_below(root: str, below: str) -> list[tuple[str, int]]:
    """(path below root, size) of the images under ``root/below``; a folder reached twice through links is read once."""
    out, seen, todo = [], set(), [below]
    while todo:
        folder = todo.pop()
        real = os.path.realpath(os.path.join(root, folder))
        if real in seen:
            continue
        seen.add(real)
        for entry in os.scandir(os.path.join(root, folder)):
            path = f"{folder}/{entry.name}" if folder else entry.name
            if entry.name.startswith("."):
                continue
            if entry.is_dir():
                todo.append(path)
            elif entry.name.rsplit(".", 1)[-1].lower() in EXTENSIONS:
                out.append((path, entry.stat().st_size))
    return out
