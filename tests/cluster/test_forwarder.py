"""The link with faults does what it says, measured with sockets in the two namespaces."""

import socket
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack

import pytest

from tests.cluster.faults import A, B, bandwidth, faulty_link
from tests.cluster.forwarder import inside

pytestmark = pytest.mark.cluster


def test_delay_loss_stall_and_bandwidth(cluster):
    with ExitStack() as stack:
        faults = stack.enter_context(faulty_link())
        with inside("h1"):
            near = stack.enter_context(socket.socket(socket.AF_INET, socket.SOCK_DGRAM))
            listener = stack.enter_context(socket.create_server((A, 0)))
        with inside("h2"):
            far = stack.enter_context(socket.socket(socket.AF_INET, socket.SOCK_DGRAM))
            far.bind((B, 0))
            stream = stack.enter_context(socket.create_connection(listener.getsockname(), timeout=20))
        end = stack.enter_context(listener.accept()[0])
        far.settimeout(20)

        def trip():
            begin = time.monotonic()
            near.sendto(b"x", far.getsockname())
            far.recv(10)
            return time.monotonic() - begin

        def megabyte():
            begin, left = time.monotonic(), 1 << 20
            with ThreadPoolExecutor(1) as pool:
                sent = pool.submit(stream.sendall, bytes(left))
                while left:
                    left -= len(end.recv(1 << 16))
                sent.result()
            return time.monotonic() - begin

        assert min(trip() for _ in range(5)) < 0.1
        faults("delay", 0.2)
        assert min(trip() for _ in range(5)) >= 0.2
        faults("delay", 0)
        faults("stall", 1)
        assert trip() >= 0.9
        before = faults("loss", 0.3)
        for _ in range(200):
            near.sendto(b"x", far.getsockname())
            time.sleep(0.001)
        time.sleep(0.2)
        lost = faults("loss", 0)["lost"] - before["lost"]
        assert 35 <= lost <= 85  # 60 expected
        with bandwidth("8mbit"):
            assert megabyte() >= 0.8  # 8.4 Mbit, less what the bucket and the buffers hold
