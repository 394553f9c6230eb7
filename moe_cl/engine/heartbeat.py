"""Each rank's last sign of life in the out dir, and the survivors' line when one stops answering.

A heartbeat is a file of one record, written over: microseconds in the page cache, cheap enough for every collective,
and it outlives its process. A network file system passes it on within half a minute, the time-out is far longer; who
meets an error passes its own on at once (``Heartbeat.sync``), and whoever reads opens the file anew.
"""

from __future__ import annotations

import contextlib
import os
import socket
import struct
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moe_cl.comm import Comm
from moe_cl.engine.preemption import written

SETTLE = 1.0  # seconds that ranks which meet an error together have to pass their last signs on
_CLOSED = -1  # no file has this number
_RECORD = struct.Struct("<qqd48s32s")  # step, number of the sign in this run, unix time, what, host


class RankLost(RuntimeError):
    """A collective did not come to its end; the text names the rank that fell behind, and where."""


@dataclass
class Sign:
    """What a rank was last about to do."""

    rank: int
    step: int
    count: int
    when: float
    what: str
    host: str


class Heartbeat:
    """``beat("all_reduce")`` before each collective; ``step`` is set by the loop.

    The first sign is given before the ranks meet, when only rank 0 knows whether another run has the out dir: it stands
    in a file of its own, ``start-RANK``, and ``rank-RANK`` is this run's from the second sign on.

    Args:
        out: run directory.
        rank: this rank.

    Raises ConfigError if the directory does not take the file.
    """

    def __init__(self, out: str | Path, rank: int):
        self.folder, self.rank, self.step, self.count = Path(out) / "heartbeats", rank, 0, 0
        self._host, self._file = socket.gethostname().encode()[:32], _CLOSED
        with written(out):
            self.folder.mkdir(parents=True, exist_ok=True)
            self._open(_path(self.folder, rank, "start"))
        self("start")

    def _open(self, path: Path) -> None:
        """A new file in the place of ``path``: another process may still write to the old one."""
        new = path.with_name(f".{path.name}.{socket.gethostname()}.{os.getpid()}")
        with contextlib.ExitStack() as undo:
            undo.callback(new.unlink, missing_ok=True)
            new.write_bytes(bytes(_RECORD.size))
            file = os.open(new, os.O_WRONLY)
            undo.callback(lambda: os.close(file))
            os.replace(new, path)
            undo.pop_all()
        self._shut()
        self._file = file

    def _shut(self) -> None:
        if self._file != _CLOSED:
            os.close(self._file)
        self._file = _CLOSED

    def __call__(self, what: str) -> None:
        """Note ``what`` is about to happen."""
        self.count += 1
        if self.count == 2:
            self._met()
        self.last = time.monotonic()
        record = _RECORD.pack(self.step, self.count, time.time(), what.encode()[:48], self._host)
        with contextlib.suppress(OSError):  # a sign that cannot be written ends no run
            os.pwrite(self._file, record, 0)

    def sync(self) -> None:
        """Have the last sign seen by other hosts now."""
        if self._file != _CLOSED:
            with contextlib.suppress(OSError):
                os.fsync(self._file)

    def _met(self) -> None:
        try:
            self._open(_path(self.folder, self.rank))
            _path(self.folder, self.rank, "start").unlink(missing_ok=True)
        except OSError as error:  # the first file goes on, and is read too
            print(f"warning: {self.folder}: {error.strerror}; the run goes on", file=sys.stderr, flush=True)

    def attach(self, comm: Comm, engine: Any = None) -> None:
        """Beat before every collective of ``comm`` and before the engine's own (gradient reduction, weight gather)."""
        comm.watch = self
        for name, what in (("backward", "gradient reduction (backward)"), ("step", "optimizer step")):
            if engine is not None:
                setattr(engine, name, _beating(getattr(engine, name), self, what))

    def close(self) -> None:
        """This rank is done."""
        if self.count > 1:
            self("done")
        else:  # the ranks have not met: this one did not come
            with contextlib.suppress(OSError):  # it lies there until the next start
                _path(self.folder, self.rank, "start").unlink(missing_ok=True)
        self._shut()


def _path(folder: Path, rank: int, kind: str = "rank") -> Path:
    return folder / f"{kind}-{rank:05d}"


def _beating(call: Callable[..., Any], heartbeat: Heartbeat, what: str) -> Callable[..., Any]:
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        heartbeat(what)
        return call(*args, **kwargs)

    return wrapped


