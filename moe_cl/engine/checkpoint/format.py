"""The files of a checkpoint: safetensors shards written and hashed in one pass, and read only after their hash.

The shards are plain safetensors that any reader opens. The writer is our own because safetensors' copies every tensor
into Python bytes under the interpreter lock: here the running step loop keeps the lock while a thread writes host
buffers as they are, and the hash is taken on the way.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import struct
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from moe_cl.engine.checkpoint.manifest import (
    DTYPES,
    MANIFEST,
    NAMED,
    Damaged,
    FileEntry,
    Manifest,
    OtherVersion,
    TensorEntry,
    read_manifest,
)

__all__ = [
    "MANIFEST", "Damaged", "FileEntry", "Manifest", "OtherVersion", "Reader", "TensorEntry", "read_manifest",
    "sync_directory", "verify_file", "write_bytes", "write_shard",
]  # fmt: skip

_CHUNK = 1 << 22


def write_shard(path: Path, tensors: Mapping[str, Tensor], about: Mapping[str, str] | None = None) -> FileEntry:
    """Write contiguous host ``tensors`` as one safetensors file, flushed to the disk; raises OSError.

    about: the file's metadata.
    """
    header: dict[str, Any] = {"__metadata__": dict(about)} if about else {}
    at = 0
    for key in sorted(tensors):
        x = tensors[key]
        size = x.numel() * x.element_size()
        header[key] = {"dtype": DTYPES[x.dtype], "shape": list(x.shape), "data_offsets": [at, at + size]}
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
    """Tensors of one checkpoint by name, put together from their pieces, whatever ranks wrote them.

    No file is used before its size and sha256 are those of the manifest, and no piece unless it has the manifest's type
    and length: every method raises Damaged otherwise.
    """

    def __init__(self, path: Path, manifest: Manifest | None = None):
        self.path, self.manifest = path, manifest or read_manifest(path)
        self._open: dict[str, Any] = {}
        self._good: set[str] = set()

    def verify(self, names: Iterable[str] | None = None) -> None:
        """Check these files (default: all) and every piece in them now."""
        chosen = set(self.manifest.files if names is None else names)
        for name in sorted(chosen):
            self.check(name)
        for entry in self.manifest.tensors.values():
            for piece in entry.pieces:
                if piece[0] in chosen:
                    self._piece(entry, piece)

    def check(self, name: str) -> Path:
        """The path of a file whose size and hash are the manifest's; hashed at its first use."""
        if name not in self._good:
            if name not in self.manifest.files:
                raise Damaged(f"{self.path.name}: {MANIFEST} does not have {name}")
            verify_file(self.path, name, self.manifest.files[name])
            self._good.add(name)
        return self.path / name

    def trust(self) -> None:
        """Another rank checked the rest."""
        self._good.update(self.manifest.files)

    def names(self, kind: str) -> list[str]:
        """Names under ``kind/``."""
        return [name[len(kind) + 1 :] for name in self.manifest.tensors if name.startswith(kind + "/")]

    def shape(self, name: str) -> tuple[int, ...]:
        """Full shape of a tensor."""
        return tuple(self.manifest.tensors[name].shape)

    def flat(self, name: str, start: int = 0, stop: int | None = None) -> Tensor:
        """Elements [start, stop) of the flattened full tensor."""
        entry = self.manifest.tensors[name]
        stop = entry.size if stop is None else stop
        wanted = []
        for piece in entry.pieces:
            a, b = max(start, piece[2]), min(stop, piece[3])
            if a < b:
                wanted.append((a, b, piece, self._piece(entry, piece)))
        out = torch.empty(stop - start, dtype=NAMED[entry.dtype])
        for a, b, (_, key, low, _), file in wanted:
            out[a - start : b - start] = file.get_tensor(key).reshape(-1)[a - low : b - low]
        return out

    def tensor(self, name: str) -> Tensor:
        """A whole tensor in its shape."""
        return self.flat(name).view(self.manifest.tensors[name].shape)

    def tree(self, kind: str) -> dict[str, Tensor]:
        """Every tensor under ``kind/`` (``student``, ``teacher``, ``method``) in its full shape."""
        return {name: self.tensor(f"{kind}/{name}") for name in self.names(kind)}

    def json(self, name: str) -> Any:
        """A JSON file of the checkpoint."""
        path = self.check(name)
        try:
            return json.loads(path.read_text())
        except (OSError, ValueError, RecursionError) as error:
            raise Damaged(f"{self.path.name}: {name}: {error}") from None

    def state(self) -> dict[str, Any]:
        """``extra.json``: the loop's ``extra`` (cursor, metrics) and the ``engine``'s counters and loss scale."""
        tree = self.json("extra.json")
        if not isinstance(tree, dict) or not all(isinstance(tree.get(key), dict) for key in ("extra", "engine")):
            raise Damaged(f"{self.path.name}: extra.json is not a checkpoint's")
        counters = tree["engine"].get("counters")
        if not isinstance(counters, dict) or not all(type(count) is int for count in counters.values()):
            raise Damaged(f"{self.path.name}: extra.json has no counters of the engine")
        return tree

    def steps(self) -> dict[str, float | None]:
        """``optimizer.json``: the step count of each trained parameter, None without any state so far."""
        tree = self.json("optimizer.json")
        if not isinstance(tree, dict) or not all(c is None or isinstance(c, (int, float)) for c in tree.values()):
            raise Damaged(f"{self.path.name}: optimizer.json is not a checkpoint's")
        return tree

    def _piece(self, entry: TensorEntry, piece: list[Any]) -> Any:
        """The open file of a piece, which has the manifest's type and length there."""
        file, key, low, high = piece
        try:
            if file not in self._open:
                self._open[file] = safe_open(self.check(file), framework="pt")
            part = self._open[file].get_slice(key)
            size, dtype = math.prod(part.get_shape()), part.get_dtype()
        except (OSError, SafetensorError) as error:
            raise Damaged(f"{self.path.name}: {file}: {error}") from None
        if size != high - low or dtype != DTYPES[NAMED[entry.dtype]]:
            raise Damaged(f"{self.path.name}: {file}: {key} has {size} {dtype}, not what {MANIFEST} says")
        return self._open[file]
