"""Byte ranges of remote files through fsspec: many at once, in pieces, retried with back-off, continued after a break.

A range is fetched in pieces of at most ``PIECE`` bytes, several at once; after a dropped connection or a short answer
the next request starts at the first byte that is missing. How long a disturbed source is waited for is the caller's
patience.
"""

from __future__ import annotations

import asyncio
import errno
import logging
import os
import time
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import fsspec

from moe_cl.config import ConfigError
from moe_cl.data import faults, partial
from moe_cl.data.faults import SampleFault, SourceLost

log = logging.getLogger("moe_cl.data")

T = TypeVar("T")
PIECE = 1 << 20
LONGEST_PAUSE = 10.0
CONNECT_SECONDS, SILENCE_SECONDS = 15.0, 30.0  # a server that stops in mid-answer must not hold a worker for ever
_NETWORK = {errno.ECONNRESET, errno.ECONNREFUSED, errno.ECONNABORTED, errno.EPIPE, errno.ENETUNREACH,
            errno.ENETRESET, errno.EHOSTUNREACH, errno.EHOSTDOWN, errno.ENETDOWN}  # fmt: skip
_DISK = {errno.EIO, errno.ESTALE, errno.EAGAIN, errno.EINTR, errno.EREMOTEIO}


def transient(error: BaseException) -> str | None:
    """The name of a fault that may pass, None if it will not. Knows aiohttp, botocore and plain OSErrors."""
    status = getattr(error, "status", None)  # aiohttp.ClientResponseError
    if isinstance(status, int) and status:
        if status in (425, 429):
            return faults.TOO_MANY_REQUESTS
        return faults.SERVER_ERROR if status >= 500 else faults.TIMEOUT if status == 408 else None
    kind = {c.__name__ for c in type(error).__mro__}
    if isinstance(error, (TimeoutError, asyncio.TimeoutError)) or kind & {"ReadTimeoutError", "ConnectTimeoutError"}:
        return faults.TIMEOUT
    if kind & {"ClientPayloadError", "IncompleteReadError", "IncompleteRead", "ResponseStreamingError"}:
        return faults.SHORT_READ
    if kind & {"ClientConnectionError", "HTTPClientError", "ConnectionError"}:
        return faults.CONNECTION_RESET
    if isinstance(error, (FileNotFoundError, PermissionError)) or not isinstance(error, OSError):
        return None
    if error.errno == errno.EBUSY:
        return faults.TOO_MANY_REQUESTS  # s3fs's word for SlowDown and ServiceUnavailable
    if error.errno == errno.EREMOTEIO:
        return faults.SERVER_ERROR  # s3fs's word for InternalError
    if error.errno == errno.ETIMEDOUT:
        return faults.TIMEOUT
    return faults.CONNECTION_RESET if error.errno in _NETWORK else faults.IO_ERROR if error.errno in _DISK else None


def refused(error: BaseException) -> str:
    """What a server said that will not give a file (401 Unauthorized, 403 Forbidden ...); "" for any other fault."""
    status = getattr(error, "status", None)
    if isinstance(status, int) and 400 <= status < 500 and transient(error) is None:
        return f"{status} {getattr(error, 'message', '')}".strip()
    return " ".join(str(error).split()) or "no permission" if isinstance(error, PermissionError) else ""


class Patience:
    """Back-off between tries and the end of waiting: ``seconds`` without progress. Collects the journal's events."""

    def __init__(self, seconds: float):
        self.seconds = seconds
        self.events: dict[tuple[str, str], dict[str, Any]] = {}
        self._since: float | None = None
        self._tries, self._asked = 0, 0.0
        self._last = ("", "", "")

    def progress(self) -> None:
        """Something came through."""
        self._since, self._tries = None, 0

    def note(self, name: str, url: str, error: BaseException | str) -> None:
        """Count a transient fault of ``url``."""
        self._last = name, url, " ".join(str(error).split()) or type(error).__name__
        event = self.events.setdefault(
            (name, url), {"name": "transient_fault", "fault": name, "url": url, "detail": self._last[2], "count": 0}
        )
        event["count"] += 1
        self._asked = max(self._asked, _retry_after(error))

    def wait(self) -> None:
        """Pause before the next try of what was noted. Raises SourceLost when time is up."""
        now = time.monotonic()
        self._since = now if self._since is None else self._since
        name, url, detail = self._last
        left = self.seconds - (now - self._since)
        if left <= 0:
            why = f"{name}: {detail}; data.retry_seconds says how long to try"
            raise SourceLost(f"{url} could not be read for {self.seconds:g} s ({why})")
        if self._tries in (0, 3):
            log.warning("%s: %s (%s); trying again for up to %.0f s", url, name, detail, left)
        # ranks and workers that lost the same server come back at different moments
        spread = 0.75 + 0.5 * (os.getpid() * 0.6180339887 % 1.0)
        wanted = max(min(0.2 * 2**self._tries, LONGEST_PAUSE) * spread, self._asked)
        self._tries, self._asked = self._tries + 1, 0.0
        time.sleep(max(0.0, min(wanted, left)))

    def drain(self) -> list[dict[str, Any]]:
        """The events since the last call."""
        out, self.events = list(self.events.values()), {}
        return out


def _retry_after(error: BaseException | str) -> float:
    """Seconds that the server asked for, at most 60."""
    value = (getattr(error, "headers", None) or {}).get("Retry-After", "")
    return min(float(value), 60.0) if value.isdigit() else 0.0


