"""How fast ranks reach each other: a short all-reduce and all-to-all, started by ``doctor`` on every host.

RANK=r WORLD_SIZE=n MASTER_ADDR=... MASTER_PORT=... python -m moe_cl.planning.links
"""

from __future__ import annotations

import json
import os
import statistics
import sys
import time
from collections.abc import Callable

import torch

from moe_cl.comm import Comm
from moe_cl.engine import ranks

MEGABYTES, ROUNDS = 16, 5


def measure(comm: Comm, device: torch.device) -> dict[str, float]:
    """Median ms of a small all-reduce, and bus bandwidths (MB/s a rank) of a large all-reduce and all-to-all."""

    def median(call: Callable[[], object]) -> float:
        times = []
        for _ in range(ROUNDS + 1):
            comm.barrier()
            begin = time.perf_counter()
            call()
            if device.type == "cuda":
                torch.cuda.synchronize()
            times.append(time.perf_counter() - begin)
        return statistics.median(times[1:])  # the first one opens the connections

    size = MEGABYTES << 20
    large = torch.ones(size // 4, device=device)
    rows = [len(large) // comm.world] * comm.world
    large = large[: sum(rows)]
    share = (comm.world - 1) / comm.world
    small = median(lambda: comm.all_reduce(large[:1]))
    reduce, exchange = median(lambda: comm.all_reduce(large)), median(lambda: comm.all_to_all(large, rows, rows))
    return {
        "latency_ms": 1e3 * small,
        "all_reduce_mb_s": 2 * share * size / reduce / 1e6,
        "all_to_all_mb_s": share * size / exchange / 1e6,
    }


def main() -> int:
    """Join, measure, print one line of JSON on rank 0."""
    me = ranks.from_environment()
    comm = ranks.init(me, timeout=60)
    result = measure(comm, comm.device)
    if me.rank == 0:
        print(json.dumps(result), flush=True)
    comm.barrier()
    # gloo's threads may abort in the interpreter's teardown ("terminate called"), after everything was said.
    os._exit(0)


if __name__ == "__main__":
    sys.exit(main())
