"""A second network between the hosts (tun0: 10.78.0.1, 10.78.0.2) whose faults a test commands."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

A, B = "10.78.0.1", "10.78.0.2"
FORWARDER = Path(__file__).with_name("forwarder.py")


class Faults:
    """``faults("delay", 0.02)`` changes the link; returns the packets forwarded, lost and overflowed so far."""

    def __init__(self, process: subprocess.Popen):
        self._process = process
        process.stdout.readline()  # both devices stand

    def __call__(self, word: str, value: float) -> dict[str, int]:
        self._process.stdin.write(f"{word} {value}\n")
        self._process.stdin.flush()
        return json.loads(self._process.stdout.readline())


@contextmanager
def faulty_link(seed: int = 1) -> Iterator[Faults]:
    """The forwarder between h1 and h2, until the end of the block."""
    command = [sys.executable, str(FORWARDER), f"h1={A}", f"h2={B}", "--seed", str(seed)]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    try:
        yield Faults(process)
    finally:
        process.stdin.close()
        process.wait(timeout=20)


@contextmanager
def bandwidth(rate: str) -> Iterator[None]:
    """Both sides of tun0 send at ``rate`` at most (tc's words: ``8mbit``)."""
    tbf = ["root", "tbf", "rate", rate, "burst", "32kb", "latency", "400ms"]
    for host in ("h1", "h2"):
        subprocess.run(["tc", "-n", host, "qdisc", "add", "dev", "tun0", *tbf], check=True)
    try:
        yield
    finally:
        for host in ("h1", "h2"):
            subprocess.run(["tc", "-n", host, "qdisc", "del", "dev", "tun0", "root"], check=True)