def patiently(read: Callable[[], T], what: str, patience: Patience) -> T:
    """``read()``, again after transient faults. Raises SourceLost, and what is not transient as it is."""
    while True:
        try:
            found = read()
            patience.progress()
            return found
        except Exception as error:
            name = transient(error)
            if name is None:
                raise
            patience.note(name, what, error)
            patience.wait()


class RangeReader:
    """Reads byte ranges of URLs. One in each process: made after the fork, never handed over."""

    def __init__(self, patience: Patience):
        self.patience = patience
        self._systems: dict[str, fsspec.AbstractFileSystem] = {}

    def fetch(self, ranges: Sequence[tuple[str, int, int]]) -> list[bytes | SampleFault]:
        """The bytes [start, stop) of each (url, start, stop), or the lasting fault in its place.

        Raises:
            SourceLost: a transient fault did not pass in time.
            ConfigError: a server that ignores range requests.
        """
        pieces = [
            (i, url, at, min(at + PIECE, stop))
            for i, (url, start, stop) in enumerate(ranges)
            for at in range(start, stop, PIECE)
        ]
        found: list[list[bytes]] = [[] for _ in ranges]
        broken: dict[int, SampleFault] = {}
        for group in _by_scheme(pieces).values():
            self._group(group, found, broken)
        return [broken.get(i) or b"".join(parts) for i, parts in enumerate(found)]

    def size(self, url: str) -> int:
        """Bytes of a remote file. Raises SampleFault (vanished) or SourceLost."""
        try:
            return int(patiently(lambda: self._system(url).info(url)["size"], url, self.patience))
        except Exception as error:
            raise self._lasting(url, error) from None

    def _group(self, pieces: list[tuple[int, str, int, int]], found: list[list[bytes]], broken: dict) -> None:
        got: dict[int, bytes] = {}
        waiting = list(range(len(pieces)))
        while waiting:
            starts = [pieces[n][2] + len(got.get(n, b"")) for n in waiting]
            urls, stops = [pieces[n][1] for n in waiting], [pieces[n][3] for n in waiting]
            answers = partial.read(self._system(urls[0]), urls, starts, stops)
            again = []
            for n, start, (data, error) in zip(waiting, starts, answers, strict=True):
                i, url, _, stop = pieces[n]
                if i in broken:
                    continue
                try:
                    name = self._take(data, error, url, start, stop)
                except SampleFault as fault:
                    broken[i] = fault
                    continue
                if data:
                    got[n] = got.get(n, b"") + data
                    self.patience.progress()
                if name:
                    again.append(n)
                    self.patience.note(name, url, error or "fewer bytes than asked for")
            if again:
                self.patience.wait()
            waiting = again
        for n, (i, *_) in enumerate(pieces):
            found[i].append(got.get(n, b""))

    def _take(self, data: bytes, error: BaseException | None, url: str, start: int, stop: int) -> str | None:
        """None if the answer is complete, else the transient fault's name. Raises SampleFault, ConfigError."""
        if len(data) > stop - start:
            raise ConfigError(f"{url}: the server ignores range requests; use one that knows them, or local copies")
        if len(data) == stop - start:
            return None
        if error is not None:
            if self._past_end(error) and stop > (size := self.size(url)):
                raise SampleFault(faults.TRUNCATED_TAR, f"{url} has {size} bytes, byte {stop} was asked for")
            name = transient(error)
            if name is None:
                raise self._lasting(url, error)
            return name
        if start + len(data) == (size := self.size(url)):
            raise SampleFault(faults.TRUNCATED_TAR, f"{url} has {size} bytes, byte {stop} was asked for")
        return faults.SHORT_READ

    @staticmethod
    def _past_end(error: BaseException) -> bool:
        return getattr(error, "status", None) == 416 or (isinstance(error, OSError) and error.errno == errno.EINVAL)

    @staticmethod
    def _lasting(url: str, error: BaseException) -> BaseException:
        """What the source refuses for good becomes a fault of the sample; anything else is a bug and stays."""
        if isinstance(error, OSError) or getattr(error, "status", None):
            text = " ".join(str(error).split())
            return SampleFault(faults.VANISHED_SHARD, f"{url}: {type(error).__name__} {text}")
        return error

    def _system(self, url: str) -> fsspec.AbstractFileSystem:
        scheme = url.split("://", 1)[0]
        if scheme not in self._systems:
            self._systems[scheme] = fsspec.core.url_to_fs(url, **_options(scheme))[0]
        return self._systems[scheme]


def _options(scheme: str) -> dict[str, Any]:
    """fsspec's options: our time-outs; and the retries are ours alone."""
    if scheme in ("http", "https"):
        import aiohttp

        timeout = aiohttp.ClientTimeout(total=None, sock_connect=CONNECT_SECONDS, sock_read=SILENCE_SECONDS)
        return {"client_kwargs": {"timeout": timeout, "trust_env": True}}
    if scheme in ("s3", "s3a"):
        seconds = {"connect_timeout": CONNECT_SECONDS, "read_timeout": SILENCE_SECONDS}
        return {"config_kwargs": seconds | {"retries": {"max_attempts": 1}}}
    return {}


def _by_scheme(pieces: list[tuple[int, str, int, int]]) -> dict[str, list[tuple[int, str, int, int]]]:
    out: dict[str, list[tuple[int, str, int, int]]] = {}
    for piece in pieces:
        out.setdefault(piece[1].split("://", 1)[0], []).append(piece)
    return out
