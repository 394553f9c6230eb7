"""Faults in the middle of a run: it goes on, or ends within the time-out with a line that names host and rank.

Two runs, each with the faults that it must survive first and the one that ends it last. They are started in two ways
(pdsh; without ssh), and continued in two more (one host less; Open MPI).
"""

import contextlib
import os
import re
import signal
import subprocess
import time

import pytest

from moe_cl.engine.checkpoint import store
from tests.cluster.conftest import need, steps, until
from tests.cluster.faults import A, bandwidth, faulty_link
from tests.pool import free_port
from tests.small import settings

pytestmark = pytest.mark.cluster
TIMEOUT = 20  # engine.collective_timeout of these runs, seconds
END = TIMEOUT + 60  # the stated limit: the time-out, ssh giving up (15 s), the launcher's own end (30 s at most), 15 s
LONG = ("moe.ep_size=2", "schedule.epochs=2000", f"engine.collective_timeout={TIMEOUT}")
LOST = r"rank 1 stopped answering: its last sign was '[^']+' in step \d+, \d+ s ago, on host h2; rank 0 on h1 waited in"


def goes_on(out, log, process, more=3, seconds=150):
    """``more`` steps than now are done before long."""
    goal = len(steps(out)) + more
    until(lambda: len(steps(out)) >= goal, seconds, f"step {goal}", log, process)


def ended(processes, log):
    """Seconds until all have ended, each with an error."""
    begin = time.monotonic()
    until(lambda: all(p.poll() is not None for p in processes), END, "the end of the run", log)
    assert all(p.returncode for p in processes), log.read_text()[-3000:]
    return time.monotonic() - begin


def continued(out, last):
    """The journal has every step once, from the first to four after the checkpoint that was there."""
    assert [line["step"] for line in steps(out)] == list(range(1, last + 5))


def test_a_link_goes_down_shortly_then_for_good_and_one_host_continues(cluster, shards, tmp_path):
    out, log, port = tmp_path / "run", tmp_path / "log", str(free_port())
    launcher = ["bash", "launchers/multinode.sh"]
    run = cluster.start(1, log, *launcher, str(cluster.hostfile), *settings(shards, out, *LONG), MASTER_PORT=port)
    link = ["ip", "-n", "h2", "link", "set", "eth0"]
    try:
        until(lambda: store.latest_complete(out) is not None, 200, "a checkpoint", log, run)
        rank = cluster.ranks(2)
        names = b"".join(open(f"/proc/{pid}/environ", "rb").read() for pid in rank)
        assert len(rank) == 1 and b"TORCH_FR_BUFFER_SIZE=2000" in names  # the launcher's settings reach h2
        subprocess.run([*link, "down"], check=True)
        time.sleep(3)
        subprocess.run([*link, "up"], check=True)
        goes_on(out, log, run)
        subprocess.run([*link, "down"], check=True)
        ended([run], log)
        assert re.search(LOST, log.read_text()) and "--resume" in log.read_text(), log.read_text()[-3000:]
        until(lambda: not cluster.ranks(2), END, "the end of the rank that was cut off")
    finally:
        subprocess.run([*link, "up"], check=True)
        cluster.end_ranks()
    last, alone = store.step_of(store.latest_complete(out)), tmp_path / "one-host"
    alone.write_text("h1 slots=1\n")
    more = ["moe.ep_size=1", "schedule.epochs=2000", f"schedule.max_steps={last + 4}", "--resume"]
    again = cluster.run(*launcher, str(alone), *settings(shards, out, *more), MASTER_PORT=port)
    assert again.returncode == 0, again.stdout[-2000:] + again.stderr[-2000:]
    continued(out, last)


def test_latency_loss_bandwidth_and_stalls_are_survived_a_killed_rank_is_named(cluster, shards, tmp_path):
    need({"mpirun": "openmpi-bin", "ompi_info": "openmpi-bin", "tc": "iproute2"})
    out, port = tmp_path / "run", str(free_port())
    logs = [tmp_path / "log1", tmp_path / "log2"]
    net = {"MASTER_ADDR": A, "MASTER_PORT": port, "GLOO_SOCKET_IFNAME": "tun0"}
    launcher = ["bash", "launchers/multinode.sh", str(cluster.hostfile)]
    with faulty_link() as faults:
        runs = [
            cluster.start(n + 1, logs[n], *launcher, *settings(shards, out, *LONG), NODE_RANK=str(n), **net)
            for n in (0, 1)
        ]
        try:
            until(lambda: store.latest_complete(out) is not None, 200, "a checkpoint", logs[0], runs[0])
            for word, value in (("delay", 0.01), ("loss", 0.02)):
                faults(word, value)
                goes_on(out, logs[0], runs[0])
            assert faults("loss", 0)["lost"] > 0
            faults("delay", 0)
            with bandwidth("1mbit"):
                goes_on(out, logs[0], runs[0])
            faults("stall", 5)
            before = len(steps(out))
            time.sleep(4)
            assert len(steps(out)) <= before + 2  # it did stall
            goes_on(out, logs[0], runs[0])
            (rank,) = cluster.ranks(2)
            os.kill(rank, signal.SIGKILL)
            assert ended(runs, logs[0]) < TIMEOUT + 30
            assert re.search(LOST, logs[0].read_text()), logs[0].read_text()[-3000:]
        finally:
            for run in runs:
                with contextlib.suppress(ProcessLookupError):
                    run.kill()
            cluster.end_ranks()
        last = store.step_of(store.latest_complete(out))
        more = ["schedule.epochs=2000", "moe.ep_size=2", f"schedule.max_steps={last + 4}", "--resume"]
        # Open MPI refuses to start as root without these two.
        root = {"OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1", "LAUNCHER": "openmpi"}
        again = cluster.run(*launcher, *settings(shards, out, *more), **net, **root)
        assert again.returncode == 0, again.stdout[-2000:] + again.stderr[-2000:]
    continued(out, last)
