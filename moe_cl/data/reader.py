"""The bytes of samples, by shard and row: local files by ``pread``, remote ones by range requests, maybe cached.

Nothing is unpacked to disk. Each sample is read with the tar header in front of it, so that an index that does not
belong to its tar, a link or a name with ``..`` is noticed before its bytes are used.
"""

from __future__ import annotations

import math
import os
import time
from collections import OrderedDict
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from moe_cl.config import ConfigError, DataConfig
from moe_cl.data import faults
from moe_cl.data.cache import BlockCache
from moe_cl.data.faults import SampleFault
from moe_cl.data.index import Dataset
from moe_cl.data.remote import Patience, RangeReader, patiently, transient
from moe_cl.data.shard import UNSAFE_MEMBER, ZERO_LENGTH, ShardIndex, is_remote

HEADER = 512
OPEN_FILES = 64
GONE_SECONDS = 60.0  # a vanished remote shard is not asked for again so soon
INDEXES = 4096  # shards whose columns are held; 1,000 samples each are 28 kB


class Columns(NamedTuple):
    """What reading needs of a shard's index."""

    offset: np.ndarray
    size: np.ndarray
    label: np.ndarray
    labelled: bool  # whether any sample of the shard has a label
    pixels: np.ndarray
    faults: dict[int, str]


