"""The manifest of a checkpoint: files with size and sha256, where each tensor's pieces lie, and a hash of itself.

It is read as strictly as it is written: what its hash or its own figures contradict is ``Damaged``, so that no flipped
bit in it leads to the wrong tensor. Format version 1 had no such hash; of it the figures alone are checked.
"""

from __future__ import annotations

import hashlib
import json
import math
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from moe_cl.config import ConfigError

MANIFEST = "manifest.json"
FORMAT, VERSION = "moe_cl checkpoint", 2
READABLE = (1, VERSION)

DTYPES = {
    torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.int64: "I64",
    torch.int32: "I32", torch.int16: "I16", torch.int8: "I8", torch.uint8: "U8", torch.bool: "BOOL",
}  # fmt: skip
NAMED = {str(dtype).removeprefix("torch."): dtype for dtype in DTYPES}


class Damaged(ConfigError):
    """A checkpoint that is not what its manifest says; the text names the file."""


class OtherVersion(ConfigError):
    """A checkpoint of a format version that is not read here."""


@dataclass
class FileEntry:
    """Size and hash of a file."""

    bytes: int
    sha256: str


@dataclass
class TensorEntry:
    """A tensor of the model under its full shape; pieces = [file, key, start, stop] in flat elements."""

    shape: list[int]
    dtype: str
    pieces: list[list[Any]] = field(default_factory=list)

    @property
    def size(self) -> int:
        """Elements of the full tensor."""
        return math.prod(self.shape)


@dataclass
class Manifest:
    """What a checkpoint holds. ``tensors`` is keyed ``student/NAME``, ``teacher/NAME``, ``optimizer/KEY/NAME`` ..."""

    step: int
    world: int
    files: dict[str, FileEntry] = field(default_factory=dict)
    tensors: dict[str, TensorEntry] = field(default_factory=dict)
    layout: dict[str, Any] = field(default_factory=dict)  # zero_stage, ep_size: for people, loading does not need them
    metrics: dict[str, float] = field(default_factory=dict)
    created: float = 0.0
    version: int = VERSION

    def dump(self) -> str:
        """JSON text, with the hash of all of it."""
        tree = {"format": FORMAT, **asdict(self), "version": VERSION}
        return json.dumps({**tree, "sha256": digest(tree)}, indent=1, sort_keys=True)

    def complaint(self) -> str | None:
        """What in it cannot be, or None: files of this directory alone, every tensor covered once by pieces of them."""
        figures = (self.created, *self.metrics.values())
        if not _whole(self.step, self.world) or not all(isinstance(x, (int, float)) for x in figures):
            return "has no step, ranks, time or metrics"
        for name, entry in self.files.items():
            if not name or "/" in name or "\\" in name or name.startswith("."):
                return f"names a file outside the directory ({name!r})"
            if not _whole(entry.bytes) or not isinstance(entry.sha256, str):
                return f"has no size and sha256 of {name}"
        used: set[tuple[str, str]] = set()
        for name, entry in self.tensors.items():
            if "/" not in name or not _whole(*entry.shape) or entry.dtype not in NAMED:
                return f"has no name, shape and type of {name!r}"
            if complaint := self._cover(name, entry):
                return f"{complaint} of {name}"
            pieces = [(file, key) for file, key, *_ in entry.pieces]
            if used.intersection(pieces):
                return f"has a piece of two tensors, one of them {name}"
            used.update(pieces)
        return None

    def _cover(self, name: str, entry: TensorEntry) -> str | None:
        """Why the pieces of a tensor do not make it: they carry its name, and touch end to end."""
        at = 0
        for file, key, low, high in entry.pieces:
            if file not in self.files or not isinstance(key, str) or not _whole(low, high):
                return f"has no file, key and range of a piece ({file!r})"
            if not f"/{name}".endswith(f"/{key.removesuffix(f'[{low}:{high}]')}"):
                return f"has another tensor's piece ({key!r})"
        for *_, low, high in sorted(entry.pieces, key=lambda piece: piece[2:]):
            if low != at or high <= low < entry.size:
                return f"has {'two pieces' if low < at else 'no piece'} with element {min(low, at)}"
            at = high
        return f"has {at} of {entry.size} elements" if at != entry.size else None


def _whole(*values: Any) -> bool:
    return all(type(x) is int and x >= 0 for x in values)


def digest(tree: dict[str, Any]) -> str:
    """sha256 over all of a manifest's tree but the hash itself, however the text is laid out."""
    rest = {key: value for key, value in tree.items() if key != "sha256"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def read_manifest(path: Path) -> Manifest:
    """The manifest of a checkpoint directory. Raises Damaged, or OtherVersion."""
    damaged = Damaged(f"{path.name}: {MANIFEST} is not a checkpoint's")
    try:
        tree = json.loads((path / MANIFEST).read_text())
        form, version = tree["format"], tree["version"]
    except OSError as error:
        raise Damaged(f"{path.name}: no readable {MANIFEST} ({error.strerror})") from None
    except (ValueError, KeyError, TypeError, RecursionError):
        raise damaged from None
    if form != FORMAT or version not in READABLE:
        raise OtherVersion(
            f"{path}: {form} version {version!r} cannot be read here, which reads versions {READABLE[0]} to {VERSION}; "
            "load it with the version of moe_cl that wrote it and save it again"
        )
    if version > 1 and tree.get("sha256") != digest(tree):
        raise Damaged(f"{path.name}: {MANIFEST} does not have its own sha256")
    rest = {key: value for key, value in tree.items() if key not in ("format", "sha256", "files", "tensors")}
    try:
        files = {name: FileEntry(**entry) for name, entry in tree["files"].items()}
        tensors = {name: TensorEntry(**entry) for name, entry in tree["tensors"].items()}
        manifest = Manifest(files=files, tensors=tensors, **rest)
        complaint = manifest.complaint()
    except (TypeError, KeyError, ValueError, AttributeError):
        raise damaged from None
    if complaint:
        raise Damaged(f"{path.name}: {MANIFEST} {complaint}")
    return manifest
