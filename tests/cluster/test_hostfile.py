"""A hostfile, two hosts: experts across them, the same run as on one host."""

import pytest

from tests.cluster.conftest import steps
from tests.pool import free_port
from tests.small import ENV, settings
from tests.test_launchers import script

pytestmark = pytest.mark.cluster


def losses(out):
    return [(line["samples"], line["values"]["loss"]) for line in steps(out)]


def test_experts_across_two_hosts_train_as_on_one(cluster, shards, tmp_path):
    """``deepspeed --hostfile`` over pdsh, one rank a host; then torchrun, two ranks on one host."""
    out, one, port = tmp_path / "two", tmp_path / "one", str(free_port())
    options = ("moe.ep_size=2", "engine.collective_timeout=120")
    launcher = ["bash", "launchers/multinode.sh", str(cluster.hostfile)]
    done = cluster.run(*launcher, *settings(shards, out, *options), MASTER_PORT=port)
    assert done.returncode == 0, done.stdout[-1500:] + done.stderr[-1500:]
    assert "h1: " in done.stdout and "h2: " in done.stdout  # pdsh's prefix: something was started on each
    env = {**ENV, "NPROC": "2", "MASTER_PORT": port}
    alone = script("launchers/torchrun.sh", *settings(shards, one, *options), env=env, timeout=400)
    assert alone.returncode == 0, alone.stderr[-2000:]
    assert len(losses(out)) == 6 and losses(out) == losses(one)
