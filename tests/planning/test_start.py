"""What launchers are told by their environment: checked before anything starts, one line each."""

import os

import pytest
import torch

from moe_cl.planning import start

NAMES = ("NPROC", "NNODES", "NODE_RANK", "MASTER_ADDR", "MASTER_PORT", "MASTER_SUFFIX", "LAUNCHER")
JOB = {"SLURM_JOB_ID": "40007", "SLURM_NTASKS": "32", "SLURM_TASKS_PER_NODE": "8(x4)", "SLURM_JOB_NUM_NODES": "4"}


@pytest.fixture
def say(monkeypatch, capsys, tmp_path):
    """``say({variable: value}, launcher, ...)`` -> what is printed, or the one line of exit code 2."""
    for name in list(os.environ):
        if name in NAMES or name.startswith("SLURM_"):
            monkeypatch.delenv(name)
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    monkeypatch.chdir(tmp_path)

    def call(environment, *words):
        with monkeypatch.context() as patch:
            for name, value in environment.items():
                patch.setenv(name, value) if value is not None else patch.delenv(name)
            code = start.main(words)
        out, err = capsys.readouterr()
        said = out or err
        assert said.count("\n") == 1 and code == (0 if out else 2) and not (out and err)
        return said.strip()

    return call


@pytest.mark.parametrize(
    ("given", "launcher", "said"),
    [
        ({}, ["local", "8"], "8 1 8 0 127.0.0.1 29500"),
        ({"MASTER_PORT": "29501"}, ["local", "08"], "8 1 8 0 127.0.0.1 29501"),
        ({}, ["torchrun"], "1 1 1 0 127.0.0.1 29500"),
        ({"NPROC": "08"}, ["torchrun"], "8 1 8 0 127.0.0.1 29500"),
        ({"NPROC": "8", "NNODES": "2", "NODE_RANK": "1", "MASTER_ADDR": "n1"}, ["torchrun"], "16 2 8 1 n1 29500"),
        ({"NODE_RANK": "1"}, ["multinode", "hosts"], "12 2 4 1 n1 29500"),
        ({"NODE_RANK": "0", "MASTER_ADDR": "n1-ib"}, ["multinode", "hosts"], "12 2 8 0 n1-ib 29500"),
        (JOB, ["slurm", "localhost"], "32 4 8 0 localhost 20007"),
        ({**JOB, "MASTER_SUFFIX": ".1"}, ["slurm", "127.0.0"], "32 4 8 0 127.0.0.1 20007"),
    ],
)
def test_what_the_scripts_read(say, tmp_path, given, launcher, said):
    (tmp_path / "hosts").write_text(
        "# first\nme@n1\tslots=8\t# with a comment\n\t# and another\nn2 slots=4 max_slots=4\n"
    )
    assert say(given, *launcher) == said


HOSTFILES = {"one": ["n1 slots=8"], "hosts": ["n1 slots=8", "n2 slots=4"], "twice": ["n1 slots=1", "n1 slots=1"],
             "none": ["n1 slots=0"], "negative": ["n1 slots=-1"], "marked": ["\ufeffn1 slots=1"]}  # fmt: skip
TWO = {"NNODES": "2", "MASTER_ADDR": "n1"}


