"""Sets that come as arrays: MNIST's IDX files, scikit-learn's digits. Pixels become lossless PNG."""

from __future__ import annotations

import gzip
import io
import struct
from pathlib import Path

import numpy as np
from PIL import Image

from data_prep.sources.base import Item, Reader, Sample, Source, SourceOptions
from moe_cl.config import ConfigError

FASHION = ("T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot")
DIGITS = tuple("0123456789")
CLASS_NAMES = {"fashion-mnist": FASHION, "mnist": DIGITS, "digits": DIGITS}
IDX_PREFIX = {"train": "train", "test": "t10k", "val": "t10k"}


class ArrayReader(Reader):
    """Items whose ``at`` is a row of a uint8 array (N, H, W[, 3])."""

    def __init__(self, images: np.ndarray):
        self._images = images

    def read(self, item: Item) -> Sample:
        return Sample(png(Image.fromarray(self._images[item.at])), {}, {})


def png(image: Image.Image) -> bytes:
    """Lossless PNG bytes."""
    out = io.BytesIO()
    image.save(out, "PNG")
    return out.getvalue()


def read_idx(path: Path) -> np.ndarray:
    """An IDX file (LeCun's format: two zero bytes, type 8 = uint8, rank, big-endian sizes), gzipped or not."""
    try:
        raw = path.read_bytes()
        data = gzip.decompress(raw) if raw[:2] == b"\x1f\x8b" else raw
        zero, kind, rank = struct.unpack(">HBB", data[:4])
        shape = struct.unpack(f">{rank}I", data[4 : 4 + 4 * rank])
        if zero or kind != 8:
            raise ValueError("not uint8 IDX")
        return np.frombuffer(data, np.uint8, offset=4 + 4 * rank).reshape(shape)
    except (OSError, EOFError, ValueError, struct.error) as error:
        raise ConfigError(f"{path}: no IDX file of bytes ({error}); fetch it again") from None


def write_idx(path: Path, array: np.ndarray) -> None:
    """Counterpart of ``read_idx``: uint8, gzipped, without a time in the header."""
    head = struct.pack(f">HBB{array.ndim}I", 0, 8, array.ndim, *array.shape)
    path.write_bytes(gzip.compress(head + array.astype(np.uint8).tobytes(), mtime=0))


def idx_files(folder: Path, split: str) -> tuple[Path, Path] | None:
    """(images, labels) of a split in ``folder``, gzipped or not; None if they are not both there."""
    prefix = IDX_PREFIX.get(split)
    pair = []
    for part in ("images-idx3", "labels-idx1"):
        names = (
            f"{prefix}-{part}-ubyte.gz",
            f"{prefix}-{part}-ubyte",
            f"{prefix}-{part.replace('-idx', '.idx')}-ubyte",
        )
        pair.append(next((folder / n for n in names if (folder / n).is_file()), None))
    return (pair[0], pair[1]) if all(pair) else None


def open_idx(name: str, folder: Path, text: str, options: SourceOptions) -> Source:
    """MNIST-like files of a split. Raises ConfigError if they are not in the folder."""
    files = idx_files(folder, options.split)
    if files is None:
        raise ConfigError(
            f"{folder} has no {options.split} images and labels as IDX files; run `python -m data_prep fetch {name} "
            f"--out {folder}` (splits: train, test)"
        )
    images, labels = (read_idx(f) for f in files)
    return _from_arrays(name, text, options.split, images, labels, CLASS_NAMES.get(name, ()))


def digits_arrays(split: str) -> tuple[np.ndarray, np.ndarray]:
    """scikit-learn's bundled digits, 8 x 8, uint8. It has no split of its own: every fifth image is a test image."""
    from sklearn.datasets import load_digits

    bunch = load_digits()
    test = np.arange(len(bunch.target)) % 5 == 4
    keep = ~test if split == "train" else test
    return np.rint(bunch.images[keep] * (255 / 16)).astype(np.uint8), bunch.target[keep].astype(np.uint8)


def open_digits(text: str, options: SourceOptions) -> Source:
    """The digits without any file of their own."""
    if options.split not in IDX_PREFIX:
        raise ConfigError(f"digits has no split {options.split!r}; it has train and test")
    images, labels = digits_arrays(options.split)
    return _from_arrays("digits", text, options.split, images, labels, DIGITS)


def _from_arrays(name: str, text: str, split: str, images: np.ndarray, labels: np.ndarray, names: tuple) -> Source:
    if len(images) != len(labels):
        raise ConfigError(f"{text}: {len(images)} images but {len(labels)} labels; fetch it again")
    size = int(np.prod(images.shape[1:]))
    items = [Item(f"{split}/{i:06d}.png", int(label), size, i) for i, label in enumerate(labels)]
    return Source(name, text, items, names, ArrayReader(images))
