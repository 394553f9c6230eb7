"""The scripts: wrong options are one line and exit code 2, before anything is installed, started or written."""

import re
import socket
import subprocess
import sys

import pytest
import torch

from moe_cl.config import ConfigError
from moe_cl.engine.ranks import Ranks, device_index, from_environment, pins
from tests.small import ENV, ROOT, make_shards, only_launcher, settings

SRUN = {"SLURM_PROCID": "5", "SLURM_NTASKS": "16", "SLURM_LOCALID": "1", "SLURM_NTASKS_PER_NODE": "4"}
OPEN_MPI = {"OMPI_COMM_WORLD_RANK": "2", "OMPI_COMM_WORLD_SIZE": "4", "OMPI_COMM_WORLD_LOCAL_RANK": "2",
            "OMPI_COMM_WORLD_LOCAL_SIZE": "4"}  # fmt: skip


def script(*words, env=ENV, timeout=120):
    return subprocess.run(["bash", *words], cwd=ROOT, env=env, capture_output=True, text=True, timeout=timeout)


@pytest.mark.parametrize(
    "name", sorted(p.name for p in (ROOT / "launchers").glob("*") if p.suffix in (".sh", ".sbatch"))
)
def test_the_shell_can_read_it(name):
    assert script("-n", f"launchers/{name}").returncode == 0


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["launchers/quickstart.sh", "--epoch", "3"], "quickstart: unknown option --epoch (see --help)"),
        (["launchers/quickstart.sh", "--out"], "quickstart: --out needs a value"),
        (["launchers/quickstart.sh", "--data=imagenet"], "--data is fashion-mnist or digits, not 'imagenet'"),
        (["launchers/quickstart.sh", "--data", "imagenet"], "--data is fashion-mnist or digits, not 'imagenet'"),
        (["launchers/local.sh", "2", "--recipe", "crmoe_vit_mikro_fmnist"], "did you mean crmoe_vit_micro_fmnist?"),
        (["launchers/local.sh", "3", "--recipe", "crmoe_vit_micro_fmnist"], "does not divide the 3 ranks"),
        (["launchers/local.sh"], "bash launchers/local.sh N --recipe NAME"),
        (["launchers/multinode.sh", "no-such-file"], "bash launchers/multinode.sh HOSTFILE"),
        (["NODE_RANK=0", "launchers/multinode.sh", "launchers/hostfile.example", "--recipe", "nope"], "recipe 'nope'"),
        (["NODE_RANK=7", "launchers/multinode.sh", "launchers/hostfile.example"], "NODE_RANK=7: give each of the 2"),
        (["MASTER_PORT=abc", "launchers/local.sh", "1", "--recipe", "nope"], "MASTER_PORT=abc: a port is a number"),
        (["NPROC=4.5", "launchers/torchrun.sh", "--recipe", "nope"], "NPROC=4.5: the ranks on this machine"),
        (["launchers/slurm.sbatch", "--recipe", "nope"], "usage: sbatch launchers/slurm.sbatch"),
        (
            ["SLURM_JOB_ID=1", "SLURM_SUBMIT_DIR=/tmp", "launchers/slurm.sbatch", "--recipe", "nope"],
            "slurm.sbatch: /tmp is not the checkout: cd to it",
        ),
        (["launchers/torchrun.sh"], "bash launchers/torchrun.sh --recipe NAME"),
        (["launchers/torchrun.sh", "--recipe", "nope"], "unknown recipe 'nope'"),
    ],
)
def test_wrong_options(words, says):
    given = dict(word.split("=") for word in words if re.match("[A-Z_]+=", word))
    done = script(*words[len(given) :], env={**ENV, **given})
    assert done.returncode == 2 and says in done.stderr and "Traceback" not in done.stderr
    assert "spawned" not in done.stdout


def bare(folder, functions):
    """The environment of a script in a checkout in ``folder``, with shell functions in place of programs."""
    for name in ("launchers", "requirements.txt", ".venv"):
        (folder / name).symlink_to(ROOT / name)
    (folder / "functions").write_text(functions)
    return {k: v for k, v in ENV.items() if k != "OMP_NUM_THREADS"} | {"BASH_ENV": str(folder / "functions")}


