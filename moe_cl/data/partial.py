"""Byte ranges as far as they came: what a connection brought before it broke is kept, so the next request starts there.

fsspec's own ``cat_ranges`` gives all of a range or nothing; over HTTP and S3 the answer is read as it comes instead.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence

import fsspec
from fsspec.asyn import sync

AT_ONCE = 64  # requests under way from one process
CHUNK = 1 << 16

Answer = tuple[bytes, BaseException | None]  # what came, and what ended it (None: the answer's own end)


def read(
    fs: fsspec.AbstractFileSystem, urls: Sequence[str], starts: Sequence[int], stops: Sequence[int]
) -> list[Answer]:
    """The bytes [start, stop) of each URL, as many as came; more than asked for if the server ignores ranges."""
    protocols = {fs.protocol} if isinstance(fs.protocol, str) else set(fs.protocol)
    one = _http if protocols & {"http", "https"} else _s3 if protocols & {"s3", "s3a"} else None
    if one is None:
        answers = fs.cat_ranges(list(urls), list(starts), list(stops), on_error="return")
        return [(a, None) if isinstance(a, bytes) else (b"", a) for a in answers]
    return sync(fs.loop, _all, one, fs, list(zip(urls, starts, stops, strict=True)))


async def _all(
    one: Callable[..., Awaitable[None]], fs: fsspec.AbstractFileSystem, ranges: list[tuple[str, int, int]]
) -> list[Answer]:
    free = asyncio.Semaphore(AT_ONCE)

    async def run(url: str, start: int, stop: int) -> Answer:
        came = bytearray()
        async with free:
            try:
                await one(fs, url, start, stop, came)
            except Exception as error:  # judged by the caller, who knows what may pass
                return bytes(came), error
        return bytes(came), None

    return await asyncio.gather(*(run(*r) for r in ranges))


async def _http(fs: fsspec.AbstractFileSystem, url: str, start: int, stop: int, came: bytearray) -> None:
    session = await fs.set_session()
    given = dict(fs.kwargs)
    headers = {**given.pop("headers", {}), "Range": f"bytes={start}-{stop - 1}"}
    async with session.get(fs.encode_url(url), headers=headers, **given) as answer:
        fs._raise_not_found_for_status(answer, url)
        async for piece in answer.content.iter_any():
            came += piece
            if len(came) > stop - start:
                return


async def _s3(fs: fsspec.AbstractFileSystem, url: str, start: int, stop: int, came: bytearray) -> None:
    bucket, key, version = fs.split_path(url)
    more = {"VersionId": version} if version else {}
    answer = await fs._call_s3("get_object", Bucket=bucket, Key=key, Range=f"bytes={start}-{stop - 1}", **more)
    body = answer["Body"]
    try:
        while len(came) <= stop - start and (piece := await body.read(CHUNK)):
            came += piece
    finally:
        body.close()
