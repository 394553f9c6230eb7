"""Labelled sets by name: shards of this project, a folder of class folders, or one of torchvision's sets."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import ConcatDataset, DataLoader, Dataset, Subset

from moe_cl.config import ConfigError, DataConfig
from moe_cl.data import faults
from moe_cl.data.faults import LeftOut, SampleFault
from moe_cl.data.header import reason
from moe_cl.data.loader import LabelledLoader
from moe_cl.evals.classes import class_names
from moe_cl.models.build import nearest
from moe_cl.views.spec import eval_view

SOURCES = (
    "A set is a folder or pattern of shards, folder:DIR (one sub-folder a class) or torchvision:NAME:ROOT "
    "(torchvision:NAME@SPLIT:ROOT for one of its splits)"
)

View = Callable[[np.ndarray, int], Tensor]  # image (H, W, 3) uint8, sample id -> (C, S, S)


def beside(pattern: str, train: bool) -> str | None:
    """The labelled set that goes with the shards a run was trained on, where the run names none.

    Training: the shards themselves. Test: the split ``test`` or ``val`` beside a split ``train`` (``X/train`` ->
    ``X/test``). None if there is no such set, or it has no labels.
    """
    from moe_cl.data.index import resolve

    if train:
        names = [pattern]
    else:
        parent, slash, split = pattern.rstrip("/").rpartition("/")
        names = [parent + slash + other for other in ("test", "val")] if split == "train" else []
    for name in names:
        try:
            found = resolve(name)
        except ConfigError:
            continue
        if len(found) and (found.index(0).label >= 0).any():
            return name
    return None


class LabelledSet(Protocol):
    """Iterates over (images (b, C, S, S), labels (b,), ids (b,))."""

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor, Tensor]]: ...


@dataclass(frozen=True)
class Known:
    """How torchvision splits a set, and the metric of the transfer tables (esvit.md 2; CLIP's)."""

    train: dict[str, Any] = field(default_factory=lambda: {"train": True})
    test: dict[str, Any] = field(default_factory=lambda: {"train": False})
    metric: str = "accuracy"  # accuracy, per_class, map11 (VOC's 11 points)
    val: str = ""  # the official validation split beside ``train``, where there is one
    key: str = "split"  # torchvision's name of the option


def _split(train: str, test: str, metric: str = "accuracy", val: str = "") -> Known:
    return Known({"split": train}, {"split": test}, metric, val)


# Sets whose published protocol trains on train + val name both; those without a split are cut by ``open_set``.
KNOWN: dict[str, Known] = {
    "MNIST": Known(),
    "FashionMNIST": Known(),
    "CIFAR10": Known(),
    "CIFAR100": Known(),
    "Food101": _split("train", "test"),
    "OxfordIIITPet": _split("trainval", "test", "per_class"),
    "Flowers102": _split("train+val", "test", "per_class", "val"),
    "SUN397": Known({}, {}),
    "StanfordCars": _split("train", "test"),
    "FGVCAircraft": _split("trainval", "test", "per_class", "val"),
    "VOC2007": Known(
        {"image_set": "trainval", "year": "2007"}, {"image_set": "test", "year": "2007"}, "map11", "val", "image_set"
    ),
    "DTD": _split("train+val", "test", val="val"),
    "Caltech101": Known({}, {}, "per_class"),
    "STL10": _split("train", "test"),
    "GTSRB": _split("train", "test"),
    "PCAM": _split("train", "test", val="val"),
    "FER2013": _split("train", "test"),
    "EuroSAT": Known({}, {}),
    "Country211": _split("train", "test", val="valid"),
    "RenderedSST2": _split("train", "test", val="val"),
}


def metric_of(source: str) -> str:
    """The metric that the transfer tables use for a set: accuracy, per_class or map11."""
    name = source.split(":")[1].partition("@")[0] if source.startswith("torchvision:") else ""
    return KNOWN[name].metric if name in KNOWN else "accuracy"


def halves(source: str) -> tuple[str, str] | None:
    """The official training and validation splits of a torchvision set as sources of their own; None without them."""
    kind, _, rest = source.partition(":")
    name, _, root = rest.partition(":")
    if kind != "torchvision" or name not in KNOWN or not KNOWN[name].val:
        return None
    return f"torchvision:{name}@train:{root}", f"torchvision:{name}@{KNOWN[name].val}:{root}"


def open_set(
    source: str,
    *,
    train: bool,
    size: int,
    normalize: str,
    batch: int,
    rank: int = 0,
    world: int = 1,
    workers: int = 0,
    interpolation: str = "bilinear",
    view: View | None = None,
    chosen: Sequence[int] | None = None,
) -> LabelledSet:
    """This rank's part of a set: samples rank, rank + world, ... in order, once.

    Args:
        source: see ``SOURCES``. train: which half of a set that has two.
        view: makes the image tensor from the decoded image and its id; None = the plain evaluation view.
        chosen: only these samples of the set, in this order; ids are then places in it.

    A broken image is left out, named in the log and counted, whatever the set and the view.

    Raises:
        ConfigError: no such set, or torchvision cannot find its files. From the iteration: DataStop.
    """
    if view is None and chosen is None and source.partition(":")[0] not in ("folder", "torchvision"):
        return LabelledLoader(source, size, normalize, batch, rank, world, workers, interpolation=interpolation)
    images = images_of(source, train, size)
    images = images if chosen is None else Subset(images, [int(i) for i in chosen])
    view = view or (lambda image, _: eval_view(image, size, normalize, interpolation))
    loader = DataLoader(
        _Views(images, view, rank, world), batch_size=batch, num_workers=workers, collate_fn=list,
        multiprocessing_context="fork" if workers else None,
    )  # fmt: skip
    return _Good(loader, source)


def images_of(source: str, train: bool, size: int) -> Dataset:
    """A set by index: (PIL image or (H, W, 3) uint8 array, label). Raises ConfigError as ``open_set``."""
    kind, _, rest = source.partition(":")
    if kind == "folder":
        return _folder(rest)
    return torchvision_set(rest, train) if kind == "torchvision" else _Shards(source, size)


def _folder(path: str) -> Dataset:
    from torchvision.datasets import ImageFolder

    try:
        return ImageFolder(path)
    except (FileNotFoundError, OSError) as error:
        raise ConfigError(
            f"folder:{path}: {' '.join(str(error).split())[:200]}; it needs one sub-folder a class"
        ) from None


def torchvision_set(rest: str, train: bool) -> Dataset:
    """``NAME:ROOT`` of torchvision. Sets without a split are cut 80/20 in a fixed order."""
    name, _, root = rest.partition(":")
    name, _, part = name.partition("@")
    if name not in KNOWN:
        raise ConfigError(f"torchvision:{name} is not known here{nearest(name, KNOWN)}; it has {', '.join(KNOWN)}")
    datasets = importlib.import_module("torchvision.datasets")
    known = KNOWN[name]
    options = known.train if train else known.test
    if part and known.key not in options:
        raise ConfigError(f"torchvision:{name}@{part}: torchvision gives {name} no splits by name; leave @{part} out")
    options = options | ({known.key: part} if part else {})
    kind = getattr(datasets, "VOCDetection" if name == "VOC2007" else name)
    if not root:
        raise ConfigError(f"torchvision:{name} needs the folder of its files: torchvision:{name}:ROOT")
    try:
        splits = options.get("split", "").split("+")
        parts = [kind(root, **(options | ({"split": s} if s else {}))) for s in splits]
    except ValueError as error:  # its own list of splits
        raise ConfigError(f"torchvision:{rest}: {' '.join(str(error).split())[:160]}") from None
    except (RuntimeError, FileNotFoundError, OSError) as error:
        raise ConfigError(
            f"torchvision:{name}:{root}: {' '.join(str(error).split())[:160]}; download it with torchvision first"
        ) from None
    if known.train == known.test:
        order = torch.randperm(len(parts[0]), generator=torch.Generator().manual_seed(0)).tolist()
        cut = int(0.8 * len(order))
        return Subset(parts[0], order[:cut] if train else order[cut:])
    return parts[0] if len(parts) == 1 else ConcatDataset(parts)


class _Shards(Dataset):
    """Decoded images of this project's shards."""

    def __init__(self, pattern: str, size: int):
        from moe_cl.data.index import resolve
        from moe_cl.data.samples import Images

        if not Path(pattern.split("::")[0].split("{")[0]).parent.exists() and "://" not in pattern:
            raise ConfigError(f"{pattern}: no such data")
        self.dataset = resolve(pattern)
        self.images = Images(self.dataset, DataConfig(), round(size * 256 / 224))

    @property
    def targets(self) -> list[int]:
        """All labels, from the index."""
        return self.images.reader.labels(np.arange(len(self.dataset)))[0].tolist()

    @property
    def names(self) -> list[str]:
        """Of all samples, from the index: as their source had them, else their keys."""
        indices = (self.dataset.index(shard) for shard in range(len(self.dataset.shards)))
        return [name or key for index in indices for name, key in zip(index.names, index.keys, strict=True)]

    @property
    def class_names(self) -> tuple[str, ...]:
        """Of the classes, by number."""
        return self.dataset.class_names

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, i: int) -> tuple[np.ndarray, int]:
        ids = np.array([i])
        return self.images.decode(next(iter(self.images.reader.read(ids)))), int(self.images.reader.labels(ids)[0][0])


