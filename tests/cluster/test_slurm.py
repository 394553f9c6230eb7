"""A real two-node Slurm: the job is signalled before its limit, saves, goes back into the queue and continues.

Then one node continues it, and the launcher of one machine makes the same run in one piece.
"""

import os
import re
import shlex
import subprocess

import pytest

from moe_cl import config
from moe_cl.engine.checkpoint import store
from tests.cluster.conftest import HERE, need, steps, until
from tests.guide import DOCS
from tests.pool import free_port
from tests.small import ENV, ROOT, settings
from tests.test_launchers import script

pytestmark = pytest.mark.cluster
LONG = ("schedule.epochs=5000", "checkpoint.every_steps=100000")  # what saves in between is the signals
CPUS = min(2, os.cpu_count())  # of each node


@pytest.fixture(scope="module")
def slurm(cluster):
    need({"slurmctld": "slurm-wlm", "munged": "munge"})
    up = subprocess.run([HERE / "slurm.sh", "up", cluster.folder], capture_output=True, text=True)
    assert up.returncode == 0, up.stderr
    env = {**cluster.env, "SLURM_CONF": str(cluster.folder / "slurm" / "slurm.conf")}
    yield {**env, "MASTER_PORT": str(free_port()), "MASTER_SUFFIX": "-net"}
    subprocess.run(["scancel", "--user=root"], env={**os.environ, "SLURM_CONF": env["SLURM_CONF"]})
    subprocess.run([HERE / "slurm.sh", "down", cluster.folder])


def test_the_guides_doctor_sees_every_node(slurm, shards, tmp_path):
    (line,) = re.findall(r"^ +(srun .* -m moe_cl doctor .*)$", (DOCS / "cluster.md").read_text(), re.M)
    given = {
        "--nodes 4": "--nodes 2",
        "--gres=gpu:8": "",
        "--cpus-per-task=12": f"--cpus-per-task={CPUS}",
        "runs/crmoe300": str(tmp_path),
    }
    for theirs, ours in {**given, "/data/imagenet/train": str(shards)}.items():
        assert theirs in line
        line = line.replace(theirs, ours)
    done = subprocess.run(shlex.split(line), cwd=ROOT, env=slurm, capture_output=True, text=True, timeout=150)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "0: all well" in done.stdout and "1: all well" in done.stdout, done.stdout + done.stderr


def test_signalled_saved_requeued_continued_on_one_node(cluster, slurm, shards, tmp_path):
    out, log, recipe = tmp_path / "run", tmp_path / "log", tmp_path / "recipe.yaml"
    # The recipe alone says where to: the job must find the mark of its requeue all the same.
    recipe.write_text(f"{config.recipe_path('crmoe_vit_micro_fmnist').read_text()}\nout: {out}\n")

    def ask(*command):
        done = subprocess.run(command, cwd=ROOT, env=slurm, capture_output=True, text=True, timeout=60)
        assert done.returncode == 0, done.stderr
        return done.stdout.strip()

    def submit(nodes, *more):
        run = settings(shards, out, *LONG, *more)
        assert run[:4] == ["--recipe", "crmoe_vit_micro_fmnist", "--out", str(out)]
        run[:4] = ["--recipe", str(recipe)]
        return ask(
            "sbatch", "--parsable", f"--nodes={nodes}", "--ntasks-per-node=1", f"--cpus-per-task={CPUS}", "--time=2",
            "--signal=USR1@60", f"--output={log}", "launchers/slurm.sbatch", *run,
        )  # fmt: skip

    def gone(job):
        until(lambda: not ask("squeue", "-h", "-j", job), 200, "the job to end", log)

    said = lambda text: log.exists() and text in log.read_text()  # noqa: E731
    job = submit(2, "moe.ep_size=2")
    until(lambda: said("back into the queue"), 200, "the signal before the limit, a save and a requeue", log)
    first = len(steps(out))
    assert first > 0 and "KILLED" in (out / "journal.jsonl").read_text()
    until(lambda: len(steps(out)) > first + 3, 150, "the requeued job to go on", log)
    assert "Restarts=1" in ask("scontrol", "show", "job", job)
    ranks = [pid for host in (1, 2) for pid in cluster.ranks(host)]
    # Every rank has all cores of its task, for its loading processes.
    assert len(ranks) == 2 and all(len(os.sched_getaffinity(pid)) == CPUS for pid in ranks)
    assert all(b"MASTER_ADDR=h1-net" in open(f"/proc/{pid}/environ", "rb").read() for pid in ranks)
    ask("scancel", job)
    gone(job)
    # Nothing lost, nothing repeated: each step once, and every step's samples and loss are those of a straight run.
    two = steps(out)
    assert [line["step"] for line in two] == list(range(1, len(two) + 1))
    last = store.step_of(store.latest_complete(out))
    assert last == len(two)  # also scancel leaves the time to save
    gone(submit(1, "moe.ep_size=1", f"schedule.max_steps={last + 4}"))
    lines, whole = steps(out), tmp_path / "whole"
    assert [line["step"] for line in lines] == list(range(1, last + 5)), log.read_text()[-3000:]
    straight = script(
        "launchers/local.sh", "2",
        *settings(shards, whole, *LONG, "moe.ep_size=2", f"schedule.max_steps={last + 4}"),
        env={**ENV, "MASTER_PORT": str(free_port())}, timeout=400,
    )  # fmt: skip
    assert straight.returncode == 0, straight.stderr[-2000:]
    theirs = steps(whole)
    assert [line["samples"] for line in lines] == [line["samples"] for line in theirs]
    for mine, other in zip(two, theirs, strict=False):
        assert (mine["samples"], mine["values"]["loss"]) == (other["samples"], other["values"]["loss"])