def read(out: str | Path, world: int) -> list[Sign]:
    """The last sign of every rank of ``world`` that left one."""
    signs = []
    for rank in range(world):
        found = []
        for kind in ("rank", "start"):
            with contextlib.suppress(OSError, struct.error):
                path = _path(Path(out) / "heartbeats", rank, kind)
                step, count, when, what, host = _RECORD.unpack(path.read_bytes())
                found.append(Sign(rank, step, count, when, *(word.rstrip(b"\0").decode() for word in (what, host))))
        if found:  # the later one: a start that waits for the others, or a run that went on
            signs.append(max(found, key=lambda sign: sign.when))
    return signs


def behind(signs: list[Sign]) -> Sign:
    """The rank that holds the others up: fewest signs, the oldest of equals (all ranks beat at the same places)."""
    return min(signs, key=lambda sign: (sign.step, sign.count, sign.when))


@contextlib.contextmanager
def survivors(heartbeat: Heartbeat, world: int) -> Iterator[None]:
    """Turns a collective's time-out or lost connection into RankLost, which says who fell behind and where.

    Errors of this rank alone pass through as they are.
    """
    try:
        yield
    except RuntimeError as error:
        if world == 1 or not _of_a_collective(error):
            raise
        heartbeat.sync()
        time.sleep(SETTLE)
        raise RankLost(_who(read(heartbeat.folder.parent, world), heartbeat.rank, world)) from error


class Watch:
    """Says the survivor's line shortly before the time-out, where that ends the process: NCCL's watchdog aborts it, and
    no exception comes to ``survivors``. Once for each silence; a rank that others wait for says nothing of itself.

    Args:
        heartbeat: this rank's. world: ranks. timeout: of all collectives, seconds.
    """

    def __init__(self, heartbeat: Heartbeat, world: int, timeout: float):
        self.heartbeat, self.world, self.timeout = heartbeat, world, timeout
        self.margin = min(10.0, timeout / 5)  # seconds before the time-out
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._run, name="heartbeats", daemon=True)
        self._thread.start()

    def _run(self) -> None:
        said = 0
        while not self._end.wait(self.margin / 4):
            count = self.heartbeat.count
            # The first sign is given before the ranks meet, which ends with an exception on every backend.
            if count in (1, said) or time.monotonic() - self.heartbeat.last < self.timeout - self.margin:
                continue
            said = count
            if line := self._line():
                rest = f"unless it answers within {self.margin:.0f} s, engine.collective_timeout ends this rank"
                print(f"moe_cl: {line}; {rest}", file=sys.stderr, flush=True)

    def _line(self) -> str:
        me, signs = self.heartbeat.rank, read(self.heartbeat.folder.parent, self.world)
        others = [sign for sign in signs if sign.rank != me]
        if len(others) in (0, len(signs)):  # the out dir cannot be read just now
            return ""
        late = behind(others)
        waits_for_me = (late.step, late.count) > (self.heartbeat.step, self.heartbeat.count)
        return "" if waits_for_me else _who(signs, me, self.world)

    def close(self) -> None:
        """End the thread."""
        self._end.set()
        self._thread.join()

    def __enter__(self) -> Watch:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


def _who(signs: list[Sign], me: int, world: int) -> str:
    """The survivor's line: which rank, on which host, did not come, or stopped answering where."""
    mine = next(sign for sign in signs if sign.rank == me)
    if mine.count == 1:
        # The ranks have not met yet: whoever came to the meeting has given this one sign too, and what else lies in
        # the folder is of an earlier run.
        came = {sign.rank for sign in signs if sign.count == 1}
        missing = [str(rank) for rank in range(world) if rank not in came]
        if missing:
            return (
                f"rank {', '.join(missing)} of {world} did not come to the start; rank {me} waited on {mine.host}. "
                "Look there for its own message, and ask `python -m moe_cl doctor --hostfile` about the hosts"
            )
    late = behind([sign for sign in signs if sign.rank != me] or signs)
    return (
        f"rank {late.rank} stopped answering: its last sign was {late.what!r} in step {late.step}, "
        f"{time.time() - late.when:.0f} s ago, on host {late.host}; "
        f"rank {me} on {mine.host} waited in {mine.what!r} of step {mine.step}. Start again with --resume"
    )


def _of_a_collective(error: RuntimeError) -> bool:
    import torch.distributed as dist

    if isinstance(error, (dist.DistBackendError, dist.DistNetworkError)):
        return True
    text = str(error).lower()
    return any(part in text for part in ("timed out", "connection closed", "connection reset", "gloo", "broken pipe"))
