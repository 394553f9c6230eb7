"""One pool of gloo ranks for the whole pytest run: ``pool.run(world, fn, *args)`` calls ``fn(comm, *args)`` on each rank.

A rank costs a Python start with torch; started once and re-used for every test, with a process group per world size.
Functions are sent by name, so they live at module level of a test file. Results come back in rank order.
"""

from __future__ import annotations

import os
import queue
import socket
import traceback
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import torch.multiprocessing as mp


def free_port() -> int:
    """A port that nothing listens on."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def _serve(rank: int, size: int, port: int, tasks: Any, results: Any) -> None:
    os.environ.update(
        RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(size), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port),
        DS_ACCELERATOR="cpu", OMP_NUM_THREADS="1",
    )  # fmt: skip
    import torch
    import torch.distributed as dist

    from moe_cl.comm import DistComm

    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=rank, world_size=size, timeout=timedelta(seconds=120))
    groups = {world: dist.new_group(list(range(world))) for world in range(1, size)}
    while (task := tasks.get()) is not None:
        number, world, fn, args = task
        try:
            comm = DistComm(groups.get(world))
            results.put((number, rank, True, fn(comm, *args)))
        except BaseException:
            results.put((number, rank, False, traceback.format_exc()))


class Pool:
    """Up to ``size`` ranks, started at first use. A failed or silent rank ends the pool; the next call starts a fresh one."""

    def __init__(self, size: int = 4):
        self.size, self._procs, self._number = size, [], 0

    def _start(self) -> None:
        context = mp.get_context("spawn")
        self._tasks = [context.Queue() for _ in range(self.size)]
        self._results = context.Queue()
        port = free_port()
        self._procs = [
            context.Process(target=_serve, args=(r, self.size, port, self._tasks[r], self._results), daemon=True)
            for r in range(self.size)
        ]
        for proc in self._procs:
            proc.start()

    def run(self, world: int, fn: Callable[..., Any], *args: Any, timeout: float = 180) -> list[Any]:
        """``fn(comm, *args)`` on ranks 0..world-1; raises with the traceback of the first rank that failed."""
        if not self._procs:
            self._start()
        self._number += 1
        for tasks in self._tasks[:world]:
            tasks.put((self._number, world, fn, args))
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
