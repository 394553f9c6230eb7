"""A link with faults between two network namespaces: a TUN device in each, and every packet goes through this program.

    python forwarder.py h1=10.78.0.1 h2=10.78.0.2 [--device tun0] [--delay S] [--loss P] [--seed N]     (root)

Words on stdin change the link while it runs, one setting a line; each is answered by one line of JSON with the counts
so far. It ends, and the devices with it, when stdin does.

    delay 0.02     every packet arrives 0.02 s later
    loss 0.05      this share of the packets is dropped, drawn from the seed
    stall 4        for 4 s nothing arrives; then all that was held does. `stall inf`: for ever; `stall 0` ends one
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import fcntl
import heapq
import itertools
import json
import os
import random
import selectors
import struct
import subprocess
import sys
import time
from collections.abc import Iterator

TUNSETIFF, IFF_TUN, IFF_NO_PI, CLONE_NEWNET = 0x400454CA, 0x0001, 0x1000, 0x40000000
HELD, MTU = 20_000, 1500  # packets a stalled link keeps; what comes then is lost, as in a router


@contextlib.contextmanager
def inside(namespace: str) -> Iterator[None]:
    """This thread in the network namespace ``namespace``; sockets and devices made here stay in it."""
    libc = ctypes.CDLL(None, use_errno=True)
    with open("/proc/self/ns/net") as home, open(f"/var/run/netns/{namespace}") as there:
        if libc.setns(there.fileno(), CLONE_NEWNET):
            raise OSError(ctypes.get_errno(), f"setns {namespace}")
        try:
            yield
        finally:
            libc.setns(home.fileno(), CLONE_NEWNET)


def device(namespace: str, name: str, address: str) -> int:
    """A TUN device that is up, with ``address``/24, in ``namespace``; its file."""
    with inside(namespace):
        file = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK)
        fcntl.ioctl(file, TUNSETIFF, struct.pack("16sH22x", name.encode(), IFF_TUN | IFF_NO_PI))
    ip = ["ip", "-n", namespace]
    subprocess.run([*ip, "addr", "add", f"{address}/24", "dev", name], check=True)
    subprocess.run([*ip, "link", "set", name, "mtu", str(MTU), "up"], check=True)
    return file


class Link:
    """Packets on their way, and what happens to them."""

    def __init__(self, delay: float, loss: float, seed: int):
        self.delay, self.loss, self.until, self._dice = delay, loss, 0.0, random.Random(seed)
        self._way: list[tuple[float, int, int, bytes]] = []  # due, order, file, packet
        self._order, self._last = itertools.count(), 0.0
        self.counts = {"forwarded": 0, "lost": 0, "overflowed": 0}

    def set(self, word: str, value: float) -> None:
        """One setting of stdin."""
        if word == "stall":
            self.until = time.monotonic() + value if value else 0.0
        elif word in ("delay", "loss"):
            setattr(self, word, value)
        else:
            raise ValueError(f"no setting {word!r}: delay, loss or stall")

    def take(self, packet: bytes, to: int) -> None:
        """A packet came; it goes to the file ``to``, if at all."""
        if self._dice.random() < self.loss:
            self.counts["lost"] += 1
        elif len(self._way) >= HELD:
            self.counts["overflowed"] += 1
        else:
            self._last = max(self._last, time.monotonic() + self.delay)  # never overtaking
            heapq.heappush(self._way, (self._last, next(self._order), to, packet))

    def deliver(self) -> float | None:
        """Writes what is due; seconds until the next is, None if nothing is on its way."""
        now = time.monotonic()
        if now < self.until:
            return min(self.until - now, 3600.0) if self._way else None
        while self._way and self._way[0][0] <= now:
            _, _, to, packet = heapq.heappop(self._way)
            try:
                os.write(to, packet)
                self.counts["forwarded"] += 1
            except OSError:  # the device on that side is down: lost, as on a wire
                self.counts["lost"] += 1
        return max(0.0, self._way[0][0] - now) if self._way else None


def serve(link: Link, a: int, b: int) -> None:
    """Until stdin ends."""
    other = {a: b, b: a}
    with selectors.DefaultSelector() as ready:
        for file in (a, b, 0):
            ready.register(file, selectors.EVENT_READ)
        wait: float | None = None
        while True:
            for key, _ in ready.select(wait):
                if key.fd == 0:
                    if not (line := sys.stdin.readline()):
                        return
                    word, value = line.split()
                    link.set(word, float(value))
                    print(json.dumps(link.counts), flush=True)
                    continue
                for _ in range(64):
                    try:
                        packet = os.read(key.fd, MTU + 64)
                    except BlockingIOError:
                        break
                    link.take(packet, other[key.fd])
            wait = link.deliver()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sides", nargs=2, metavar="NAMESPACE=ADDRESS")
    parser.add_argument("--device", default="tun0")
    parser.add_argument("--delay", type=float, default=0.0)
    parser.add_argument("--loss", type=float, default=0.0)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    files = [device(namespace, args.device, address) for namespace, address in (s.split("=") for s in args.sides)]
    link = Link(args.delay, args.loss, args.seed)
    print(json.dumps(link.counts), flush=True)  # it stands
    serve(link, *files)


if __name__ == "__main__":
    main()
