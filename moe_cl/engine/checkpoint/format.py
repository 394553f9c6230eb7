"""The files of a checkpoint: safetensors shards written and hashed in one pass, and the manifest over them.

The shards are plain safetensors that any reader opens. The writer is our own because safetensors' copies every tensor
into Python bytes under the interpreter lock: here the running step loop keeps the lock while a thread writes host
buffers as they are, and the hash is taken on the way.
"""

from __future__ import annotations

import hashlib
import json
import os
import struct
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from moe_cl.config import ConfigError

MANIFEST = "manifest.json"
FORMAT, VERSION = "moe_cl checkpoint", 1
_CHUNK = 1 << 22

_DTYPES = {
    torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.int64: "I64",
    torch.int32: "I32", torch.int16: "I16", torch.int8: "I8", torch.uint8: "U8", torch.bool: "BOOL",
}  # fmt: skip


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

    def dump(self) -> str:
        """JSON text."""
        return json.dumps({"format": FORMAT, "version": VERSION, **asdict(self)}, indent=1, sort_keys=True)


class Damaged(Exception):
    """A checkpoint that is not what its manifest says; the text names the file."""


def write_shard(path: Path, tensors: Mapping[str, Tensor]) -> FileEntry:
    """Write contiguous host ``tensors`` as one safetensors file, flushed to the disk; raises OSError."""
    header, at = {}, 0
    for key in sorted(tensors):
        x = tensors[key]
        size = x.numel() * x.element_size()
        header[key] = {"dtype": _DTYPES[x.dtype], "shape": list(x.shape), "data_offsets": [at, at + size]}
        at += size
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return write_bytes(path, [struct.pack("<Q", len(text)), text, *(_bytes(tensors[k]) for k in sorted(tensors))])


def _bytes(x: Tensor) -> memoryview:
    flat = x.detach().contiguous().view(-1)
    return memoryview(flat.view(torch.uint8).numpy()) if flat.numel() else memoryview(b"")


def write_bytes(path: Path, chunks: Iterable[bytes | memoryview]) -> FileEntry:
    """Write, hash and fsync one new file."""
    digest, size = hashlib.sha256(), 0
    with open(path, "wb") as file:
        for chunk in chunks:
            for start in range(0, len(chunk), _CHUNK):
                part = chunk[start : start + _CHUNK]
                file.write(part)
                digest.update(part)
                size += len(part)
        file.flush()
        os.fsync(file.fileno())
    return FileEntry(size, digest.hexdigest())


def sync_directory(path: Path) -> None:
    """Make the names in a directory durable."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def read_manifest(path: Path) -> Manifest:
    """The manifest of a checkpoint directory. Raises Damaged, or ConfigError for another format version."""
    try:
        tree = json.loads((path / MANIFEST).read_text())
        form, version = tree.pop("format"), tree.pop("version")
    except OSError as error:
        raise Damaged(f"{path.name}: no readable {MANIFEST} ({error.strerror})") from None
    except (ValueError, KeyError, AttributeError, TypeError):
        raise Damaged(f"{path.name}: {MANIFEST} is not a checkpoint's") from None
    if form != FORMAT or version != VERSION:
        raise ConfigError(
            f"{path}: {form} version {version!r} cannot be read here, which reads version {VERSION}; "
            "load it with the version of moe_cl that wrote it and save it again"
        )
    try:
        files = {name: FileEntry(**entry) for name, entry in tree.pop("files").items()}
        tensors = {name: TensorEntry(**entry) for name, entry in tree.pop("tensors").items()}
        if any("/" in name or name.startswith(".") for name in files):
            raise Damaged(f"{path.name}: {MANIFEST} names a file outside the directory")
        return Manifest(files=files, tensors=tensors, **tree)
    except (TypeError, KeyError, AttributeError):
        raise Damaged(f"{path.name}: {MANIFEST} is not a checkpoint's") from None


def verify_file(path: Path, name: str, entry: FileEntry) -> None:
    """Raises Damaged unless the file has the size and hash of its entry."""
    digest, file = hashlib.sha256(), path / name
    try:
        if file.stat().st_size != entry.bytes:
            raise Damaged(f"{path.name}: {name} has {file.stat().st_size} bytes instead of {entry.bytes}")
        with open(file, "rb") as handle:
            while part := handle.read(_CHUNK):
                digest.update(part)
    except OSError as error:
        raise Damaged(f"{path.name}: {name} cannot be read ({error.strerror})") from None
    if digest.hexdigest() != entry.sha256:
        raise Damaged(f"{path.name}: {name} does not have the sha256 of the manifest")


class Reader:
    """Tensors of one checkpoint by name, put together from their pieces, whatever ranks wrote them."""

    def __init__(self, path: Path, manifest: Manifest | None = None):
        self.path, self.manifest = path, manifest or read_manifest(path)
        self._open: dict[str, Any] = {}

    def names(self, kind: str) -> list[str]:
        """Names under ``kind/``."""
        return [name[len(kind) + 1 :] for name in self.manifest.tensors if name.startswith(kind + "/")]

    def flat(self, name: str, start: int = 0, stop: int | None = None) -> Tensor:
        """Elements [start, stop) of the flattened full tensor. Raises Damaged if a piece is missing."""
        entry = self.manifest.tensors[name]
        total = 1
        for size in entry.shape:
            total *= size
        stop = total if stop is None else stop
        out = torch.empty(stop - start, dtype=getattr(torch, entry.dtype))
        filled = 0
        for file, key, low, high in entry.pieces:
            a, b = max(start, low), min(stop, high)
            if a < b:
                out[a - start : b - start] = self._tensor(file, key).reshape(-1)[a - low : b - low]
                filled += b - a
        if filled != stop - start:
            raise Damaged(f"{self.path.name}: {name} has {filled} of {stop - start} elements")
        return out

    def tensor(self, name: str) -> Tensor:
        """A whole tensor in its shape."""
        return self.flat(name).view(self.manifest.tensors[name].shape)

    def tree(self, kind: str) -> dict[str, Tensor]:
        """Every tensor under ``kind/`` (``student``, ``teacher``, ``method``) in its full shape."""
        return {name: self.tensor(f"{kind}/{name}") for name in self.names(kind)}

    def json(self, name: str) -> Any:
        """A JSON file of the checkpoint."""
        try:
            return json.loads((self.path / name).read_text())
        except (OSError, ValueError) as error:
            raise Damaged(f"{self.path.name}: {name}: {error}") from None

    def _tensor(self, file: str, key: str) -> Tensor:
        try:
            if file not in self._open:
                self._open[file] = safe_open(self.path / file, framework="pt")
            return self._open[file].get_tensor(key)
        except (OSError, SafetensorError) as error:
            raise Damaged(f"{self.path.name}: {file}: {error}") from None
