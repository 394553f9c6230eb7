"""One pool of gloo ranks for the whole pytest run: ``pool.run(world, fn, *args)`` calls ``fn(comm, *args)`` on each.

A rank costs a Python start with torch; started once and re-used for every test. The default process group has exactly
``world`` ranks (DeepSpeed takes all of it): it is torn down and made anew when a test wants another number.
Functions are sent by name, so they live at module level of a test file. Results come back in rank order.
"""

from __future__ import annotations

import os
import queue
import socket
import sys
import threading
import traceback
from collections.abc import Callable
from datetime import timedelta
from multiprocessing import parent_process
from typing import Any

import torch.multiprocessing as mp


def free_port() -> int:
    """A port that nothing listens on."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def _join(rank: int, world: int, port: int) -> None:
    """Leave the present default group, DeepSpeed's derived ones included, and join one of ``world`` ranks."""
    import torch.distributed as dist

    os.environ.update(
        RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world), LOCAL_WORLD_SIZE=str(world),
        MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port),
    )  # fmt: skip
    if dist.is_initialized():
        if "deepspeed.comm.comm" in sys.modules and sys.modules["deepspeed.comm.comm"].cdb is not None:
            sys.modules["deepspeed.comm.comm"].destroy_process_group()
        else:
            dist.destroy_process_group()
    dist.init_process_group("gloo", rank=rank, world_size=world, timeout=timedelta(seconds=120))


def _end_with_parent() -> None:
    """A rank waits for its next task for ever: one whose pytest was killed (no clean-up runs then) ends itself."""

    def watch() -> None:
        parent_process().join()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def _serve(rank: int, tasks: Any, results: Any) -> None:
    _end_with_parent()
    os.environ.update(DS_ACCELERATOR="cpu", OMP_NUM_THREADS="1")
    import torch

    from moe_cl.comm import DistComm

    torch.set_num_threads(1)
    current = None
    while (task := tasks.get()) is not None:
        number, group, fn, args = task
        try:
            if group != current:
                _join(rank, *group)
                current = group
            # Precision is a global of DeepSpeed's: one test's bf16 must not reach the next test's fp32 engine.
            if "deepspeed.runtime.torch_autocast" in sys.modules:
                sys.modules["deepspeed.runtime.torch_autocast"].TORCH_AUTOCAST_INITIALIZED = False
            results.put((number, rank, True, fn(DistComm(), *args)))
        except BaseException:
            results.put((number, rank, False, traceback.format_exc()))


class Pool:
    """Up to ``size`` ranks, started at first use. A failed or silent rank ends the pool; the next starts afresh."""

    def __init__(self, size: int = 4):
        self.size, self._procs, self._number = size, [], 0

    def _start(self) -> None:
        context = mp.get_context("spawn")
        self._tasks = [context.Queue() for _ in range(self.size)]
        self._results = context.Queue()
        self._group = (0, 0)
        self._procs = [
            context.Process(target=_serve, args=(r, self._tasks[r], self._results), daemon=True)
            for r in range(self.size)
        ]
        for proc in self._procs:
            proc.start()

    def run(self, world: int, fn: Callable[..., Any], *args: Any, timeout: float = 180) -> list[Any]:
        """``fn(comm, *args)`` on ranks 0..world-1; raises with the traceback of the first rank that failed."""
        if not self._procs:
            self._start()
        if self._group[0] != world:
            self._group = (world, free_port())
        self._number += 1
        for tasks in self._tasks[:world]:
            tasks.put((self._number, self._group, fn, args))
        out: list[Any] = [None] * world
        for _ in range(world):
            try:
                number, rank, ok, value = self._results.get(timeout=timeout)
            except queue.Empty:
                self.close()
                raise AssertionError(f"{fn.__name__}: no answer within {timeout} s (a hang)") from None
            assert number == self._number
            if not ok:
                self.close()
                raise AssertionError(f"rank {rank} of {world}:\n{value}")
            out[rank] = value
        return out

    def close(self) -> None:
        """End all ranks."""
        for proc in self._procs:
            proc.kill()
            proc.join()
        self._procs = []
