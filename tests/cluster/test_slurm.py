"""A real two-node Slurm: the job is signalled before its limit, saves, goes back into the queue and continues."""

import os
import shutil
import subprocess
import time

import pytest

from moe_cl.tracking.journal import read
from tests.cluster.conftest import HERE, install
from tests.pool import free_port
from tests.small import ROOT, settings

pytestmark = pytest.mark.cluster


@pytest.fixture(scope="module")
def slurm(cluster):
    if why := install({"slurmctld": "slurm-wlm", "munged": "munge"}):
        pytest.skip(why)
    up = subprocess.run([HERE / "slurm.sh", "up", cluster.folder], capture_output=True, text=True)
    assert up.returncode == 0, up.stderr
    env = {**cluster.env, "SLURM_CONF": str(cluster.folder / "slurm" / "slurm.conf"), "MASTER_ADDR": "10.77.0.1"}
    yield {**env, "MASTER_PORT": str(free_port())}
    subprocess.run(["scancel", "--user=root"], env={**os.environ, "SLURM_CONF": env["SLURM_CONF"]})
    subprocess.run([HERE / "slurm.sh", "down", cluster.folder])


def steps(out):
    return [line for line in read(out / "journal.jsonl") if line["kind"] == "step"]


def until(condition, seconds, what, log):
    deadline = time.monotonic() + seconds
    while not condition():
        said = log.read_text()[-3000:] if log.exists() else "(no log yet)"
        assert time.monotonic() < deadline, f"{what} within {seconds} s; the job's log:\n{said}"
        time.sleep(0.2)


def test_signalled_saved_requeued_continued(slurm, shards, tmp_path):
    assert shutil.which("sbatch")
    out, log = tmp_path / "run", tmp_path / "log"

    def ask(*command):
        done = subprocess.run(command, cwd=ROOT, env=slurm, capture_output=True, text=True, timeout=60)
        assert done.returncode == 0, done.stderr
        return done.stdout.strip()

    job = ask(
        "sbatch", "--parsable", "--nodes=2", "--ntasks-per-node=1", "--cpus-per-task=1", "--time=2", "--signal=USR1@60",
        f"--output={log}", "launchers/slurm.sbatch",
        *settings(shards, out, "moe.ep_size=2", "schedule.epochs=5000", "checkpoint.every_steps=100000"),
    )  # fmt: skip
    said = lambda text: log.exists() and text in log.read_text()  # noqa: E731
    until(lambda: said("back into the queue"), 150, "the signal before the limit, a save and a requeue", log)
    first = len(steps(out))
    assert first > 0 and "KILLED" in (out / "journal.jsonl").read_text()
    until(lambda: len(steps(out)) > first + 3, 90, "the requeued job to go on", log)
    assert "Restarts=1" in ask("scontrol", "show", "job", job)
    ask("scancel", job)
    until(lambda: not ask("squeue", "-h", "-j", job), 60, "the job to end", log)
    # Nothing lost, nothing repeated: as many steps, each once, and every step's samples are those of a straight run.
    lines = steps(out)
    assert [line["step"] for line in lines] == list(range(1, len(lines) + 1))
    whole = tmp_path / "whole"
    straight = subprocess.run(
        ["deepspeed", "--num_accelerators", "2", "--master_port", str(free_port()), "--module", "moe_cl", "pretrain",
         *settings(shards, whole, "moe.ep_size=2", "schedule.epochs=5000", f"schedule.max_steps={first + 3}")],
        cwd=ROOT, env=slurm, capture_output=True, text=True, timeout=200,
    )  # fmt: skip
    assert straight.returncode == 0, straight.stderr[-2000:]
    for mine, theirs in zip(lines, steps(whole), strict=False):
        assert (mine["samples"], mine["values"]["loss"]) == (theirs["samples"], theirs["values"]["loss"])
