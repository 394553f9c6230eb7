"""A run that is asked to stop, and an out dir that belongs to one run at a time."""

from __future__ import annotations

import fcntl
import json
import os
import signal
import socket
import time
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
    """Leave ``OUT/requeue``: this run stopped on request after ``step`` steps and wants to go on (``--resume``)."""
    path = Path(out) / MARK
    hidden = path.with_name(f".{MARK}.tmp")
    hidden.write_text(json.dumps({"step": step, "reason": reason, "time": time.time()}) + "\n")
    os.replace(hidden, path)
    return path


def clear_requeue(out: str | Path) -> None:
    """The run goes on: the mark is used up."""
    (Path(out) / MARK).unlink(missing_ok=True)


class OutLock:
    """Exclusive use of a run directory by one run (held by rank 0; ends with its process, also by kill -9).

    A POSIX record lock: forked workers do not inherit it, and network file systems know it.
    """

    def __init__(self, out: str | Path):
        """Raises ConfigError if another run holds it, or the directory cannot be written."""
        self.path = Path(out) / ".lock"
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._file = open(self.path, "a+")
        except OSError as error:
            raise ConfigError(f"out dir {out} cannot be written ({error.strerror}): take another --out") from None
        try:
            fcntl.lockf(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            self._file.seek(0)
            owner = self._file.read().strip() or "another process"
            self._file.close()
            raise ConfigError(f"out dir {out} is in use by {owner}: stop that run or take another --out") from None
        self._file.truncate(0)
        self._file.write(f"pid {os.getpid()} on {socket.gethostname()} since {time.strftime('%Y-%m-%d %H:%M:%S')}\n")
        self._file.flush()

    def close(self) -> None:
        """Give the directory back."""
        self._file.close()
