"""Who this process is among the ranks, and the process group between them."""

from __future__ import annotations

import contextlib
import logging
import os
import re
import socket
import sys
import warnings
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

from moe_cl.arguments import sources
from moe_cl.comm import Comm, DistComm
from moe_cl.config import ConfigError
from moe_cl.typed import OneRanksError


@dataclass(frozen=True)
class Ranks:
    """rank in [0, world), local_rank on this host, local_world ranks on this host."""

    rank: int = 0
    local_rank: int = 0
    world: int = 1
    local_world: int = 1


def from_environment() -> Ranks:
    """RANK/WORLD_SIZE, else SLURM_*, else OMPI_*, else one process.

    Raises OneRanksError on half a set (unless the half says one process), and on numbers that no launcher gives.
    """
    for rank, world, local, local_world in sources():
        given = [name for name in (rank, world) if name in os.environ]
        if not given:
            continue
        me, size = _number(rank, 0), _number(world, 1, least=1)
        if len(given) == 1:
            if (me, size) == (0, 1):
                continue
            other = world if given == [rank] else rank
            raise OneRanksError(f"{given[0]}={os.environ[given[0]]} is set and {other} is not: set both, or neither")
        if me >= size:
            raise OneRanksError(f"{rank}={me} must be below {world}={size}: ranks count from 0")
        here = _number(local, 0)
        there = _number(local_world if os.environ.get(local_world) else "LOCAL_SIZE", size, least=1)
        if here >= there:
            if rank == "RANK":
                raise OneRanksError(f"{local}={here} must be below the {there} ranks of a host ({local_world})")
            there = here + 1  # what a job asked for a host; a step of it may be another
        return Ranks(me, here, size, there)
    return Ranks()


def _number(name: str, default: int, least: int = 0) -> int:
    """A variable of the environment; ``default`` where it is not set, or empty. Raises OneRanksError."""
    text = os.environ.get(name) or str(default)
    if not re.fullmatch("[0-9]{1,9}", text) or int(text) < least:
        raise OneRanksError(f"{name}={text!r} must be a whole number of at least {least}")
    return int(text)


def threads(comm: Comm) -> int:
    """This rank's share of torch's threads here: all of them if its cores are its own (srun and mpirun bind ranks to
    some), else what is left where ranks of this host share cores. ``OMP_NUM_THREADS`` is meant for each rank."""
    import torch

    cores = _cores()
    shared = Counter(core for host, theirs in comm.gather_objects((socket.gethostname(), cores)) for core in theirs
                     if host == socket.gethostname())  # fmt: skip
    if os.environ.get("OMP_NUM_THREADS"):
        return torch.get_num_threads()
    own = sum(1 / max(1, shared[core]) for core in cores)
    return max(1, int(torch.get_num_threads() * own / len(cores) + 1e-6))


def _cores() -> list[int]:
    """Those that this process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return sorted(os.sched_getaffinity(0))
    return list(range(os.cpu_count() or 1))


def pins(ranks: Ranks) -> bool:
    """Whether batches should be pinned, so that their copies do not wait: this rank has a CUDA device, chosen here.

    Before the loader starts: torch's pinning thread works on the device of the thread that started it, so every rank
    of a node would hold a context on the first one.
    """
    import torch

    if os.environ.get("DS_ACCELERATOR", "cuda") != "cuda" or not torch.cuda.is_available():
        return False
    torch.cuda.set_device(device_index(ranks, torch.cuda.device_count()))
    return True


def device_index(ranks: Ranks, seen: int) -> int:
    """Which of the ``seen`` devices is this rank's: the one of its number on this host. Raises OneRanksError.

    A rank that sees a single one has that, whatever its number: Slurm's ``--gpus-per-task=1`` hides the others.
    """
    if seen > 1 and ranks.local_rank >= seen:
        raise OneRanksError(
            f"rank {ranks.rank} is number {ranks.local_rank} of {socket.gethostname()}, which has {seen} devices: one "
            "rank a device; start fewer ranks"
        )
    return 0 if seen == 1 else ranks.local_rank


def init(ranks: Ranks, timeout: float) -> Comm:
    """Join the process group (gloo on the CPU accelerator, else the accelerator's own) with one collective time-out."""
    # Compiled parts of DeepSpeed (GPU) belong to this installation: two sharing a cache compile over each other.
    os.environ.setdefault("TORCH_EXTENSIONS_DIR", str(Path(sys.prefix) / "torch_extensions"))
    with quiet():
        import deepspeed
        from deepspeed.accelerator import get_accelerator
        from torch.distributed import distributed_c10d

    os.environ.setdefault("MASTER_ADDR", "127.0.0.1")
    if ranks.world == 1 and "MASTER_PORT" not in os.environ:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            os.environ["MASTER_PORT"] = str(probe.getsockname()[1])
    os.environ.setdefault("MASTER_PORT", "29500")
    accelerator = get_accelerator()
    on_cpu = accelerator.device_name() == "cpu"
    # For DeepSpeed and for Comm, LOCAL_RANK is the number of the device.
    local = ranks.local_rank if on_cpu else device_index(ranks, accelerator.device_count())
    os.environ.update(RANK=str(ranks.rank), WORLD_SIZE=str(ranks.world), LOCAL_RANK=str(local))
    if not on_cpu:
        accelerator.set_device(local)
    if on_cpu:
        leave_out_shm_op()
    # Groups made later (DeepSpeed's expert and data-parallel ones) take this default, not the world's own time-out.
    distributed_c10d.default_pg_timeout = distributed_c10d.default_pg_nccl_timeout = timedelta(seconds=timeout)
    with quiet(), _port_taken_is_one_line():
        deepspeed.init_distributed(
            dist_backend="gloo" if on_cpu else accelerator.communication_backend_name(),
            auto_mpi_discovery=False,
            verbose=False,
            timeout=timedelta(seconds=timeout),
        )
    return DistComm()


@contextlib.contextmanager
def _port_taken_is_one_line() -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:
        if "EADDRINUSE" not in str(error) and "address already in use" not in str(error).lower():
            raise
        port, host = os.environ["MASTER_PORT"], socket.gethostname()
        raise ConfigError(f"port {port} is in use on {host}: set MASTER_PORT to another one, or end its job") from None


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Without DeepSpeed's own banners and notices, which it prints on every rank (MOE_CL_VERBOSE=1 shows them)."""
    if os.environ.get("MOE_CL_VERBOSE"):
        yield
        return
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed")
    with open(os.devnull, "w") as sink, contextlib.redirect_stdout(sink):
        yield


def leave_out_shm_op() -> None:
    """Start DeepSpeed without the CPU op that it compiles at first use (needed by its inference all-reduce alone).

    A build, or a mere load, that was killed leaves a lock for which every later start would wait for ever.
    """
    import deepspeed.ops

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
