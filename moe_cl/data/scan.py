"""An index from a tar itself, made by us or by others: headers only, nothing is unpacked to disk."""

from __future__ import annotations

import json
import os
import re
import tarfile
from collections.abc import Iterator
from typing import Any, BinaryIO

from moe_cl.data.header import EXTENSIONS, BadImage, probe
from moe_cl.data.shard import UNSAFE_MEMBER, ZERO_LENGTH, ShardIndex, open_file

_MEMBER = re.compile(r"^((?:.*/|)[^.]+)[.]([^/]*)$")  # key and extension, as webdataset splits a member's name


class BrokenTar(ValueError):
    """A file that is no readable tar."""


class TruncatedTar(BrokenTar):
    """A tar that ends too early; ``index`` holds the samples before the break."""

    def __init__(self, message: str, index: ShardIndex):
        super().__init__(message)
        self.index = index


def split_member(name: str) -> tuple[str, str] | None:
    """(key, lower-case extension) of a member, as webdataset has it; None for meta members and names without a dot."""
    match = _MEMBER.match(name)
    if match is None or name.rsplit("/", 1)[-1].startswith("__"):
        return None
    return match.group(1), match.group(2).lower()


def is_unsafe(member: tarfile.TarInfo) -> bool:
    """A link, a device, a sparse file, or a name that leads out of the folder it would be unpacked to."""
    parts = member.name.split("/")
    return not member.isreg() or member.issparse() or member.name.startswith("/") or ".." in parts


def walk(stream: BinaryIO, where: str) -> Iterator[tarfile.TarInfo]:
    """Members of a plain tar, header by header, none of them read. Raises BrokenTar, at the end too.

    Python's ``tarfile`` takes a tar that stops at a header for a complete one; here the two closing zero blocks must be
    there, as every writer ends a tar with them.
    """
    try:
        with tarfile.open(fileobj=stream, mode="r:") as tar:
            while (member := tar.next()) is not None:
                yield member
                tar.members = []  # a walk needs no memory of where it was
            stream.seek(tar.offset)
            end = stream.read(tarfile.BLOCKSIZE)
    except tarfile.TarError as error:
        raise BrokenTar(f"{where}: truncated or not a tar ({error})") from None
    if end != tarfile.NUL * tarfile.BLOCKSIZE:
        raise BrokenTar(f"{where}: truncated: no end mark after byte {tar.offset}")


def scan(tar_url: str) -> ShardIndex:
    """An index from the shard itself: member headers, image headers, labels; nothing is unpacked.

    Raises:
        TruncatedTar: the shard ends too early; its ``index`` has the samples before the break.
        BrokenTar: it is no tar at all.
    """
    rows: list[dict[str, Any]] = []
    ignored = 0
    with open_file(tar_url) as stream:
        length = stream.seek(0, os.SEEK_END)
        stream.seek(0)
        try:
            group: list[tuple[str, tarfile.TarInfo]] = []
            current = None
            for member in walk(stream, tar_url):
                parts = None if member.isdir() else split_member(member.name)
                if parts is None:
                    continue
                if parts[0] != current:
                    ignored += _close(stream, current, group, rows, length)
                    current, group = parts[0], []
                group.append((parts[1], member))
        except BrokenTar as error:
            if not rows and not group:
                raise
            # Of the group at the break only what lies inside the file is known; a sample cut off is no sample.
            if all(m.offset_data + m.size <= length for _, m in group):
                ignored += _close(stream, current, group, rows, length)
            raise TruncatedTar(str(error), ShardIndex.from_rows(rows, bytes=length, ignored=ignored)) from None
        ignored += _close(stream, current, group, rows, length)
    return ShardIndex.from_rows(rows, bytes=length, ignored=ignored)


def _close(stream: BinaryIO, key: str | None, group: list[tuple[str, tarfile.TarInfo]], rows: list, length: int) -> int:
    """Add the row of a finished group; 1 if the group holds no image."""
    if key is None:
        return 0
    found = next(((e, m) for e, m in group if e.rsplit(".", 1)[-1] in EXTENSIONS), None)
    if found is None:
        return 1
    ext, member = found
    row = {"key": key, "name": "", "ext": ext, "offset": member.offset_data, "size": member.size,
           "label": -1, "width": 0, "height": 0}  # fmt: skip
    if is_unsafe(member):
        row |= {"fault": UNSAFE_MEMBER, "size": 0}
    elif member.size == 0:
        row["fault"] = ZERO_LENGTH
    else:
        try:
            header = probe(Window(stream, member.offset_data, member.size))
            row |= {"width": header.width, "height": header.height}
        except BadImage:
            pass  # width 0 says so; the loader and lint name it when they read the bytes
    for other, m in group:
        if other in ("cls", "json") and not is_unsafe(m) and m.size < 1 << 20:
            stream.seek(m.offset_data)
            _note(row, other, stream.read(m.size))
    rows.append(row)
    return 0


def label_of(ext: str, data: bytes) -> int:
    """The class number in a ``cls`` or ``json`` member (field ``label``); -1 where there is none."""
    value = _json(data)
    if ext == "json":
        value = value.get("label") if isinstance(value, dict) else None
    return value if type(value) is int and value >= 0 else -1


def _note(row: dict[str, Any], ext: str, data: bytes) -> None:
    """Label and name from a sample's ``cls`` or ``json`` member; ``cls`` wins."""
    if ext == "cls" or row["label"] == -1:
        row["label"] = label_of(ext, data)
    value = _json(data) if ext == "json" else None
    if isinstance(value, dict):
        row["name"] = str(value.get("name") or value.get("filename") or "")


def _json(data: bytes) -> Any:
    try:
        return json.loads(data)
    except ValueError:
        return None


class Window:
    """A part of a file as a seekable file: a member, so that its header is read without the rest, or a tar in a tar."""

    def __init__(self, stream: BinaryIO, offset: int, size: int):
        self._stream, self._offset, self._size, self._at = stream, offset, size, 0

    def read(self, count: int = -1) -> bytes:
        left = self._size - self._at
        count = left if count is None or count < 0 else min(count, left)
        self._stream.seek(self._offset + self._at)
        data = self._stream.read(count)
        self._at += len(data)
        return data

    def seek(self, where: int, whence: int = os.SEEK_SET) -> int:
        base = {os.SEEK_SET: 0, os.SEEK_CUR: self._at, os.SEEK_END: self._size}[whence]
        self._at = min(max(base + where, 0), self._size)
        return self._at

    def tell(self) -> int:
        return self._at
