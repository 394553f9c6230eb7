"""Tars: ImageNet's tar of class tars, a flat tar of images, and webdataset shards. None is unpacked to disk.

The listing walks member headers and keeps (path, offset); a worker reads an image with one ``pread``.
"""

from __future__ import annotations

import io
import json
import os
import tarfile
from collections.abc import Iterator, Sequence
from pathlib import Path

from data_prep.sources.base import UNLABELLED, Item, Reader, Sample, Source, SourceOptions
from data_prep.sources.labels import read_labels
from moe_cl.config import ConfigError
from moe_cl.counting import Counting
from moe_cl.data.header import EXTENSIONS, BadImage
from moe_cl.data.index import (
    UNSAFE_MEMBER,
    BrokenTar,
    expand,
    index_url,
    is_remote,
    load_index,
    read_dataset,
    resolve,
    scan,
)  # fmt: skip
from moe_cl.data.scan import Window, is_unsafe, split_member, walk


class SpanReader(Reader):
    """Reads items whose ``at`` is (path, offset): bytes [offset, offset + size) of a file."""

    def __init__(self):
        self._open: dict[str, int] = {}

    def __getstate__(self) -> dict:
        return {"_open": {}}

    def _descriptor(self, path: str) -> int:
        if path not in self._open:
            if len(self._open) >= 64:  # a re-shard may name thousands of files
                os.close(self._open.pop(next(iter(self._open))))
            self._open[path] = os.open(path, os.O_RDONLY)
        return self._open[path]

    def prepare(self, items: Sequence[Item]) -> None:
        """Shuffled reads of one big tar: the kernel is told all of a shard's places first and orders them itself."""
        for item in items if len({item.at[0] for item in items}) == 1 else ():
            os.posix_fadvise(self._descriptor(item.at[0]), item.at[1], item.size, os.POSIX_FADV_WILLNEED)

    def span(self, path: str, offset: int, size: int) -> bytes:
        parts = []
        while size > 0:
            data = os.pread(self._descriptor(path), size, offset)
            if not data:
                raise OSError(f"{path} ends before byte {offset + size}")
            parts.append(data)
            offset, size = offset + len(data), size - len(data)
        return b"".join(parts)

    def read(self, item: Item) -> Sample:
        return Sample(self.span(item.at[0], item.at[1], item.size), {}, {})


class GroupReader(SpanReader):
    """Reads items whose ``at`` is (path, offset, length, key, image extension): all members of a shard's sample."""

    def read(self, item: Item) -> Sample:
        path, offset, length, key, ext = item.at
        image, meta, extra = None, {}, {}
        try:
            with tarfile.open(fileobj=io.BytesIO(self.span(path, offset, length)), mode="r:") as tar:
                for member in tar:
                    parts = split_member(member.name)
                    if parts is None or parts[0] != key or is_unsafe(member):
                        continue
                    data = tar.extractfile(member).read()
                    if parts[1] == ext and image is None:
                        image = data
                    elif parts[1] == "json":
                        meta = _object(data)
                    elif parts[1] != "cls" and parts[1].isascii():
                        extra[parts[1]] = data
        except tarfile.TarError as error:
            raise BadImage(f"{path}: {error}") from None
        if not image:
            raise BadImage("zero-length or unsafe member")
        return Sample(image, meta, dict(sorted(extra.items())))


def open_tar(path: Path, text: str, options: SourceOptions) -> Source | None:
    """ImageNet's nested tar or a flat tar of images; None if it is a shard (samples with several members)."""
    try:
        with open(path, "rb") as stream:
            first = [m for m, _ in zip(_files(walk(stream, str(path))), range(3), strict=False)]
            stream.seek(0)
            if first and first[0].name.endswith(".tar"):
                return _nested(path, text, stream)
            keys = [split_member(m.name) for m in first]
            if len(keys) > 1 and keys[0] and keys[1] and keys[0][0] == keys[1][0] and not options.labels:
                return None
            return _flat(path, text, stream, options)
    except BrokenTar as error:
        raise ConfigError(f"{error}; download it again") from None


def _files(members: Iterator[tarfile.TarInfo]) -> Iterator[tarfile.TarInfo]:
    return (m for m in members if m.isreg() and not is_unsafe(m))


