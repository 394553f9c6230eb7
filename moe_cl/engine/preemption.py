"""A run that is asked to stop, and an out dir that belongs to one run at a time."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import signal
import socket
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import FrameType
from typing import Any

from moe_cl.config import ConfigError

SIGNALS = (signal.SIGTERM, signal.SIGUSR1)
MARK = "requeue"


class Preemption:
    """SIGTERM or SIGUSR1 on this rank, remembered until the step is over.

    The driver sends ``requested()`` round with the step's one all-reduce, so all ranks learn of it in the same step,
    whichever rank was signalled (Slurm signals one, a launcher all). A second signal is the same wish, not another.
    """

    def __init__(self) -> None:
        self.name = ""
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Preemption:
        for number in SIGNALS:
            self._before[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *exc: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.name = signal.Signals(number).name

    def requested(self) -> bool:
        """True once this rank was signalled."""
        return bool(self.name)


def mark_requeue(out: str | Path, step: int, reason: str) -> Path:
    """Leave ``OUT/requeue``: this run stopped on request and wants to go on (``--resume``) from step ``step``.

    The same is written to the file that MOE_CL_REQUEUE_FILE names: who started the run need not know its out dir.
    Where that cannot be written the run stopped well all the same, and a line says so. Raises OSError.
    """
    path = Path(out) / MARK
    hidden = path.with_name(f".{MARK}.tmp")
    line = json.dumps({"step": step, "reason": reason, "time": time.time()}) + "\n"
    hidden.write_text(line)
    os.replace(hidden, path)
    if told := os.environ.get("MOE_CL_REQUEUE_FILE"):
        try:
            Path(told).write_text(line)
        except OSError as error:
            print(f"moe_cl: {told} cannot be written ({error.strerror}): start the run again yourself", file=sys.stderr)
    return path


def clear_requeue(out: str | Path) -> None:
    """The run goes on: the mark is used up. Raises ConfigError if it cannot be removed."""
    with written(out):
        (Path(out) / MARK).unlink(missing_ok=True)


@contextlib.contextmanager
def written(out: str | Path) -> Iterator[None]:
    """A start writes into its out dir: what the disk refuses is a ConfigError, one line."""
    try:
        yield
    except OSError as error:
        why = error.strerror or error
        raise ConfigError(f"out dir {out} cannot be written ({why}): make room, or take another --out") from None


class OutLock:
    """Exclusive use of a run directory by one run (held by rank 0; ends with its process, also by kill -9).

    A POSIX record lock: forked workers do not inherit it, and network file systems know it.
    """

    def __init__(self, out: str | Path):
        """Raises ConfigError if another run holds it, or the directory cannot be written."""
        self.path = Path(out) / ".lock"
        with written(out):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            # Without a buffer: what a full disk refuses is refused here, and not once more when the file is closed.
            self._file = open(self.path, "a+b", buffering=0)
        try:
            fcntl.lockf(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            self._file.seek(0)
            owner = self._file.read().decode(errors="replace").strip() or "another process"
            self._file.close()
            raise ConfigError(f"out dir {out} is in use by {owner}: stop that run or take another --out") from None
        line = f"pid {os.getpid()} on {socket.gethostname()} since {time.strftime('%Y-%m-%d %H:%M:%S')}\n"
        with written(out), contextlib.ExitStack() as undo:
            undo.callback(self._file.close)
            self._file.truncate(0)
            self._file.write(line.encode())
            undo.pop_all()

    def close(self) -> None:
        """Give the directory back."""
        self._file.close()
