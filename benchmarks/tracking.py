"""What tracking costs a training step: time inside the loop's logging call, and the median step with and without it.

The call is the one that the loop makes (``Tracking.step``: arithmetic of the speed, journal, progress line). A step is
a matrix product of about 40 ms on two threads (the smallest step of a recipe takes three times that). Steps with
tracking (journal, and the sender process at work) and without (sender stopped) take turns in short rounds, for a data
base in the out dir and for servers that refuse, never answer, answer 500, are slow, or die in the middle and come back.
The 99th percentile is of all calls, by the clock. ``noise`` is what two rounds without tracking differ by: the median
over pairs of neighbours, always the larger over the smaller.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import os
import signal
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from moe_cl.config import TrackConfig
from moe_cl.engine.flops import Flops
from moe_cl.tracking.run import Tracking
from tests.pool import free_port
from tests.tracking.servers import Server, black_hole, broken, slow

CALL_MS, STEP = 0.5, 1.02  # 99th percentile of the call; ratio of step medians (or the noise, if that is larger)
START = 12.0  # seconds in which the sender imports MLflow and makes its run
DELAY = 0.5  # seconds that each piece of the slow server's answers takes


@dataclass
class Kind:
    """A server: its address, and what happens to it before round ``i`` of ``n``."""

    uri: str | None = None
    before: Callable[[int, int], None] = lambda i, n: None


@contextlib.contextmanager
def refusing() -> Iterator[Kind]:
    """An address where nobody listens."""
    yield Kind(f"http://127.0.0.1:{free_port()}")


@contextlib.contextmanager
def embedded() -> Iterator[Kind]:
    """SQLite in the out dir."""
    yield Kind()


@contextlib.contextmanager
def unanswering() -> Iterator[Kind]:
    """Accepts and never answers."""
    with black_hole() as uri:
        yield Kind(uri)


@contextlib.contextmanager
def failing() -> Iterator[Kind]:
    """Answers 500."""
    with broken() as uri:
        yield Kind(uri)


@contextlib.contextmanager
def real() -> Iterator[Server]:
    """MLflow's own server. It stands for another machine: here it gets the processors only when nobody else does."""
    with tempfile.TemporaryDirectory() as folder:
        server = Server(Path(folder))
        try:
            yield aside(server.launch()).ready()
        finally:
            server.kill()


def aside(server: Server) -> Server:
    """Its processes, from the first one on, run when the machine is idle."""
    os.sched_setscheduler(server.process.pid, os.SCHED_IDLE, os.sched_param(0))
    return server


@contextlib.contextmanager
def slow_server() -> Iterator[Kind]:
    """A real one behind a slow line."""
    with real() as server, slow(server.port, DELAY) as line:
        yield Kind(line.uri)


@contextlib.contextmanager
def dying() -> Iterator[Kind]:
    """A real one that is killed after a third of the rounds and is back for the last third."""
    with real() as server:

        def before(i: int, n: int) -> None:
            if i == n // 3:
                server.kill()
            elif i == 2 * n // 3:
                aside(server.launch()).ready()

        yield Kind(server.uri, before)


KINDS = {
    "embedded": embedded, "refusing": refusing, "black hole": unanswering, "500": failing, "slow": slow_server,
    "dies": dying,
}  # fmt: skip


def values(step: int) -> dict[str, object]:
    """As many as a CR-MoE step of 6 layers and 16 experts has."""
    scalars = {f"health/part{i}": step / (i + 1) for i in range(30)}
    rates = {"images_per_second": 850.0, "data_wait": 0.01}
    return {"loss": 1.0 / step, **rates, **scalars, **{f"moe/L{i}/load": [0.0625] * 16 for i in range(6)}}


def work(matrix: np.ndarray) -> None:
    """The step."""
    np.dot(matrix, matrix)