def _nested(path: Path, text: str, stream) -> Source:  # noqa: ANN001 - a binary file
    classes = sorted(
        (m.name, m.offset_data, m.size) for m in _files(walk(stream, str(path))) if m.name.endswith(".tar")
    )
    names = tuple(name.rsplit("/", 1)[-1][: -len(".tar")] for name, _, _ in classes)
    items: list[Item] = []
    where = str(path)
    with Counting("listing class tars", len(classes)) as progress:
        for label, (name, offset, size) in enumerate(classes):
            inner = Window(stream, offset, size)
            for m in sorted(_files(walk(inner, f"{path}: {name}")), key=lambda m: m.name):
                if m.name.rsplit(".", 1)[-1].lower() in EXTENSIONS:
                    at = (where, offset + m.offset_data)
                    items.append(Item(f"{names[label]}/{m.name.rsplit('/', 1)[-1]}", label, m.size, at))
            progress.advance()
    return _checked(Source("imagenet" if len(names) == 1000 else path.stem, text, items, names, SpanReader()), path)


def _flat(path: Path, text: str, stream, options: SourceOptions) -> Source:  # noqa: ANN001 - a binary file
    given = options.labels or options.devkit
    labels = read_labels(options.labels, options.devkit) if given else None
    items = [
        Item(m.name.removeprefix("./"), labels.of(m.name) if labels else UNLABELLED, m.size, (str(path), m.offset_data))
        for m in _files(walk(stream, str(path)))
        if m.name.rsplit(".", 1)[-1].lower() in EXTENSIONS
    ]
    items.sort(key=lambda item: item.name)
    notes = [] if labels else ["no labels: give --labels LIST or --devkit ARCHIVE if there are any"]
    name = "imagenet" if path.name.startswith("ILSVRC2012_img_") else path.stem
    names = labels.class_names if labels else ()
    return _checked(Source(name, text, items, names, SpanReader(), notes), path)


def _checked(source: Source, path: Path) -> Source:
    if not source.items:
        raise ConfigError(f"{path} holds no image")
    return source


def open_shards(pattern: str, text: str) -> Source:
    """Existing webdataset shards (local), ours or others': their samples with all members. Raises ConfigError."""
    if is_remote(pattern):
        raise ConfigError(f"{pattern}: re-sharding reads local shards; download them first")
    bare = os.path.isdir(pattern) and read_dataset(pattern) is None
    if bare or pattern.endswith(".tar") or any(c in pattern for c in "{*?["):
        paths = sorted(str(p) for p in Path(pattern).glob("*.tar")) if bare else expand(pattern)
        splits = (read_dataset(os.path.dirname(paths[0]) or ".") or {"splits": {}})["splits"]
        names = tuple(next((s["class_names"] for s in splits.values()), ()))
    else:
        dataset = resolve(pattern)
        paths, names = [shard.url for shard in dataset.shards], dataset.class_names
    items: list[Item] = []
    with Counting("listing shards", len(paths)) as progress:
        for path in paths:
            try:
                items += _groups(path)
            except FileNotFoundError:
                raise ConfigError(f"{path} does not exist; check the shard pattern") from None
            except BrokenTar as error:
                raise ConfigError(f"{error}; `python -m data_prep lint --fix` keeps its whole samples") from None
            progress.advance()
    if not items:
        raise ConfigError(f"{pattern}: shards without a single image")
    return Source(Path(paths[0]).stem.rsplit("-", 2)[0], text, items, names, GroupReader())


def _groups(path: str) -> Iterator[Item]:
    """An item a sample: the bytes from its first member's header to its last member's end."""
    index = load_index(path) if os.path.exists(index_url(path)) else scan(path)
    spans: dict[str, tuple[int, int]] = {}
    with open(path, "rb") as stream:
        for m in walk(stream, path):
            parts = None if m.isdir() else split_member(m.name)
            if parts:
                end = m.offset_data + (m.size + tarfile.BLOCKSIZE - 1) // tarfile.BLOCKSIZE * tarfile.BLOCKSIZE
                spans[parts[0]] = (spans.get(parts[0], (m.offset, 0))[0], end)
    for row, key in enumerate(index.keys):
        if index.faults.get(row) != UNSAFE_MEMBER:
            start, end = spans[key]
            at = (path, start, end - start, key, index.ext[row])
            yield Item(index.names[row] or key, int(index.label[row]), int(index.size[row]), at)


def _object(data: bytes) -> dict:
    try:
        value = json.loads(data)
    except ValueError:
        return {}
    return value if isinstance(value, dict) else {}
