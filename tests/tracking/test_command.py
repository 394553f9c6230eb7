"""The command to reproduce starts as many ranks as ran. The launchers' variables are as they set them; real starts
through DeepSpeed's launcher and torchrun are in tests/test_pretrain.py and below."""

import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from moe_cl.tracking.command import command
from tests.pool import free_port
from tests.small import ENV, ROOT

PYTHON = Path(sys.executable).name
DEEPSPEED = {"WORLD_SIZE": "2", "RANK": "0", "LOCAL_RANK": "0", "LOCAL_SIZE": "2", "CROSS_RANK": "0", "CROSS_SIZE": "1"}
ELASTIC = {"TORCHELASTIC_RUN_ID": "none", "WORLD_SIZE": "16", "LOCAL_WORLD_SIZE": "8", "GROUP_WORLD_SIZE": "2"}
ELASTIC |= {"MASTER_ADDR": "node7", "MASTER_PORT": "29501"}
SLURM = {"SLURM_STEP_ID": "0", "SLURM_PROCID": "0", "SLURM_NTASKS": "16", "SLURM_STEP_NUM_NODES": "4"}
OPEN_MPI = {"OMPI_COMM_WORLD_SIZE": "4", "OMPI_COMM_WORLD_LOCAL_SIZE": "2", "MASTER_ADDR": "a", "MASTER_PORT": "1"}
FIRST = 'MASTER_ADDR="$(scontrol show hostnames | head -n 1)" srun --nodes 4 --ntasks 16 --ntasks-per-node 4'


@pytest.fixture
def started(monkeypatch):
    """Sets what a launcher leaves: its variables and ``sys.argv``."""

    def by(env, *argv):
        for name in list(os.environ):
            if name.startswith(("SLURM_", "OMPI_", "CROSS_", "TORCHELASTIC_", "MASTER_", "GROUP_")):
                monkeypatch.delenv(name)
        for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_SIZE", "LOCAL_WORLD_SIZE", "DS_ACCELERATOR"):
            monkeypatch.delenv(name, raising=False)
        for name, value in env.items():
            monkeypatch.setenv(name, value)
        monkeypatch.setattr(sys, "argv", ["/x/moe_cl/__main__.py", *argv])

    return by


@pytest.mark.parametrize(
    ("env", "expected"),
    [
        ({}, f"{PYTHON} -m moe_cl pretrain seed=1"),
        ({"DS_ACCELERATOR": "cpu"}, f"DS_ACCELERATOR=cpu {PYTHON} -m moe_cl pretrain seed=1"),
        ({"WORLD_SIZE": "1", "RANK": "0"}, f"{PYTHON} -m moe_cl pretrain seed=1"),
        ({"WORLD_SIZE": "2", "RANK": "0"}, "torchrun --nproc-per-node 2 -m moe_cl pretrain seed=1"),
        (DEEPSPEED, "deepspeed --num_accelerators 2 --module moe_cl pretrain seed=1"),
        (
            DEEPSPEED | {"WORLD_SIZE": "8", "LOCAL_SIZE": "4", "CROSS_SIZE": "2"},
            "deepspeed --hostfile HOSTFILE --module moe_cl pretrain seed=1  # HOSTFILE: 2 hosts, slots=4 each",
        ),
        (
            ELASTIC,
            "torchrun --nnodes 2 --node-rank NUMBER --nproc-per-node 8 --master-addr node7 --master-port 29501 "
            "-m moe_cl pretrain seed=1  # on each host, NUMBER from 0 to 1",
        ),
        (
            {**SLURM, "RANK": "0", "WORLD_SIZE": "16"},
            f"{FIRST} {PYTHON} -m moe_cl pretrain seed=1  # inside an allocation",
        ),
        ({**SLURM, "SLURM_NTASKS": "1", "SLURM_STEP_NUM_NODES": "1"}, f"{PYTHON} -m moe_cl pretrain seed=1"),
        (
            OPEN_MPI,
            "MASTER_ADDR=a MASTER_PORT=1 mpirun -n 4 --map-by ppr:2:node --bind-to none -x MASTER_ADDR -x MASTER_PORT "
            f"{PYTHON} -m moe_cl pretrain seed=1",
        ),
    ],
)  # fmt: skip
def test_by_launcher(started, env, expected):
    started(env, "pretrain", "seed=1")
    assert command() == expected


def test_arguments(started):
    for first in (["--local_rank=0"], ["--local-rank", "0"]):
        started(DEEPSPEED, *first, "pretrain", "--resume", "resume=true", "track.uri=http://me:p'w@host:5000", "a=b c")
        words = shlex.split(command())
        assert words[4:] == ["moe_cl", "pretrain", "track.uri=http://***@host:5000", "a=b c"]
        assert "--resume" in command(resumed=True) and "local" not in command(resumed=True)


@pytest.mark.processes
def test_torchrun_really(tmp_path):
    """Two ranks as torchrun starts them."""
    script = tmp_path / "says.py"
    script.write_text("import os\nfrom moe_cl.tracking.command import command\nprint(os.environ['RANK'], command())\n")
    env = {**ENV, "PYTHONPATH": str(ROOT)}
    words = ["torchrun", "--nproc-per-node", "2", str(script), "seed=1"]
    done = subprocess.run(
        [*words[:1], "--master-port", str(free_port()), *words[1:]],
        env=env,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert sorted(done.stdout.splitlines()) == [f"{rank} DS_ACCELERATOR=cpu {shlex.join(words)}" for rank in (0, 1)]
