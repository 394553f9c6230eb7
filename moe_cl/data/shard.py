"""The index beside a shard: where each of its samples lies. And how small files are read (local or URL) and written.

Everything is JSON: no file of somebody else's is ever unpickled. URLs go through fsspec, never through a shell.
"""

from __future__ import annotations

import json
import os
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from moe_cl.config import ConfigError

FORMAT = "moe_cl.shard-index"
VERSION = 1
SUFFIX = ".index.json"
ZERO_LENGTH, UNSAFE_MEMBER = "zero_length_member", "unsafe_member"  # faults a scan can name
_COLUMNS = {"offset": np.int64, "size": np.int64, "label": np.int64, "width": np.int32, "height": np.int32}


@dataclass
class ShardIndex:
    """The samples of one shard, a row each, in the order of the tar.

    Attributes:
        keys: the member name up to its first dot.
        names: the sample's name at its source (``n01440764/n01440764_10026.JPEG``); empty where unknown.
        ext: extension of the image member.
        offset, size: bytes of the image member inside the tar (int64); size 0 where ``faults`` names the row.
        label: class number, -1 where unknown (int64).
        width, height: pixels as the header says, 0 where it cannot be read (int32).
        bytes, sha256: of the whole tar; the hash is empty where nobody computed it.
        faults: row -> ``zero_length_member`` or ``unsafe_member``; such a row is a slot without an image.
        ignored: groups of members that hold no image.
        skipped: (name, reason) of samples that the sharder left out of this shard.
    """

    keys: list[str]
    names: list[str]
    ext: list[str]
    offset: np.ndarray
    size: np.ndarray
    label: np.ndarray
    width: np.ndarray
    height: np.ndarray
    bytes: int = 0
    sha256: str = ""
    faults: dict[int, str] = field(default_factory=dict)
    ignored: int = 0
    skipped: list[tuple[str, str]] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.keys)

    @classmethod
    def from_rows(cls, rows: list[dict[str, Any]], **more: Any) -> ShardIndex:
        """Columns of rows ``{key, name, ext, offset, size, label, width, height[, fault]}``."""
        numbers = {c: np.array([row[c] for row in rows], dtype=t) for c, t in _COLUMNS.items()}
        text = {"keys": "key", "names": "name", "ext": "ext"}
        faults = {i: row["fault"] for i, row in enumerate(rows) if row.get("fault")}
        return cls(**{c: [row[k] for row in rows] for c, k in text.items()}, **numbers, faults=faults, **more)

    def to_json(self, shard: str) -> str:
        """The index file's text: the same for the same shard, byte for byte."""
        head = {"format": FORMAT, "version": VERSION, "shard": shard, "samples": len(self), "bytes": self.bytes}
        columns = {"keys": self.keys, "names": self.names, "ext": self.ext}
        columns.update({c: getattr(self, c).tolist() for c in _COLUMNS})
        tail = {"faults": {str(k): v for k, v in sorted(self.faults.items())}, "ignored": self.ignored}
        tail["skipped"] = [list(pair) for pair in self.skipped]
        return json.dumps(head | {"sha256": self.sha256} | columns | tail, separators=(",", ":")) + "\n"

    @classmethod
    def from_json(cls, text: str | bytes, where: str) -> ShardIndex:
        """Raises ConfigError if ``text`` (read from ``where``) is no index of a version that we know."""
        try:
            tree = json.loads(text)
            if tree["format"] != FORMAT or tree["version"] != VERSION:
                raise KeyError("format")
            numbers = {c: np.array(tree[c], dtype=t) for c, t in _COLUMNS.items()}
            lists = {c: tree[c] for c in ("keys", "names", "ext")}
            if any(len(c) != tree["samples"] for c in (*numbers.values(), *lists.values())):
                raise KeyError("samples")
            faults = {int(k): v for k, v in tree["faults"].items()}
            skipped = [tuple(pair) for pair in tree["skipped"]]
            return cls(**lists, **numbers, bytes=tree["bytes"], sha256=tree["sha256"], faults=faults,
                       ignored=tree["ignored"], skipped=skipped)  # fmt: skip
        except (ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError):
            raise ConfigError(f"{where}: not a shard index; build it again with `python -m data_prep index`") from None


@dataclass(frozen=True)
class Shard:
    """One tar of a data set: ``url`` (path or URL), number of ``samples``, size in ``bytes`` (0 = unknown), hash."""

    url: str
    samples: int
    bytes: int = 0
    sha256: str = ""

    @property
    def name(self) -> str:
        return self.url.rstrip("/").rsplit("/", 1)[-1]


def is_remote(url: str) -> bool:
    """Whether ``url`` has a scheme (``https://``, ``s3://``, ``memory://``), so that fsspec reads it."""
    return "://" in url


def index_url(tar_url: str) -> str:
    """Where the index of a shard lies: beside it."""
    return re.sub(r"\.tar$", "", tar_url) + SUFFIX


def read_bytes(url: str) -> bytes:
    """A whole small file, local or remote.

    Raises FileNotFoundError; ConfigError if a server refuses it; transient network errors as fsspec gives them.
    """
    if not is_remote(url):
        return Path(url).read_bytes()
    import fsspec  # a fifth of a second that local files need not pay

    from moe_cl.data.remote import refused

    fs, path = fsspec.core.url_to_fs(url)
    try:
        return fs.cat_file(path)
    except Exception as error:
        if why := refused(error):
            raise ConfigError(
                f"{url} may not be read (the server answers {why}): give an address or credentials that it takes"
            ) from None
        raise


def open_file(url: str) -> BinaryIO:
    """A seekable binary file, local or remote."""
    if not is_remote(url):
        return open(url, "rb")
    import fsspec

    return fsspec.open(url, "rb").open()


def write_atomic(path: str | Path, data: bytes | str, durable: bool = True) -> None:
    """A file that is there whole or not at all; with ``durable`` also after a power cut (waits for the disk)."""
    path = Path(path)
    temporary = path.with_name(path.name + ".part")
    with open(temporary, "wb") as f:
        f.write(data.encode() if isinstance(data, str) else data)
        if durable:
            f.flush()
            os.fsync(f.fileno())
    os.replace(temporary, path)


def load_index(tar_url: str) -> ShardIndex:
    """The index beside a shard. Raises ConfigError with the command that builds it."""
    where = index_url(tar_url)
    try:
        text = read_bytes(where)
    except FileNotFoundError:
        raise ConfigError(f"{tar_url} has no index; run `python -m data_prep index {tar_url}`") from None
    return ShardIndex.from_json(text, where)


def save(index: ShardIndex, tar_path: str | Path, durable: bool = True) -> None:
    """Write the index beside a local shard, atomically."""
    write_atomic(index_url(str(tar_path)), index.to_json(Path(tar_path).name), durable)
