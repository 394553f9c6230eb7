"""``python -m moe_cl.planning.start LAUNCHER ...``: what a launcher was told is checked before it starts anything.

The scripts of ``launchers/`` call it and read the one line that it prints: RANKS NODES RANKS_HERE NODE_RANK ADDRESS
PORT. What cannot work, or would wait for ever, is one line on stderr and exit code 2.
"""

from __future__ import annotations

import os
import re
import shutil
import socket
import sys
from collections.abc import Sequence
from dataclasses import astuple, dataclass

from moe_cl.config import ConfigError
from moe_cl.planning.hosts import read_hostfile

# Those of DeepSpeed's names whose ranks learn who they are; the program each starts them with, and Debian's package of
# those that the guide names.
MULTINODE = {"pdsh": "pdsh", "openmpi": "ompi_info", "mpich": "", "impi": ""}
PACKAGES = {"pdsh": "pdsh", "openmpi": "openmpi-bin"}


@dataclass(frozen=True)
class Start:
    """``here``: ranks on this machine, the ``node_rank``-th. The ranks meet at ``address``:``port``."""

    ranks: int
    nodes: int
    here: int
    node_rank: int
    address: str
    port: int


def number(name: str, default: int | None, least: int, most: int, advice: str) -> int:
    """A whole number of the environment. Raises ConfigError."""
    text = os.environ.get(name, "")
    if not text and default is not None:
        return default
    if not re.fullmatch("[0-9]{1,9}", text) or not least <= int(text) <= most:
        raise ConfigError(f"{name}={text}: {advice}")
    return int(text)


def port(default: int = 29500) -> int:
    """MASTER_PORT."""
    return number("MASTER_PORT", default, 1, 65535, "a port is a number from 1 to 65535")


def node(nodes: int, default: int | None) -> int:
    """NODE_RANK; a host that does not exist would leave the others waiting."""
    return number(
        "NODE_RANK", default, 0, nodes - 1, f"give each of the {nodes} hosts its own number, from 0 to {nodes - 1}"
    )


def local(ranks: str) -> Start:
    """``local.sh RANKS``."""
    if not re.fullmatch("[0-9]{1,6}", ranks) or not int(ranks):
        raise ConfigError(f"{ranks} ranks: a whole number from 1 is needed")
    return Start(int(ranks), 1, int(ranks), 0, "127.0.0.1", port())


def torchrun() -> Start:
    """``torchrun.sh``: NPROC, NNODES, NODE_RANK, MASTER_ADDR."""
    here = number("NPROC", 1, 1, 9999, "the ranks on this machine, as a whole number (one a device)")
    nodes = number("NNODES", 1, 1, 99999, "a whole number; for fewer or more hosts later, start again with another")
    rank = node(nodes, 0 if nodes == 1 else None)
    address = os.environ.get("MASTER_ADDR", "" if nodes > 1 else "127.0.0.1")
    if not address:
        raise ConfigError(f"NNODES={nodes} needs MASTER_ADDR=HOST, the name of host number 0, on all of them")
    return Start(here * nodes, nodes, here, rank, address, port())


def multinode(path: str) -> Start:
    """``multinode.sh HOSTFILE``: NODE_RANK (without ssh) or LAUNCHER, MASTER_ADDR."""
    hosts = read_hostfile(path)
    slots, first = list(hosts.values()), next(iter(hosts)).rpartition("@")[2]
    rank = node(len(hosts), None) if os.environ.get("NODE_RANK") else 0
    if not os.environ.get("NODE_RANK") and len(hosts) > 1:
        name = os.environ.get("LAUNCHER", "pdsh").lower()
        if name == "slurm":
            raise ConfigError("LAUNCHER=slurm: use sbatch launchers/slurm.sbatch")
        if name not in MULTINODE:
            raise ConfigError(f"LAUNCHER={name}: choose one of {', '.join(MULTINODE)}")
        if MULTINODE[name] and shutil.which(MULTINODE[name]) is None:
            raise ConfigError(
                f"{name} is not installed here (apt-get install {PACKAGES[name]}); without it: NODE_RANK=N on each host"
            )
    here = slots[rank] if os.environ.get("NODE_RANK") else 0  # else this may be no host of the job
    return Start(sum(slots), len(hosts), here, rank, os.environ.get("MASTER_ADDR") or first, port())


def slurm(first: str) -> Start:
    """``slurm.sbatch`` in the batch step: ``first`` is the job's first node, MASTER_SUFFIX what its name gets."""
    env = os.environ
    if env.get("MASTER_ADDR"):
        raise ConfigError(
            f"MASTER_ADDR={env['MASTER_ADDR']}: nobody knows a job's first node before it starts, and a requeue may "
            "bring another; leave it out (MASTER_SUFFIX=-ib adds -ib to the first node's name)"
        )
    address = first + env.get("MASTER_SUFFIX", "")
    try:
        socket.getaddrinfo(address, None)
    except OSError as error:
        raise ConfigError(
            f"{address}, the job's first node, has no address ({error.strerror}): mend MASTER_SUFFIX"
        ) from None
    ranks = number("SLURM_NTASKS", None, 1, 10**6, "give sbatch --ntasks-per-node, one task a device")
    # "8(x4)", or "8,4": the first is this node's.
    here = int(re.match("[0-9]+", env.get("SLURM_TASKS_PER_NODE", str(ranks)))[0])
    if "," in env.get("SLURM_TASKS_PER_NODE", ""):
        raise ConfigError(
            f"the nodes have {env['SLURM_TASKS_PER_NODE']} tasks: give sbatch --nodes and --ntasks-per-node alone"
        )
    nodes = number("SLURM_JOB_NUM_NODES", 1, 1, 10**6, "a whole number")
    return Start(ranks, nodes, here, 0, address, port(20000 + int(env.get("SLURM_JOB_ID", 0)) % 20000))


def check_devices(ranks: int, needed: bool) -> None:
    """One rank a device, where it can be known: this machine's CUDA devices, unless DS_ACCELERATOR is another.

    ``needed``: the machine was asked for, so without a device something was forgotten. Raises ConfigError.
    """
    if os.environ.get("DS_ACCELERATOR", "cuda") != "cuda":
        return
    import torch

    seen, name = torch.cuda.device_count(), socket.gethostname()
    if needed and not seen:
        raise ConfigError(f"no GPU is visible on {name}: give sbatch --gres=gpu:N, or set DS_ACCELERATOR=cpu")
    if 0 < seen < ranks:
        raise ConfigError(
            f"{ranks} ranks, but {seen} devices on {name}: one rank a device; start {seen}, or set DS_ACCELERATOR=cpu"
        )


LAUNCHERS = {"local": local, "torchrun": torchrun, "multinode": multinode, "slurm": slurm}


def main(argv: Sequence[str] | None = None) -> int:
    """LAUNCHER and its arguments; see the module's docstring."""
    launcher, *rest = list(sys.argv[1:] if argv is None else argv)
    try:
        start = LAUNCHERS[launcher](*rest)
        if not re.fullmatch(r"[\w.:-]+", start.address):
            raise ConfigError(f"MASTER_ADDR={start.address}: the name or address of one host is needed")
        # With --gpus-per-task Slurm itself gives every task a device.
        if not os.environ.get("SLURM_GPUS_PER_TASK"):
            check_devices(start.here, needed=launcher == "slurm")
    except ConfigError as error:
        print(f"moe_cl: {error}", file=sys.stderr)
        return 2
    print(*astuple(start))
    return 0


if __name__ == "__main__":
    sys.exit(main())
