"""A bounded folder of blocks of remote shards, shared by all processes of a host; the least recently used go first."""

from __future__ import annotations

import fcntl
import hashlib
import logging
import os
from collections.abc import Callable, Sequence
from pathlib import Path

from moe_cl.config import ConfigError
from moe_cl.data.faults import SampleFault

log = logging.getLogger("moe_cl.data")

BLOCK = 4 << 20
Fetch = Callable[[Sequence[tuple[str, int, int]]], list[bytes | SampleFault]]


class BlockCache:
    """Reads ranges through blocks of ``BLOCK`` bytes kept as files ``<hash of url and size>/<number>``.

    A block file appears by rename, whole or not at all. The sum of sizes is kept in one file under a lock; when it
    passes ``limit`` bytes, the oldest blocks are removed down to nine tenths.
    """

    def __init__(self, folder: str | Path, limit: int, fetch: Fetch):
        self.folder, self.limit, self._fetch = Path(folder), limit, fetch
        if limit < 4 * BLOCK:
            raise ConfigError(f"data.cache_bytes: {limit} holds less than four blocks of {BLOCK} bytes; raise it")
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ConfigError(f"data.cache_dir: {folder} cannot be made ({error.strerror})") from None

    def read(self, ranges: Sequence[tuple[str, int, int, int]]) -> list[bytes | SampleFault]:
        """The bytes [start, stop) of each (url, size of the file, start, stop), or the fault in its place."""
        wanted: dict[tuple[str, int, int], bytes | SampleFault | None] = {}
        for url, size, start, stop in ranges:
            for number in range(start // BLOCK, (stop - 1) // BLOCK + 1):
                wanted[url, size, number] = None
        missing = [key for key in wanted if not self._path(key).exists()]
        fetched = self._fetch([(url, n * BLOCK, min((n + 1) * BLOCK, size)) for url, size, n in missing])
        for key, block in zip(missing, fetched, strict=True):
            wanted[key] = block
            if isinstance(block, bytes):
                self._keep(key, block)
        return [self._cut(wanted, *r) for r in ranges]

    def _cut(self, held: dict, url: str, size: int, start: int, stop: int) -> bytes | SampleFault:
        parts = []
        for number in range(start // BLOCK, (stop - 1) // BLOCK + 1):
            low, high = max(start - number * BLOCK, 0), min(stop - number * BLOCK, BLOCK)
            block = held[url, size, number]
            part = block[low:high] if isinstance(block, bytes) else self._slice((url, size, number), low, high)
            if block is not None and not isinstance(block, bytes):
                return block
            if part is None:  # another process evicted it in between
                (block,) = self._fetch([(url, number * BLOCK, min((number + 1) * BLOCK, size))])
                if not isinstance(block, bytes):
                    return block
                part = block[low:high]
            parts.append(part)
        return b"".join(parts)

    def _path(self, key: tuple[str, int, int]) -> Path:
        url, size, number = key
        return self.folder / hashlib.sha256(f"{url}\n{size}".encode()).hexdigest()[:24] / f"{number:06d}"

    def _slice(self, key: tuple[str, int, int], low: int, high: int) -> bytes | None:
        path = self._path(key)
        try:
            with open(path, "rb", buffering=0) as f:
                part = os.pread(f.fileno(), high - low, low)
            os.utime(path)
        except FileNotFoundError:
            return None
        return part if len(part) == high - low else None

    def _keep(self, key: tuple[str, int, int], block: bytes) -> None:
        path = self._path(key)
        temporary = path.with_name(f"{path.name}.{os.getpid()}.part")
        try:
            path.parent.mkdir(exist_ok=True)
            self._account(len(block))
            temporary.write_bytes(block)
            os.replace(temporary, path)
        except OSError as error:  # a full or broken disk makes the run slower, it does not stop it
            temporary.unlink(missing_ok=True)
            log.warning("data.cache_dir: %s cannot be written (%s); this block is not kept", path, error.strerror)

    def _account(self, more: int) -> None:
        """Add to the sum on disk, and make room first if it would pass the limit."""
        with open(self.folder / "total", "a+") as f:
            fcntl.flock(f, fcntl.LOCK_EX)
            f.seek(0)
            text = f.read()
            total = int(text) if text.isdigit() else self._evict(float("inf"))
            if total + more > self.limit:
                total = self._evict(0.9 * self.limit - more)
            f.seek(0)
            f.truncate()
            f.write(str(total + more))

    def _evict(self, bound: float) -> int:
        """Remove the least recently used blocks until their sum is at most ``bound``; returns the sum."""
        blocks = []
        for path in self.folder.glob("*/*"):
            try:
                stat = path.stat()
            except FileNotFoundError:
                continue
            blocks.append((stat.st_mtime_ns, stat.st_size, path))
        total = sum(size for _, size, _ in blocks)
        for _, size, path in sorted(blocks):
            if total <= bound:
                break
            path.unlink(missing_ok=True)
            total -= size
        return total
