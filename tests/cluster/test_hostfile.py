"""A hostfile, two hosts: experts across them, the same run as on one host; and what the doctor finds before a job."""

import json
import subprocess
import time
from subprocess import PIPE, STDOUT

import pytest

from moe_cl.engine.checkpoint import store
from moe_cl.tracking.journal import read
from tests.pool import free_port
from tests.small import ROOT, launch, settings

pytestmark = pytest.mark.cluster


def losses(out):
    return [(line["samples"], line["values"]["loss"]) for line in read(out / "journal.jsonl") if line["kind"] == "step"]


def test_experts_across_two_hosts_train_as_on_one(cluster, shards, tmp_path):
    out, one = tmp_path / "two", tmp_path / "one"
    command = ["deepspeed", "--hostfile", str(cluster.hostfile), "--master_addr", "10.77.0.1", "--master_port",
               str(free_port()), "--launcher", "pdsh", "--module", "moe_cl", "pretrain"]  # fmt: skip
    done = cluster.run(*command, *settings(shards, out, "moe.ep_size=2"))
    assert done.returncode == 0, done.stdout[-1500:] + done.stderr[-1500:]
    alone = launch(2, *settings(shards, one, "moe.ep_size=2"))
    assert alone.returncode == 0, alone.stderr[-2000:]
    assert len(losses(out)) == 6 and losses(out) == losses(one)


def test_a_link_that_goes_down_ends_the_run_with_a_name_and_the_restart_continues(cluster, shards, tmp_path):
    out = tmp_path / "run"
    command = ["ip", "netns", "exec", "h1", "bash", "launchers/multinode.sh", str(cluster.hostfile)]
    options = settings(shards, out, "moe.ep_size=2", "schedule.epochs=200", "engine.collective_timeout=15", "--resume")
    env = {**cluster.env, "MASTER_PORT": str(free_port())}
    run = subprocess.Popen([*command, *options], cwd=ROOT, env=env, text=True, stdout=PIPE, stderr=STDOUT)
    try:
        wait_for(lambda: store.latest_complete(out) is not None, run)
        subprocess.run(["ip", "-n", "h2", "link", "set", "eth0", "down"], check=True)
        text, _ = run.communicate(timeout=90)
        assert run.returncode != 0
        assert "rank 1 stopped answering: its last sign was" in text and "--resume" in text, text[-3000:]
    finally:
        subprocess.run(["ip", "-n", "h2", "link", "set", "eth0", "up"], check=True)
        cluster.end_ranks()
    last = store.step_of(store.latest_complete(out))
    more = ["schedule.epochs=200", f"schedule.max_steps={last + 4}", "--resume"]
    again = launch(2, *settings(shards, out, "moe.ep_size=2", *more))
    assert again.returncode == 0, again.stderr[-2000:]
    steps = [line["step"] for line in read(out / "journal.jsonl") if line["kind"] == "step"]
    assert steps == list(range(1, last + 5))


def wait_for(condition, process, seconds=120):
    """Until ``condition()``, while ``process`` lives."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.05)


def test_the_doctor_measures_healthy_hosts(cluster, shards, tmp_path):
    run = ["--recipe", "crmoe_vit_micro_fmnist", "--data", str(shards), "--out", str(tmp_path / "run")]
    done = cluster.run("python", "-m", "moe_cl", "doctor", "--hostfile", str(cluster.hostfile), "--json", *run)
    tree = json.loads(done.stdout.strip().splitlines()[-1])
    assert done.returncode == 0 and tree["problems"] == [], done.stdout + done.stderr
    assert [a["facts"]["data"]["samples"] for a in tree["hosts"]] == [96, 96]
    assert tree["links"]["all_reduce_mb_s"] > 0 and tree["links"]["all_to_all_mb_s"] > 0


def test_the_doctor_names_a_host_that_is_not_there(cluster, tmp_path):
    hosts = tmp_path / "hosts"
    hosts.write_text("10.77.0.1 slots=1\n10.77.0.9 slots=1\n")
    done = cluster.run("python", "-m", "moe_cl", "doctor", "--hostfile", str(hosts))
    assert done.returncode == 1
    assert "PROBLEM  10.77.0.9: ssh cannot reach it" in done.stdout