@pytest.mark.parametrize(
    ("given", "launcher", "said"),
    [
        ({}, ["local", "0"], "0 ranks: a whole number"),
        ({"MASTER_PORT": "abc"}, ["local", "2"], "MASTER_PORT=abc: a port is a number from 1 to 65535"),
        ({"MASTER_PORT": "70000"}, ["torchrun"], "MASTER_PORT=70000: a port"),
        ({"NPROC": "4.5"}, ["torchrun"], "NPROC=4.5: the ranks on this machine, as a whole number"),
        ({"NPROC": "gpu"}, ["torchrun"], "NPROC=gpu: "),
        ({"NPROC": "auto"}, ["torchrun"], "NPROC=auto: "),
        ({"NPROC": "0"}, ["torchrun"], "NPROC=0: "),
        ({"NNODES": "1:4"}, ["torchrun"], "NNODES=1:4: a whole number"),
        ({**TWO, "NODE_RANK": "3"}, ["torchrun"], "NODE_RANK=3: give each of the 2 hosts its own number, from 0 to 1"),
        (TWO, ["torchrun"], "NODE_RANK=: give each"),
        ({"NNODES": "2", "NODE_RANK": "1"}, ["torchrun"], "NNODES=2 needs MASTER_ADDR=HOST"),
        ({**TWO, "NODE_RANK": "0", "MASTER_ADDR": "n1 n2"}, ["torchrun"], "MASTER_ADDR=n1 n2: the name"),
        ({"NODE_RANK": "7"}, ["multinode", "one"], "NODE_RANK=7: give each of the 1 hosts"),
        ({"NODE_RANK": "abc"}, ["multinode", "hosts"], "NODE_RANK=abc: give each of the 2 hosts"),
        ({"LAUNCHER": "ssh"}, ["multinode", "hosts"], "LAUNCHER=ssh: choose one of pdsh, openmpi"),
        ({"LAUNCHER": "mvapich"}, ["multinode", "hosts"], "LAUNCHER=mvapich: choose one of pdsh, openmpi"),
        ({"LAUNCHER": "slurm"}, ["multinode", "hosts"], "use sbatch launchers/slurm.sbatch"),
        ({"PATH": "/nowhere"}, ["multinode", "hosts"], "pdsh is not installed here (apt-get install pdsh)"),
        ({"NODE_RANK": "0"}, ["multinode", "twice"], "line 2: n1 stands there twice"),
        ({"NODE_RANK": "0"}, ["multinode", "none"], "line 1: write it as 'HOST slots=N'"),
        ({"NODE_RANK": "0"}, ["multinode", "negative"], "line 1: write it as 'HOST slots=N'"),
        ({"NODE_RANK": "0"}, ["multinode", "marked"], "byte-order mark"),
        ({**JOB, "MASTER_ADDR": "n1-ib"}, ["slurm", "localhost"], "(MASTER_SUFFIX=-ib adds -ib to the first node's"),
        ({**JOB, "MASTER_SUFFIX": "-ib.invalid"}, ["slurm", "n1"], "n1-ib.invalid, the job's first node, has no addr"),
        ({**JOB, "SLURM_TASKS_PER_NODE": "8(x3),4"}, ["slurm", "localhost"], "the nodes have 8(x3),4 tasks"),
        ({"SLURM_JOB_ID": "1"}, ["slurm", "localhost"], "give sbatch --ntasks-per-node"),
    ],
)
def test_what_cannot_work_is_one_line(say, tmp_path, given, launcher, said):
    for name, lines in HOSTFILES.items():
        (tmp_path / name).write_text("\n".join(lines))
    line = say(given, *launcher)
    assert line.startswith("moe_cl: ") and said in line


def test_one_rank_a_device(say, monkeypatch):
    gpus = lambda count: monkeypatch.setattr(torch.cuda, "device_count", lambda: count)  # noqa: E731
    gpus(4)
    assert "8 ranks, but 4 devices on" in say({"DS_ACCELERATOR": "cuda"}, "local", "8")
    assert "8 ranks, but 4 devices on" in say({**JOB, "DS_ACCELERATOR": None}, "slurm", "localhost")
    assert say({"NPROC": "4", "DS_ACCELERATOR": None}, "torchrun").startswith("4 1 4")
    gpus(1)  # of tasks that have a device each, the batch step may see one alone
    assert say({**JOB, "DS_ACCELERATOR": None, "SLURM_GPUS_PER_TASK": "1"}, "slurm", "localhost").startswith("32 4 8")
    gpus(0)
    assert "no GPU is visible" in say({**JOB, "DS_ACCELERATOR": None}, "slurm", "localhost")
    assert say({"DS_ACCELERATOR": None}, "local", "2").startswith("2 1 2")  # a machine without one trains on its CPU
    assert say(JOB, "slurm", "localhost").startswith("32 4 8")
