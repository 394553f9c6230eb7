"""What surrounds the loop of every rank: the out dir's lock, signals, heartbeat, and what is said at a bad end."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from torch import nn

from moe_cl.comm import Comm
from moe_cl.engine.checkpoint import store
from moe_cl.engine.health import NonFiniteLoss, explain
from moe_cl.engine.heartbeat import Heartbeat, Watch, survivors
from moe_cl.engine.preemption import OutLock, Preemption, clear_requeue, mark_requeue

_CPU = torch.device("cpu")


class Guard:
    """Context manager around a run; enter it before any rank meets another.

    ``guard.requested()`` goes into the step's all-reduce (``Parts.stop``); ``guard.at(step, batches)`` at the start of
    each step. Leaving it with a NonFiniteLoss writes what explains it; with a broken collective, RankLost is raised.

    Raises ConfigError on entry if another run has the out dir.
    """

    def __init__(self, out: str | Path, rank: int, world: int):
        self.out, self.rank, self.world = Path(out), rank, world
        self.signals, self._stack = Preemption(), contextlib.ExitStack()
        self.requested = self.signals.requested
        self._trained: tuple[nn.Module, Any, Comm] | None = None
        self._now: tuple[int, Sequence[Any]] = (0, ())

    def __enter__(self) -> Guard:
        with contextlib.ExitStack() as stack:
            if self.rank == 0:
                stack.callback(OutLock(self.out).close)
                clear_requeue(self.out)
            stack.enter_context(self.signals)
            self.heartbeat = Heartbeat(self.out, self.rank)
            stack.callback(self.heartbeat.close)
            stack.enter_context(survivors(self.heartbeat, self.world))
            self._stack = stack.pop_all()
        return self

    def watch(self, comm: Comm, engine: Any, student: nn.Module, timeout: float = 600.0) -> None:
        """Beat before every collective; ``student`` is looked at if a step is not finite. ``timeout``: of collectives,
        seconds."""
        self.heartbeat.attach(comm, engine)
        self.heartbeat("start of the run")  # the ranks have met: from here on the records are this run's
        if comm.world > 1 and getattr(comm, "device", _CPU).type != _CPU.type:  # gloo raises, and is heard in time
            self._stack.enter_context(Watch(self.heartbeat, comm.world, timeout))
        for module in student.modules():  # expert groups have a comm of their own
            if isinstance(own := getattr(module, "comm", None), Comm):
                own.watch = self.heartbeat
        self._trained = student, getattr(engine, "optimizer", None), comm

    def at(self, step: int, batches: Sequence[Any]) -> None:
        """Step ``step`` begins with these micro-batches."""
        self._now, self.heartbeat.step = (step, batches), step
        self.heartbeat("begin of the step")

    def stopped(self, step: int, last: Path | None, began: int = 0) -> int:
        """All ranks stop after ``step`` steps on request; returns this rank's exit code.

        Rank 0 leaves the requeue mark. If the save failed, an older checkpoint of this start, which ``began`` after
        that many steps, is as good to go on from. Without any (another start would make the same steps for nothing, and
        so would the next), or if the mark cannot be written either, the code is 1: nobody must take the run for done.
        """
        if self.rank != 0:
            return 0
        kept = self._kept(last)
        why = f"nothing could be saved since its start at step {began}" if began else "nothing could be saved"
        if last is not None and store.step_of(last) > began:
            try:
                mark_requeue(self.out, store.step_of(last), self.signals.name or "another rank was signalled")
            except OSError as error:
                why = f"no requeue mark could be left ({error.strerror})"
            else:
                if store.step_of(last) != step:
                    print(f"warning: --resume goes on from {kept}, not {step}", file=sys.stderr, flush=True)
                return 0
        print(
            f"moe_cl: stopped on request after step {step}, but {why}: {self.out} has {kept}; make room there, then "
            "start again with --resume",
            file=sys.stderr,
            flush=True,
        )
        return 1

    def unsaved(self, step: int, last: Path | None) -> str:
        """Why a run whose ``step`` steps are done is not: its last save failed (only rank 0 says so); or nothing.
        ``last``: ``Checkpointer.last``, there as here."""
        if self.rank != 0 or (last is not None and store.step_of(last) >= step):
            return ""
        return (
            f"all {step} steps are done, but not saved: {self.out} has {self._kept(last)}; make room there, then "
            "start again with --resume"
        )

    def _kept(self, last: Path | None) -> str:
        return "no checkpoint" if last is None else f"the checkpoint of step {store.step_of(last)}"

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> bool | None:
        if isinstance(error, NonFiniteLoss) and self._trained is not None:
            explain(self.out, self.rank, self._now[0], error, self._now[1], *self._trained)
        return self._stack.__exit__(kind, error, trace)
