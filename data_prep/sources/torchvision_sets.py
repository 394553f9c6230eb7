"""torchvision's dataset classes: the files' bytes where they keep files, lossless PNG where they keep arrays."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

import numpy as np

from data_prep.sources.arrays import png
from data_prep.sources.base import UNLABELLED, Item, Reader, Sample, Source, SourceOptions
from moe_cl.config import ConfigError


class TorchvisionReader(Reader):
    """Items whose ``at`` is a row of a torchvision dataset; ``paths`` where it keeps files, whose bytes are taken."""

    def __init__(self, dataset: Any, paths: list[str] | None):
        self._dataset, self._paths = dataset, paths

    def read(self, item: Item) -> Sample:
        if self._paths is not None:
            return Sample(Path(self._paths[item.at]).read_bytes(), {}, {})
        return Sample(png(self._dataset[item.at][0]), {}, {})


def open_torchvision(name: str, text: str, options: SourceOptions) -> Source:
    """A dataset class of torchvision, files already on disk below ``--root``. Raises ConfigError."""
    dataset = torchvision_dataset(name, options.root or "data", options.split, download=False)
    paths = next(
        (p for p in (_paths(getattr(dataset, a, None)) for a in ("samples", "_image_files", "_images")) if p), None
    )
    labels = next(
        (v for v in (getattr(dataset, a, None) for a in ("targets", "labels", "_labels", "y")) if v is not None), None
    )
    if labels is None:
        labels = [dataset[i][1] for i in range(len(dataset))]
    labels = [int(v) if np.ndim(v) == 0 else UNLABELLED for v in labels]
    names = tuple(str(c[0] if isinstance(c, tuple) else c) for c in getattr(dataset, "classes", ()))
    sizes = [Path(p).stat().st_size for p in paths] if paths else [_pixels(dataset)] * len(labels)
    ext = (lambda i: Path(paths[i]).name) if paths else (lambda i: f"{i:06d}.png")
    items = [Item(f"{options.split}/{ext(i)}", label, sizes[i], i) for i, label in enumerate(labels)]
    return Source(name.lower(), text, items, names, TorchvisionReader(dataset, paths))


def torchvision_dataset(name: str, root: str, split: str, download: bool) -> Any:
    """A torchvision dataset object of a split, whichever way its class names splits. Raises ConfigError."""
    from torchvision import datasets

    kind = getattr(datasets, name, None)
    if not (inspect.isclass(kind) and issubclass(kind, datasets.VisionDataset)):
        raise ConfigError(
            f"torchvision has no dataset {name}; its names are case sensitive (CIFAR10, STL10, Flowers102)"
        )
    known = inspect.signature(kind.__init__).parameters
    options: dict[str, Any] = {"download": download} if "download" in known else {}
    if "train" in known:
        options["train"] = split == "train"
    elif "split" in known:
        options["split"] = split
    elif "image_set" in known:
        options["image_set"] = split
    try:
        return kind(root, **options)
    except (RuntimeError, ValueError, OSError, TypeError) as error:
        reason = " ".join(str(error).split())
        hint = "" if download else f"; run `python -m data_prep fetch torchvision:{name} --out {root}` first"
        raise ConfigError(f"torchvision:{name}: {reason}{hint}") from None


def _paths(value: Any) -> list[str] | None:
    """File names in a torchvision dataset's own list (paths, or pairs of path and label), else None."""
    if not isinstance(value, (list, tuple)) or not len(value):
        return None
    paths = [v[0] if isinstance(v, tuple) else v for v in value]
    return [str(p) for p in paths] if all(isinstance(p, (str, Path)) and Path(p).is_file() for p in paths) else None


def _pixels(dataset: Any) -> int:
    image = dataset[0][0]
    return image.width * image.height * len(image.getbands())
