"""A rank without the others: DeepSpeed on torch's fake process group, for layouts larger than the machine."""

from __future__ import annotations

import os

import torch.distributed as dist

from moe_cl.comm import Comm, DistComm
from moe_cl.engine import ranks


def join(rank: int, world: int, per_node: int) -> Comm:
    """Rank ``rank`` of ``world``, ``per_node`` of them a node: collectives return at once and move nothing."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    local = rank % per_node
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(world), LOCAL_RANK=str(local), LOCAL_SIZE=str(per_node))
    dist.init_process_group("fake", rank=rank, world_size=world, store=FakeStore())
    ranks.leave_out_shm_op()
    with ranks.quiet():
        import deepspeed

        deepspeed.init_distributed(dist_backend="fake", auto_mpi_discovery=False, verbose=False)
    return DistComm()


def expert_groups(name: str) -> tuple[list[int], list[int]]:
    """Ranks that share the experts of DeepSpeed's expert group ``name``, and ranks with the same experts."""
    from deepspeed.utils import groups

    return (
        dist.get_process_group_ranks(groups._get_expert_parallel_group(name)),
        dist.get_process_group_ranks(groups._get_expert_data_parallel_group(name)),
    )
