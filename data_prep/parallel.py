"""Tasks over processes, in no order, with progress; one worker means this process."""

from __future__ import annotations

import concurrent.futures
import ctypes
import multiprocessing
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures.process import BrokenProcessPool
from typing import Any

from moe_cl.config import ConfigError
from moe_cl.counting import Counting

_context: tuple[Any, Any] = (None, None)  # what every task gets, and the counter of finished samples


class Counter:
    """Counts in this process; a shared one counts in all."""

    def __init__(self, progress: Counting):
        self._progress = progress

    def add(self, count: int) -> None:
        self._progress.advance(count)


class SharedCounter:
    """A number that all workers add to and the parent shows."""

    def __init__(self, value: Any):
        self._value = value

    def add(self, count: int) -> None:
        with self._value.get_lock():
            self._value.value += count


def run(
    task: Callable[[Any, Any, Any], Any],
    shared: Any,
    jobs: Sequence[Any],
    workers: int,
    what: str,
    total: int,
    unit: str = "samples",
) -> Iterator[tuple[Any, Any]]:
    """Yields (job, result) as jobs end.

    Args:
        task: ``task(shared, counter, job)``, a module-level function; calls ``counter.add`` as samples are done.
        shared: sent to each worker once (inherited where a fork is safe).
        workers: processes; 1 runs here.
        total: samples (or another ``unit``) over all jobs, for the bar.
    """
    if workers <= 1 or len(jobs) <= 1:
        with Counting(what, total, unit) as progress:
            counter = Counter(progress)
            for job in jobs:
                yield job, task(shared, counter, job)
        return
    # A fork shares the listing without a copy and starts in milliseconds, but is safe only where there are no threads.
    alone = threading.active_count() == 1 and "torch" not in sys.modules
    context = multiprocessing.get_context("fork" if alone else "spawn")
    value = context.Value("q", 0)
    pool = concurrent.futures.ProcessPoolExecutor(min(workers, len(jobs)), context, _start, (shared, value))
    try:
        futures = {pool.submit(_call, task, job): job for job in jobs}
        with Counting(what, total, unit) as progress:
            left = set(futures)
            while left:
                done, left = concurrent.futures.wait(left, 0.1, concurrent.futures.FIRST_COMPLETED)
                progress.set(value.value)
                for future in done:
                    yield futures[future], future.result()
    except BrokenProcessPool:
        raise ConfigError(
            "a worker process was killed (out of memory?); use fewer --workers; the command continues"
        ) from None
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _start(shared: Any, value: Any) -> None:
    global _context
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG: no worker goes on writing for a killed parent
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent decides; it stops giving out jobs
    _context = (shared, SharedCounter(value))


def _call(task: Callable[[Any, Any, Any], Any], job: Any) -> Any:
    return task(*_context, job)
