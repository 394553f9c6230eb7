"""Weak scaling of a CR-MoE step: 1 -> 2 processes on one host, 1 -> 2 hosts; images a rank fixed, experts spread.

Two hosts are network namespaces with a bridge between them (``tests/cluster/up.sh``; root, else that row is left out).
Each rank has one thread. All sides stand ready and take turns; a figure is the median over rounds of ratios within a
round. Two copies that never talk are a side too: what two busy cores of this machine can do at most (shared caches,
memory and clock), so that what is lost to messages and waiting is seen apart from what is lost to the machine.

Targets, of the images/s of two silent copies: 0.85 for two processes, 0.80 for two hosts. On two cores nothing can be
hidden: gloo's own work for the messages, and the wait for the slower rank, come out of the same two cores. A step of
64 images moves about 4 MB of dense gradients and, in two layers, six exchanges (forward and backward of the student,
forward of the teacher) of 64 x 2 views x 17 tokens x 2 experts of 128 floats, half of which leave: 13 MB. Through
sockets of about 1 GB/s that is 2 to 3 % of a step of 0.7 s, and several times that with the copies, some forty
collectives' scheduling on two busy cores, and the wait for the slower rank; a network of
namespaces copies each packet once more.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from tests.pool import free_port

ROOT = Path(__file__).resolve().parents[1]
CLUSTER = ROOT / "tests" / "cluster"
TARGETS = {"processes": 0.85, "hosts": 0.80}
SIDES = {"one": "1 process", "copies": "2 copies that never talk", "processes": "2 processes", "hosts": "2 hosts"}


class Rank:
    """A worker that trains when told."""

    def __init__(self, images: int, rank: int, world: int, address: str, port: int, prefix: list[str], **more: str):
        who = {"RANK": str(rank), "WORLD_SIZE": str(world), "LOCAL_RANK": "0", "MASTER_ADDR": address}
        env = {**os.environ, **who, "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", **more}
        command = [*prefix, sys.executable, "-m", "benchmarks._scaling", str(images)]
        self._process = subprocess.Popen(
            command, cwd=ROOT, env=env, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def ask(self, steps: int) -> None:
        """Begin ``steps`` steps."""
        self._process.stdin.write(f"{steps}\n")
        self._process.stdin.flush()

    def answer(self) -> dict | float:
        """The next line of JSON."""
        while not (line := self._process.stdout.readline()).startswith(tuple("{0123456789")):
            if not line:
                raise SystemExit(f"scaling: a rank ended early (exit code {self._process.wait()})")
        return json.loads(line)

    def close(self) -> None:
        """End it."""
        self._process.stdin.close()
        self._process.wait(timeout=60)


@contextmanager
def two_hosts() -> Iterator[list[list[str]] | None]:
    """How to start a command on each of the two hosts, or None with the reason printed."""
    from tests.cluster.conftest import PACKAGES, install

    if why := install(PACKAGES):
        print(f"2 hosts: left out: {why}")
        yield None
        return
    with tempfile.TemporaryDirectory() as folder:
        subprocess.run([CLUSTER / "up.sh", folder], check=True)
        try:
            yield [[f"{folder}/bin/on", str(n)] for n in (1, 2)]
        finally:
            subprocess.run([CLUSTER / "down.sh", folder], check=True)


def start(images: int, stack: ExitStack) -> dict[str, list[Rank]]:
    """All sides, ready: name -> its ranks."""
    local = {"GLOO_SOCKET_IFNAME": "lo"}
    sides = {"copies": [Rank(images, 0, 1, "127.0.0.1", free_port(), [], **local) for _ in range(2)]}
    sides["one"] = sides["copies"][:1]
    port = free_port()
    sides["processes"] = [Rank(images, r, 2, "127.0.0.1", port, [], **local) for r in range(2)]
    if (on := stack.enter_context(two_hosts())) is not None:
        far = {"GLOO_SOCKET_IFNAME": "eth0"}
        sides["hosts"] = [Rank(images, r, 2, "10.77.0.1", port, on[r], **far) for r in range(2)]
    for rank in {id(r): r for ranks in sides.values() for r in ranks}.values():
        stack.callback(rank.close)
        sizes = rank.answer()
    dense, experts = (4 * sizes[key] / 1e6 for key in ("dense", "experts"))
    print(f"gradients of one of two ranks: {dense:.1f} MB dense, {experts:.1f} MB of its experts")
    return {name: sides[name] for name in SIDES if name in sides}


def seconds(ranks: list[Rank], steps: int) -> float:
    """Of ``steps`` steps of all ``ranks`` at once: the slowest rank's."""
    for rank in ranks:
        rank.ask(steps)
    return max(rank.answer() for rank in ranks)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--quick", action="store_true", help="few images and rounds")
    parser.add_argument("--rounds", type=int)
    args = parser.parse_args()
    images, steps, rounds = (16, 4, 3) if args.quick else (64, 8, 9)
    rounds = args.rounds or rounds
    with ExitStack() as stack:
        sides = start(images, stack)
        for ranks in sides.values():
            seconds(ranks, 2)  # warm: connections, memory
        speed: dict[str, list[float]] = {name: [] for name in sides}
        for _ in range(rounds):
            for name, ranks in sides.items():
                speed[name].append(len(ranks) * images * steps / seconds(ranks, steps))
    report(speed, images, rounds)


def report(speed: dict[str, list[float]], images: int, rounds: int) -> None:
    """The table, and the line that the gate reads."""
    ratios: dict[str, float] = {}
    print(f"{images} images a rank, one thread a rank, {rounds} rounds, medians\n")
    print("| weak scaling | images/s | of 1 process x ranks | of two silent copies | target |\n|---|---|---|---|---|")
    for name, rates in speed.items():
        count = 1 if name == "one" else 2
        of_one = statistics.median(a / (count * b) for a, b in zip(rates, speed["one"], strict=True))
        of_copies = statistics.median(a / b for a, b in zip(rates, speed["copies"], strict=True))
        row = [SIDES[name], f"{statistics.median(rates):.1f}", f"{of_one:.3f}"]
        row += [f"{of_copies:.3f}" if count == 2 else "", f"{TARGETS[name]:.2f}" if name in TARGETS else ""]
        print(f"| {' | '.join(row)} |")
        if name in TARGETS:
            ratios |= {name: round(of_copies, 4), f"{name}_of_one": round(of_one, 4)}
    targets = {name: target for name, target in TARGETS.items() if name in ratios}
    met = all(ratios[name] >= target for name, target in targets.items())
    print(json.dumps({"benchmark": "scaling", "ratios": ratios, "targets": targets, "met": met}))


if __name__ == "__main__":
    main()
