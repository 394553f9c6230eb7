"""A hostfile, two hosts: experts across them, the same run as on one host."""

import pytest

from tests.cluster.conftest import steps
from tests.pool import free_port
from tests.small import ENV, settings
from tests.test_launchers import script

pytestmark = pytest.mark.cluster


def losses(out):
    return [(line["samples"], line["values"]["loss"]) for line in steps(out)]


def said(done):
    return f"exit code {done.returncode}\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}\n"


def test_experts_across_two_hosts_train_as_on_one(cluster, shards, tmp_path):
    """``deepspeed --hostfile`` over pdsh, one rank a host; then torchrun, two ranks on one host."""
    out, one = tmp_path / "two", tmp_path / "one"
    options = ("moe.ep_size=2", "engine.collective_timeout=120")
    launcher = ["bash", "launchers/multinode.sh", str(cluster.hostfile)]
    done = cluster.run(*launcher, *settings(shards, out, *options), MASTER_PORT=str(free_port()))
    assert done.returncode == 0, said(done)
    assert "h1: " in done.stdout and "h2: " in done.stdout, said(done)  # pdsh's prefix: something was started on each
    # A port of its own, asked for now: minutes after it was free another program may have it.
    env = {**ENV, "NPROC": "2", "MASTER_PORT": str(free_port())}
    alone = script("launchers/torchrun.sh", *settings(shards, one, *options), env=env, timeout=400)
    assert alone.returncode == 0, said(alone)
    assert len(losses(out)) == 6 and losses(out) == losses(one), said(done) + said(alone)