def test_a_slurm_job_of_many_nodes_goes_back_into_the_queue(tmp_path):
    """Its list of nodes is longer than a pipe holds; the mark of the requeue lies where all nodes see it."""
    env = bare(
        tmp_path,
        """
        scontrol() { if [ "$1" = show ]; then seq -f n%g 200000; else echo "scontrol $*"; fi; }
        python() { [ "$2" != moe_cl.planning.start ] || echo "1 1 1 0 $4 29500"; }
        srun() {
          echo "$MASTER_ADDR $MOE_CL_REQUEUE_FILE"
          [ -e "$MOE_CL_REQUEUE_FILE" ] || echo mark >"$MOE_CL_REQUEUE_FILE"
        }
        """,
    )
    left = tmp_path / ".requeue-7"
    left.write_text("")  # by a start that was killed
    job = {"SLURM_JOB_ID": "7", "SLURM_SUBMIT_DIR": str(tmp_path), "SLURM_JOB_NODELIST": "n[1-200000]"}
    done = script(str(tmp_path / "launchers" / "slurm.sbatch"), "--recipe", "x", env={**env, **job})
    assert done.returncode == 0, done.stderr
    said = done.stdout.splitlines()
    assert said[0] == f"n1 {left}" and said[-1] == "scontrol requeue 7" and not left.exists()


@pytest.mark.parametrize(("given", "threads"), [({}, 4), ({"NPROC": "16"}, 1), ({"OMP_NUM_THREADS": "2"}, 2)])
def test_ranks_of_torchrun_share_the_cores(tmp_path, given, threads):
    functions = "nproc() { echo 12; }; exec() { echo $OMP_NUM_THREADS $1; }"
    functions += '; python() { [ "$2" != moe_cl.planning.start ] || echo "$NPROC 1 $NPROC 0 127.0.0.1 29500"; }'
    env = {**bare(tmp_path, functions), "NPROC": "3", **given}
    done = script(str(tmp_path / "launchers" / "torchrun.sh"), "--recipe", "x", env=env)
    assert done.stdout.strip() == f"{threads} torchrun", done.stderr


def test_no_compiler_and_no_python_are_one_line(tmp_path):
    for program in ("bash", "dirname", "cat", "sha256sum", "cut", "sed"):
        (tmp_path / program).symlink_to(subprocess.check_output(["which", program], text=True).strip())
    bare = {"PATH": str(tmp_path), "HOME": str(tmp_path)}
    done = script("launchers/quickstart.sh", env=bare)
    assert done.returncode == 2 and done.stderr.strip().startswith("no Python 3.11 or newer found")
    (tmp_path / "python3.11").symlink_to(ROOT / ".venv" / "bin" / "python")
    done = script("launchers/quickstart.sh", env=bare)
    assert done.returncode == 2 and done.stderr.strip().startswith("no g++ found")


@pytest.mark.parametrize(
    ("given", "ranks"),
    [
        ({}, Ranks(0, 0, 1, 1)),
        ({"RANK": "3", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2"}, Ranks(3, 1, 8, 2)),
        ({"RANK": "3", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "LOCAL_SIZE": "4"}, Ranks(3, 1, 8, 4)),  # DeepSpeed's name
        ({**SRUN, "SLURM_STEP_ID": "0"}, Ranks(5, 1, 16, 4)),
        (SRUN, Ranks(0, 0, 1, 1)),  # inside an allocation, but not started by srun
        (OPEN_MPI, Ranks(2, 2, 4, 4)),
        ({"RANK": "0", "WORLD_SIZE": "2", **SRUN, "SLURM_STEP_ID": "0", **OPEN_MPI}, Ranks(0, 0, 2, 2)),
        ({**SRUN, "SLURM_STEP_ID": "0", **OPEN_MPI}, Ranks(5, 1, 16, 4)),
        ({"RANK": "0"}, Ranks(0, 0, 1, 1)),
    ],
)
def test_ranks_come_from_the_launcher_that_started_it(given, ranks, monkeypatch):
    only_launcher(given, monkeypatch)
    assert from_environment() == ranks


@pytest.mark.processes
def test_a_port_in_use_is_one_line(tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        who = {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(taken.getsockname()[1])}
        run = settings(make_shards(tmp_path), tmp_path / "run", "moe.ep_size=2", "engine.collective_timeout=20")
        command = [sys.executable, "-m", "moe_cl", "pretrain", *run]
        done = subprocess.run(command, cwd=ROOT, env={**ENV, **who}, capture_output=True, text=True, timeout=200)
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert f"moe_cl: port {who['MASTER_PORT']} is in use on {socket.gethostname()}" in done.stderr


def test_batches_are_pinned_for_the_ranks_own_device(monkeypatch):
    chosen = []
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    assert not pins(Ranks(5, 1, 8, 4)) and chosen == []
    monkeypatch.delenv("DS_ACCELERATOR")
    for seen, device in ((4, 1), (1, 0)):  # Slurm's --gpus-per-task=1 shows each task its own device alone
        monkeypatch.setattr(torch.cuda, "device_count", lambda seen=seen: seen)
        assert pins(Ranks(5, 1, 8, 4)) and chosen.pop() == device
    with pytest.raises(ConfigError, match="rank 5 is number 3 of .*, which has 2 devices: one rank a device"):
        device_index(Ranks(5, 3, 8, 4), 2)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert not pins(Ranks(5, 1, 8, 4))
