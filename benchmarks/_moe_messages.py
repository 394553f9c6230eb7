"""What two expert-parallel ranks really send for one MoE layer, counted where the tensors enter the process group."""

from __future__ import annotations

import os
import socket

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor

from moe_cl.comm import DistComm
from moe_cl.config import MoEConfig
from moe_cl.moe.experts import SparseMLP

DIM, K = 384, 2


class Counting(DistComm):
    """Bytes that leave this rank, message by message."""

    def __init__(self) -> None:
        super().__init__()
        self.sent: list[int] = []

    def _exchange(self, x: Tensor, send: list[int], recv: list[int]) -> Tensor:
        self.sent.append((len(x) - send[self.rank]) * x[:1].numel() * x.element_size() if len(x) else 0)
        return super()._exchange(x, send, recv)


def _rank(rank: int, port: int, batch: int, results) -> None:
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    dist.init_process_group("gloo", rank=rank, world_size=2)
    torch.manual_seed(rank)
    comm = Counting()
    layer = SparseMLP(DIM, MoEConfig(experts=16, top_k=K), comm=comm)
    _, routing = layer(torch.randn(batch, 197, DIM))
    elsewhere = (routing.indices // 8 != rank).any(-1).sum()  # unique (token, remote rank) pairs
    results.put((comm.sent, int(elsewhere)))
    dist.destroy_process_group()


def bytes_of_two_ranks(batch: int) -> dict[str, int]:
    """One forward of a layer on ``batch`` images a rank: bytes of the rows, of the formula, and beside the rows."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    context = mp.get_context("spawn")
    results = context.SimpleQueue()
    ranks = mp.spawn(_rank, (port, batch, results), nprocs=2, join=False)
    out = [results.get() for _ in range(2)]
    ranks.join()
    total = sum(sum(sent) for sent, _ in out)
    pairs = sum(pairs for _, pairs in out)
    beside = sum(sent[0] for sent, _ in out) + pairs * K * (4 + 2)  # counts; weights fp32 and expert ids int16
    return {"rows": total - beside, "pairs x width x 2": pairs * DIM * 4 * 2, "weights, ids and counts": beside}