def picture(images: Dataset, i: int) -> tuple[np.ndarray | Image.Image, Any]:
    """``images[i]`` of ``images_of``, RGB, and its label. Raises SampleFault if it cannot be decoded."""
    try:
        image, label = images[i]
        return image if isinstance(image, np.ndarray) else image.convert("RGB"), label
    except (OSError, SyntaxError) as error:  # what Pillow says of a broken file
        raise SampleFault(faults.CORRUPT_IMAGE, reason(error)[:200]) from None


class _Views(Dataset):
    """This rank's samples as (view, label, id); (fault, text) of a broken one."""

    def __init__(self, images: Dataset, view: View, rank: int, world: int):
        self.images, self.view, self.ids = images, view, range(rank, len(images), world)

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, i: int) -> tuple[Tensor, Any, int] | tuple[str, str]:
        try:
            image, label = picture(self.images, self.ids[i])
        except SampleFault as fault:
            return fault.name, f"sample {self.ids[i]}: {fault}"
        view = self.view(np.asarray(image), self.ids[i])
        return view, voc_labels(label) if isinstance(label, dict) else label, self.ids[i]


class _Good:
    """The batches of a DataLoader of ``_Views``, broken images left out."""

    def __init__(self, loader: DataLoader, source: str):
        self._loader, self._source = loader, source
        self.class_names = class_names(loader.dataset.images)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        left_out = LeftOut(len(self._loader.dataset), DataConfig().max_bad_fraction)
        for items in self._loader:
            for fault in (item for item in items if len(item) == 2):
                left_out.add(*fault)
            if good := [item for item in items if len(item) == 3]:
                views, labels, ids = zip(*good, strict=True)
                if None in labels:  # FER2013's test.csv
                    raise ConfigError(f"{self._source}: no labels in it (FER2013: fer2013.csv has the test set's)")
                yield torch.stack(views), torch.tensor(labels), torch.tensor(ids)


VOC_CLASSES = (
    "aeroplane bicycle bird boat bottle bus car cat chair cow diningtable dog horse motorbike person pottedplant sheep "
    "sofa train tvmonitor"
).split()


def voc_labels(annotation: dict[str, Any]) -> list[int]:
    """Per class: 1 present, 0 absent, -1 only as a difficult object (left out by VOC's metric)."""
    marks = [0] * len(VOC_CLASSES)
    for thing in annotation["annotation"]["object"]:
        c = VOC_CLASSES.index(thing["name"])
        if thing.get("difficult") == "1":
            marks[c] = marks[c] or -1
        else:
            marks[c] = 1
    return marks
