"""Part of a labelled training set: a fraction of every class by seed, or the images that a published list names."""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable, Sequence
from pathlib import Path, PurePosixPath

import numpy as np
from torch.utils.data import ConcatDataset, Dataset, Subset

from moe_cl.arguments import real
from moe_cl.config import ConfigError

LISTS = ".npy of indices, or text: an index a line, or a file's name a line with or without its label behind it"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """``--fraction`` and ``--list``."""
    one = parser.add_mutually_exclusive_group()
    one.add_argument("--fraction", type=real(above=0, high=1), help="part of every class, drawn by --seed: 0.01, 0.1")
    one.add_argument("--list", dest="listed", metavar="FILE", help=f"the training images: {LISTS}")


def chosen(images: Dataset, fraction: float | None, listed: str | None, seed: int) -> np.ndarray:
    """Indices of the labelled ones among the chosen images of a set (``sets.images_of``). Raises ConfigError."""
    labels = np.array(labels_of(images))
    index = part_of(labels, fraction, listed, seed, lambda: names_of(images))
    if (labels[index] < 0).all():
        raise ConfigError("none of the chosen training images has a label")
    return index[labels[index] >= 0]


def part_of(
    labels: np.ndarray,
    fraction: float | None,
    listed: str | None,
    seed: int,
    names: Callable[[], Sequence[str]] = tuple,
) -> np.ndarray:
    """Indices of the training images: all, a fraction of every class (one at least), or those of a file.

    Args:
        listed: see ``LISTS``; labels in it are not read, the set has its own. names: of the set's images.

    Raises:
        ConfigError: a file that does not fit.
    """
    if listed:
        index = _listed(listed, names)
        if not len(index) or index.min() < 0 or index.max() >= len(labels):
            raise ConfigError(f"--list {listed}: indices must lie between 0 and {len(labels) - 1}")
        return index
    if fraction is None:
        return np.arange(len(labels))
    if not 0 < fraction <= 1:
        raise ConfigError(f"--fraction {fraction}: give a part between 0 and 1, for example 0.01")
    generator, kept = np.random.default_rng(seed), []
    for c in np.unique(labels[labels >= 0]):
        index = generator.permutation(np.nonzero(labels == c)[0])
        kept.append(index[: max(1, round(fraction * len(index)))])
    return np.sort(np.concatenate(kept)) if kept else np.arange(len(labels))


def _listed(listed: str, names: Callable[[], Sequence[str]]) -> np.ndarray:
    path = Path(listed)
    try:
        if path.suffix == ".npy":
            return np.load(path, allow_pickle=False).astype(np.int64).ravel()
        lines = [line.strip() for line in path.read_text().splitlines() if line.strip()]
    except (OSError, ValueError) as error:
        raise ConfigError(f"--list {listed}: {' '.join(str(error).split())[:120]}; it takes {LISTS}") from None
    if all(line.isdigit() for line in lines):
        return np.array([int(line) for line in lines], dtype=np.int64)
    return _by_name(lines, listed, list(names()))


def _by_name(lines: Sequence[str], listed: str, names: Sequence[str]) -> np.ndarray:
    """Indices of the named images: the whole name, its last two parts, or its last; a suffix may be missing."""
    if not any(names):
        raise ConfigError(f"--list {listed}: this set has no file names; give indices, one a line")
    known: dict[str, int] = {}
    for i, name in enumerate(names):
        for form in _forms(name):
            known[form] = i if known.get(form, i) == i else -1  # -1: several images are called so
    out = []
    for line in lines:
        *head, last = line.rsplit(None, 1)
        name = head[0] if head and last.lstrip("-").isdigit() else line
        found = next((known[form] for form in _forms(name) if known.get(form, -1) >= 0), None)
        if found is None:
            raise ConfigError(
                f"--list {listed}: {name!r} is no image of the training set, or several (its first is {names[0]!r})"
            )
        out.append(found)
    return np.array(out, dtype=np.int64)


def _forms(name: str) -> list[str]:
    """From the most to the least exact."""
    parts = PurePosixPath(name).parts
    forms = ["/".join(parts[-n:]) for n in dict.fromkeys((len(parts), min(2, len(parts)), 1))]
    return forms + [os.path.splitext(form)[0] for form in forms]


def labels_of(images: Dataset) -> list[int]:
    """Labels without decoding where the set knows them."""
    if isinstance(images, Subset):
        whole = labels_of(images.dataset)
        return [whole[i] for i in images.indices]
    if isinstance(images, ConcatDataset):
        return [label for part in images.datasets for label in labels_of(part)]
    for name in ("targets", "labels", "_labels"):
        if (known := getattr(images, name, None)) is not None:
            return [int(label) for label in known]
    return [int(images[i][1]) for i in range(len(images))]


def names_of(images: Dataset) -> list[str]:
    """Names of a set's images, as its index or its files have them; empty where it knows none."""
    if isinstance(images, Subset):
        whole = names_of(images.dataset)
        return [whole[i] for i in images.indices] if whole else []
    if isinstance(images, ConcatDataset):
        return [name for part in images.datasets for name in names_of(part)]
    for attribute in ("names", "samples", "_samples", "_image_files", "_images"):
        known = getattr(images, attribute, None)
        if known is not None and len(known):
            files = [one[0] if isinstance(one, tuple) else one for one in known]
            if all(isinstance(file, (str, Path)) for file in files):
                root = getattr(images, "root", None)
                return [_below(Path(file), root) if root else str(file) for file in files]
    return []


def _below(path: Path, root: str | Path) -> str:
    return path.relative_to(root).as_posix() if path.is_relative_to(root) else path.as_posix()