class Reader:
    """Reads samples of a data set; made in the process that uses it."""

    def __init__(self, dataset: Dataset, cfg: DataConfig):
        self.dataset, self.max_pixels = dataset, cfg.max_pixels
        self.patience = Patience(cfg.retry_seconds)
        self._ranges = RangeReader(self.patience)
        self._cache = BlockCache(cfg.cache_dir, cfg.cache_bytes, self._ranges.fetch) if cfg.cache_dir else None
        self._columns: OrderedDict[int, Columns] = OrderedDict()
        self._files: OrderedDict[int, int] = OrderedDict()
        self._sizes: dict[int, int] = {}
        self._gone: dict[int, tuple[float, SampleFault]] = {}
        self._process = os.getpid()

    def columns(self, shard: int) -> Columns:
        """Offsets, sizes, labels of a shard (its index is read at first use). Raises SampleFault, ConfigError."""
        if shard not in self._columns:
            index = self._index(shard)
            pixels = index.width.astype(np.int64) * index.height
            self._columns[shard] = Columns(
                index.offset, index.size, index.label, bool((index.label >= 0).any()), pixels, index.faults
            )
            if len(self._columns) > INDEXES:
                self._columns.popitem(last=False)
        return self._columns[shard]

    def labels(self, sample_ids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Labels (n,) int64, -1 where unknown, and (n,) bool: whether it should be known (others of the shard are)."""
        shards, rows = self._locate(sample_ids)
        labels, expected = np.empty(len(shards), dtype=np.int64), np.empty(len(shards), dtype=bool)
        for shard in np.unique(shards).tolist():
            mine = shards == shard
            try:
                columns = self.columns(shard)
            except SampleFault:  # ``read`` reports it, sample by sample
                labels[mine], expected[mine] = -1, False
                continue
            labels[mine], expected[mine] = columns.label[rows[mine]], columns.labelled
        return labels, expected

    def key(self, sample_id: int) -> str:
        """The sample's name in its tar, for messages."""
        shard, row = self.dataset.locate(sample_id)
        try:
            return self._index(shard).keys[row]
        except SampleFault:
            return f"row {row}"

    def read(self, sample_ids: Sequence[int]) -> list[bytes | SampleFault]:
        """The image bytes of each sample, or its lasting fault in its place; remote ones are fetched together.

        Raises:
            SourceLost: a transient fault did not pass within ``retry_seconds``.
        """
        out: list[bytes | SampleFault] = []
        remote: list[tuple[int, int, int, int]] = []
        shards, rows = self._locate(sample_ids)
        for slot, (shard, row) in enumerate(zip(shards.tolist(), rows.tolist(), strict=True)):
            try:
                start, stop = self._place(shard, row)
                if is_remote(self.dataset.shards[shard].url):
                    remote.append((slot, shard, start, stop))
                    out.append(b"")
                else:
                    out.append(_member(self._local(shard, start, stop)))
            except SampleFault as fault:
                out.append(fault)
        if remote:
            self._remote(remote, out)
        return out

    def close(self) -> None:
        """Close the shards."""
        while self._files and self._process == os.getpid():
            os.close(self._files.popitem()[1])

    def _locate(self, sample_ids: Sequence[int] | np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(shards, rows) of global ids."""
        ids = np.asarray(sample_ids, dtype=np.int64)
        shards = np.searchsorted(self.dataset.starts, ids, side="right") - 1
        return shards, ids - self.dataset.starts[shards]

    def _index(self, shard: int) -> ShardIndex:
        url = self.dataset.shards[shard].url
        try:
            return patiently(lambda: self.dataset.index(shard), url, self.patience)
        except OSError as error:
            raise SampleFault(faults.VANISHED_SHARD, f"index of {url}: {error}") from None
        except ConfigError:
            if not self._exists(url):
                raise SampleFault(faults.VANISHED_SHARD, f"{url} and its index are gone") from None
            raise

    def _exists(self, url: str) -> bool:
        if not is_remote(url):
            return os.path.exists(url)
        try:
            return self._ranges.size(url) >= 0
        except SampleFault:
            return False

    def _place(self, shard: int, row: int) -> tuple[int, int]:
        columns = self.columns(shard)
        if row in columns.faults:
            raise SampleFault(columns.faults[row], "found when the shard was indexed")
        if columns.size[row] == 0:
            raise SampleFault(ZERO_LENGTH, "the member has no bytes")
        if columns.pixels[row] > self.max_pixels:
            raise SampleFault(faults.TOO_MANY_PIXELS, f"{columns.pixels[row]} pixels, data.max_pixels allows "
                              f"{self.max_pixels}")  # fmt: skip
        start = int(columns.offset[row])
        return start - HEADER, start + int(columns.size[row])

    def _local(self, shard: int, start: int, stop: int) -> bytes:
        path = self.dataset.shards[shard].url
        while True:
            try:
                data = os.pread(self._file(shard, path), stop - start, start)
                if len(data) < stop - start:
                    size = os.fstat(self._files[shard]).st_size
                    raise SampleFault(faults.TRUNCATED_TAR, f"{path} has {size} bytes, byte {stop} was asked for")
                self.patience.progress()
                return data
            except OSError as error:
                if shard in self._files:
                    os.close(self._files.pop(shard))
                name = transient(error)
                if name is None:
                    raise SampleFault(faults.VANISHED_SHARD, f"{path}: {error.strerror}") from None
                self.patience.note(name, path, error)
                self.patience.wait()

    def _file(self, shard: int, path: str) -> int:
        if shard in self._files:
            self._files.move_to_end(shard)
        else:
            self._files[shard] = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
            if len(self._files) > OPEN_FILES:
                os.close(self._files.popitem(last=False)[1])
        return self._files[shard]

    def _remote(self, wanted: list[tuple[int, int, int, int]], out: list[Any]) -> None:
        """Fill ``out[slot]`` of every (slot, shard, start, stop)."""
        asked: list[tuple[int, int, int, int]] = []
        for slot, shard, start, stop in wanted:
            since, fault = self._gone.get(shard, (-math.inf, None))
            if time.monotonic() - since < GONE_SECONDS:
                out[slot] = fault
                continue
            try:
                if self._cache is not None and stop > (size := self._size(shard)):
                    url = self.dataset.shards[shard].url
                    raise SampleFault(faults.TRUNCATED_TAR, f"{url} has {size} bytes, byte {stop} was asked for")
                asked.append((slot, shard, start, stop))
            except SampleFault as fault:
                out[slot] = fault
        urls = [self.dataset.shards[shard].url for _, shard, _, _ in asked]
        if self._cache is None:
            answers = self._ranges.fetch([(url, a, b) for url, (_, _, a, b) in zip(urls, asked, strict=True)])
        else:
            ranges = [(url, self._size(s), a, b) for url, (_, s, a, b) in zip(urls, asked, strict=True)]
            answers = self._cache.read(ranges)
        for (slot, shard, _, _), answer in zip(asked, answers, strict=True):
            try:
                out[slot] = _member(answer) if isinstance(answer, bytes) else answer
            except SampleFault as fault:
                out[slot] = fault
            if isinstance(answer, SampleFault) and answer.name == faults.VANISHED_SHARD:
                self._gone[shard] = time.monotonic(), answer

    def _size(self, shard: int) -> int:
        if shard not in self._sizes:
            known = self.dataset.shards[shard]
            self._sizes[shard] = known.bytes or self._ranges.size(known.url)
        return self._sizes[shard]


def _member(data: bytes) -> bytes:
    """The member's bytes after its tar header, which must be that of a plain file of this size. Raises SampleFault."""
    name, kind = data[:100].split(b"\0", 1)[0], data[156:157]
    try:
        size, checksum = (int(data[a:b].strip(b"\0 ") or b"0", 8) for a, b in ((124, 136), (148, 156)))
    except ValueError:
        size = checksum = -1
    if checksum != sum(data[:148]) + 8 * 32 + sum(data[156:HEADER]):
        raise SampleFault(faults.STALE_INDEX, "no tar header where the index says; run `python -m data_prep index`")
    folder = data[345:500].split(b"\0", 1)[0] if data[257:263] == b"ustar\0" else b""
    if kind not in (b"0", b"\0") or name.startswith(b"/") or b".." in (folder + b"/" + name).split(b"/"):
        raise SampleFault(UNSAFE_MEMBER, f"member {name[:80].decode(errors='replace')!r} of type {kind!r}")
    if size != len(data) - HEADER:
        raise SampleFault(faults.STALE_INDEX, f"the member has {size} bytes, the index says {len(data) - HEADER}")
    return data[HEADER:]