def round_(steps: int, log: Callable[[int], float] | None, matrix: np.ndarray) -> tuple[list[float], list[float]]:
    """Seconds of each step, and inside each logging call."""
    whole, inside = [], []
    for step in range(1, steps + 1):
        begin = time.perf_counter()
        work(matrix)
        if log is not None:
            inside.append(log(step))
        whole.append(time.perf_counter() - begin)
    return whole, inside


def measure(kind: Callable[[], contextlib.AbstractContextManager], steps: int, rounds: int) -> dict[str, float]:
    """p50 and p99 of the call in ms, medians of the step in ms, their ratio, and the noise of such a ratio."""
    matrix = np.random.default_rng(0).normal(size=(1280, 1280))
    on, off, inside = [], [], []
    with kind() as server, tempfile.TemporaryDirectory() as folder, quiet_tracking(Path(folder), server.uri) as track:
        number = itertools.count(1)

        def log(_: int) -> float:
            step = next(number)
            numbers = values(step)  # the loop has them already
            called = time.perf_counter()
            track.step(step, numbers, "0" * 16)
            return time.perf_counter() - called

        log(0)
        time.sleep(START)  # a run's first steps, too, are over before MLflow is imported
        for i in range(rounds):
            server.before(i, rounds)
            whole, calls = round_(steps, log, matrix)
            on.append(statistics.median(whole))
            inside += calls
            track.handle.process.send_signal(signal.SIGSTOP)
            off.append(statistics.median(round_(steps, None, matrix)[0]))
            track.handle.process.send_signal(signal.SIGCONT)
    apart = [max(a, b) / min(a, b) for a, b in zip(off, off[1:], strict=False)]
    return {
        "call_p50_ms": 1e3 * statistics.median(inside), "call_p99_ms": 1e3 * sorted(inside)[int(0.99 * len(inside))],
        "step_on_ms": 1e3 * statistics.median(on), "step_off_ms": 1e3 * statistics.median(off),
        "ratio": statistics.median(a / b for a, b in zip(on, off, strict=True)), "noise": statistics.median(apart),
    }  # fmt: skip


@contextlib.contextmanager
def quiet_tracking(out: Path, uri: str | None) -> Iterator[Tracking]:
    """A run's tracking as the loop opens it, its console a file (as under Slurm)."""
    with (
        open(out / "console.log", "w") as console,
        contextlib.redirect_stdout(console),
        contextlib.redirect_stderr(console),
        Tracking(
            out, TrackConfig(uri=uri, flush_seconds=0), {}, rank=0, node=True, resume_step=0, total=10**6,
            tags={"method": "benchmark"}, datasets=[], show={}, flops=Flops(1e9, 1e13),
        ) as track,
    ):  # fmt: skip
        yield track


def main() -> None:
    """Print a table and the line that the gate reads."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--quick", action="store_true", help="fewer rounds, for tests")
    quick = parser.parse_args().quick
    ratios: dict[str, float] = {}
    targets: dict[str, float] = {}
    print(f"{'server':12} {'call p50':>9} {'call p99':>9} {'step on':>9} {'step off':>9}  ratio  noise")
    for name, kind in KINDS.items():
        m = measure(kind, 20, 3 if quick else 15)
        print(
            f"{name:12} {m['call_p50_ms']:6.3f} ms {m['call_p99_ms']:6.3f} ms {m['step_on_ms']:6.2f} ms"
            f" {m['step_off_ms']:6.2f} ms  {m['ratio']:.3f}  {m['noise']:.3f}",
            flush=True,
        )
        ratios |= {f"call_p99_ms/{name}": round(m["call_p99_ms"], 4), f"step/{name}": round(m["ratio"], 4)}
        targets |= {f"call_p99_ms/{name}": CALL_MS, f"step/{name}": round(max(STEP, m["noise"]), 4)}
    met = all(value <= targets[key] for key, value in ratios.items())
    print(json.dumps({"benchmark": "tracking", "ratios": ratios, "targets": targets, "met": met}))


if __name__ == "__main__":
    main()
