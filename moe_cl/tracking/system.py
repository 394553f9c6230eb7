"""A node's processors, memory, network and accelerators, sampled by a thread of its first rank.

Each node appends to ``OUT/system/HOST.jsonl`` (the out dir is shared); rank 0's tracker reads all of them, so that one
process alone talks to the server. Keys: ``system/HOST/cpu_percent`` and so on.
"""

from __future__ import annotations

import contextlib
import re
import socket
import sys
import threading
import time
from pathlib import Path
from typing import Any

import psutil

from moe_cl.tracking.journal import Journal
from moe_cl.tracking.progress import memory_gib


def sample(before: dict[str, float] | None = None) -> tuple[dict[str, float], dict[str, float]]:
    """(values, counters). Rates need the counters of the sample before. Units: percent, GiB, MB/s."""
    memory, network, disk = psutil.virtual_memory(), psutil.net_io_counters(), psutil.disk_io_counters()
    counters = {"time": time.monotonic(), "network_sent": network.bytes_sent, "network_received": network.bytes_recv}
    if disk is not None:
        counters |= {"disk_read": disk.read_bytes, "disk_written": disk.write_bytes}
    values = {"cpu_percent": psutil.cpu_percent(), "memory_gib": memory.used / 2**30, "memory_percent": memory.percent}
    if before is not None:
        seconds = max(1e-3, counters["time"] - before["time"])
        for name in counters.keys() & before.keys() - {"time"}:
            values[f"{name}_mb_s"] = (counters[name] - before[name]) / seconds / 1e6
    return values | _accelerators(), counters


def _accelerators() -> dict[str, float]:
    """Memory, utilisation and power of each NVIDIA device, through NVML; nothing where there is none.

    Without NVML's Python package the memory of this process's device alone: CUDA would make a context on each of the
    others to answer, some hundred MB of it.
    """
    torch = sys.modules.get("torch")
    if torch is None or not torch.cuda.is_available() or not torch.cuda.is_initialized():
        return {}
    figures = {
        "memory_gib": lambda i: torch.cuda.device_memory_used(i) / 2**30,
        "utilization_percent": lambda i: float(torch.cuda.utilization(i)),
        "power_w": lambda i: torch.cuda.power_draw(i) / 1000,
    }
    # The package is not there, the driver refuses, or a device does not have that figure (MIG).
    refused = (ModuleNotFoundError, RuntimeError, getattr(sys.modules.get("pynvml"), "NVMLError", RuntimeError))
    values = {}
    for i in range(torch.cuda.device_count()):
        for name, read in figures.items():
            with contextlib.suppress(*refused):
                values[f"gpu{i}/{name}"] = read(i)
    if not values:
        free, total = torch.cuda.mem_get_info()
        values[f"gpu{torch.cuda.current_device()}/memory_gib"] = (total - free) / 2**30
    return values


class Monitor:
    """Samples every ``seconds`` until ``close``. The training loop sets ``step`` (optimizer steps done).

    Args:
        out: the run's folder. resume_step: as for the Journal.
    """

    def __init__(self, out: str | Path, seconds: float = 15.0, resume_step: int | None = None):
        self.seconds, self.step, self._stop = seconds, resume_step or 0, threading.Event()
        self.memory: float | None = None  # GiB of this process and its children; their walk is kept out of the loop
        self.host = re.sub(r"[^\w.-]", "_", socket.gethostname().partition(".")[0]) or "node"
        path = Path(out) / "system" / f"{self.host}.jsonl"
        self._journal = Journal(path, resume_step, max_bytes=8 << 20, keep=4)
        self._thread = threading.Thread(target=self._run, name="system", daemon=True)
        self._thread.start()

    def _run(self) -> None:
        _, counters = sample()
        self.memory = memory_gib()
        while not self._stop.wait(self.seconds):
            self.memory = memory_gib()
            values, counters = sample(counters)
            self._journal.step(self.step, {f"system/{self.host}/{k}": v for k, v in values.items()})

    def close(self) -> None:
        """End the thread."""
        self._stop.set()
        self._thread.join()
        self._journal.close()

    def __enter__(self) -> Monitor:
        return self

    def __exit__(self, *error: Any) -> None:
        self.close()
