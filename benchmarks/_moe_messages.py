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
    away = (routing.indices // 8 != rank).sum(-1)  # experts of each token on the other rank
    results.put((comm.sent, routing.sent, int((away > 0).sum()), int((away > 1).sum())))
    dist.destroy_process_group()


def bytes_of_two_ranks(batch: int) -> dict[str, int]:
    """One forward of a layer on ``batch`` images a rank: bytes that left both ranks, and what they were.

    ``sent`` is all of it, as counted; ``rows`` what the layer says it sent of tokens, both ways; ``pairs x width x 2``
    the formula over the unique (token, remote rank) pairs of the routing.
    """
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    context = mp.get_context("spawn")
    results = context.SimpleQueue()
    ranks = mp.spawn(_rank, (port, batch, results), nprocs=2, join=False)
    out = [results.get() for _ in range(2)]
    ranks.join()
    counts, rows, pairs, shared = (sum(column) for column in zip(*((o[0][0], *o[1:]) for o in out), strict=True))
    return {
        "sent": sum(sum(sent) for sent, *_ in out),
        "rows": rows * DIM * 4 * 2,
        "pairs x width x 2": pairs * DIM * 4 * 2,
        "weights and ids of tokens with both experts there": shared * K * (4 + 1),
        "counts": counts,
    }
