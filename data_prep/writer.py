"""A shard, written: a tar whose bytes depend on its samples alone, its hash, and the index of what lies where.

webdataset's ``ShardWriter`` starts a new file when the running size says so, one shard after the other, and builds each
member through ``tarfile`` (about 60 microseconds a member, as long as the kernel needs to copy a 100 kB image). Here
several processes write different shards of one plan at once, hashing on the way, so a shard is written by this small
class: plain ustar members with fixed owner, mode and time. The tests read the result with webdataset, timm and tarfile.
"""

from __future__ import annotations

import hashlib
import json
import os
import tarfile
from pathlib import Path
from typing import Any

from moe_cl.data.index import ShardIndex, save

BLOCK = tarfile.BLOCKSIZE
MTIME = 1_000_000_000  # any fixed second; zero makes some tools warn
_NAME, _SIZE, _CHECKSUM = slice(0, 100), slice(124, 136), slice(148, 156)


def _template() -> bytes:
    info = tarfile.TarInfo("")
    info.mtime, info.mode, info.uname, info.gname = MTIME, 0o444, "root", "root"
    header = bytearray(info.tobuf(tarfile.USTAR_FORMAT))
    header[_SIZE], header[_CHECKSUM] = b"\0" * 12, b" " * 8  # a checksum is computed over eight spaces in its place
    return bytes(header)


_TEMPLATE = _template()
_TEMPLATE_SUM = sum(_TEMPLATE)


def member(name: str, data: bytes) -> tuple[bytes, bytes, bytes]:
    """(header, data, padding) of one ustar member. ``name`` is ASCII, at most 100 characters; data below 8 GiB."""
    raw, size = name.encode("ascii"), b"%011o\0" % len(data)
    if len(raw) > 100 or len(size) != 12:
        raise ValueError(f"{name}: too long a name or too large a member for a ustar header")
    checksum = _TEMPLATE_SUM + sum(raw) + sum(size)
    header = bytearray(_TEMPLATE)
    header[0 : len(raw)], header[_SIZE], header[_CHECKSUM] = raw, size, b"%06o\0 " % checksum
    return bytes(header), data, b"\0" * (-len(data) % BLOCK)


class ShardFile:
    """One shard under a temporary name; ``close`` gives it and its index their names, so a named shard is complete."""

    def __init__(self, path: Path):
        self.path, self._part = path, path.with_name(path.name + ".part")
        self._file = open(self._part, "wb", buffering=0)
        self._hash, self._at, self._rows = hashlib.sha256(), 0, []

    def add(self, key: str, ext: str, image: bytes, row: dict[str, Any], extra: dict[str, bytes]) -> None:
        """Append a sample.

        Args:
            key: unique, sorted within the shard.
            ext: of the image member.
            image: the file's bytes.
            row: ``name``, ``label`` (-1 = none), ``width``, ``height``; ``json``: further fields for the json member.
            extra: further members, extension -> bytes.
        """
        meta = row["json"] | {"name": row["name"], "width": row["width"], "height": row["height"]}
        members = {ext: image} | {e: data for e, data in extra.items() if e not in (ext, "cls", "json")}
        if row["label"] >= 0:
            members["cls"] = str(row["label"]).encode()
            meta["label"] = row["label"]
        members["json"] = json.dumps(meta, sort_keys=True, separators=(",", ":")).encode()
        head, data, *rest = (part for e, data in members.items() for part in member(f"{key}.{e}", data))
        self._rows.append(
            {c: row[c] for c in ("name", "label", "width", "height")}
            | {"key": key, "ext": ext, "offset": self._at + BLOCK, "size": len(image)}
        )
        self._write(head, data, b"".join(rest))

    def _write(self, *parts: bytes) -> None:
        for part in parts:
            self._hash.update(part)
        size = sum(map(len, parts))
        self._at += size
        done = os.writev(self._file.fileno(), parts)
        view = memoryview(b"".join(parts))[done:] if done < size else b""
        while view:  # the kernel may take less than all of it
            view = view[self._file.write(view) :]

    def close(self, skipped: list[tuple[str, str]]) -> ShardIndex:
        """End the tar, write the index beside it, then name the tar. ``skipped``: who was left out, and why."""
        self._write(b"\0" * (2 * BLOCK + -(self._at + 2 * BLOCK) % tarfile.RECORDSIZE))
        self._file.close()
        index = ShardIndex.from_rows(self._rows, bytes=self._at, sha256=self._hash.hexdigest(), skipped=skipped)
        save(index, self.path, durable=False)  # waiting here would write the tar to disk too; a resume checks its size
        os.replace(self._part, self.path)
        return index

    def discard(self) -> None:
        """Remove what was written so far."""
        self._file.close()
        self._part.unlink(missing_ok=True)
