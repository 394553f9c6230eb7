"""Where tokens go: sorted by expert on a rank, exchanged between the ranks of an expert group.

Nothing is padded to a capacity and nothing is dropped. Every movement of rows is a gather: a permutation forwards and
its inverse backwards, so there are no atomic additions and equal inputs give equal bits on any device.

Legend: R rows on this rank, k choices a row, M = assignments (row, expert), P = pairs (token, rank) this rank sends,
E_local experts a rank; id E_local means "not on this rank".
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from moe_cl.comm import Comm


@dataclass
class Plan:
    """Assignments of rows to local experts in expert order.

    token: (M,) row of each assignment. choice: (M,) its place in the flattened (R*k) choices.
    inverse: (R, k) assignment of each choice, M where the expert is elsewhere. counts: (E_local,) of each expert.
    """

    token: Tensor
    choice: Tensor
    inverse: Tensor
    counts: Tensor


def sort_by_expert(ids_Rk: Tensor, experts: int, complete: bool = True) -> Plan:
    """Group the choices by local expert id; ``complete`` = no id says "elsewhere" (then M = R*k needs no host sync)."""
    flat = ids_Rk.reshape(-1)
    ordered, order = flat.sort(stable=True)
    # Not bincount, which asks the host for its length on CUDA.
    ends = torch.searchsorted(ordered, torch.arange(experts, device=flat.device), right=True)
    counts = ends.diff(prepend=ends.new_zeros(1))
    inverse = torch.empty_like(order)
    inverse[order] = torch.arange(len(order), device=order.device)
    if not complete:
        m = int(counts.sum())
        order, inverse = order[:m], inverse.clamp_(max=m)
    return Plan(order // ids_Rk.shape[1], order, inverse.view_as(ids_Rk), counts)


def gather_sum(values_MD: Tensor, inverse_Rk: Tensor, weights_Rk: Tensor | None = None) -> Tensor:
    """out[r] = sum_j weights[r, j] * values[inverse[r, j]] in one pass, without a copy for each of the k choices."""
    if not inverse_Rk.shape[0] or not values_MD.shape[0]:
        return values_MD.new_zeros(inverse_Rk.shape[0], values_MD.shape[1])
    return torch.nn.functional.embedding_bag(inverse_Rk, values_MD, mode="sum", per_sample_weights=weights_Rk)


def route(
    x_ND: Tensor,
    indices_Nk: Tensor,
    weights_Nk: Tensor,
    run: Callable[[Tensor, Tensor, Tensor, bool], Tensor],
    experts_local: int,
    comm: Comm,
    wire: torch.dtype,
) -> tuple[Tensor, int]:
    """Every token's weighted sum over its experts, wherever they are: (N, D) and the rows sent to other ranks.

    ``run(rows, ids, weights, complete)`` is this rank's experts on rows, ids (R, k) local. With one rank nothing moves.
    Otherwise each token goes once to each rank that holds any of its experts, in dtype ``wire``, with its weights and
    local ids in the same message, and comes back as one row: that rank's part of the weighted sum.
    """
    if comm.world == 1:
        return run(x_ND, indices_Nk, weights_Nk, True), 0
    pairs = _pair_up(indices_Nk, experts_local, comm)
    rows, weights, ids = _Send.apply(x_ND, weights_Nk, pairs, comm, wire)
    y = run(rows, ids, weights, False)
    return _Return.apply(y, pairs, comm, wire), pairs.remote


@dataclass
class _Pairs:
    """token: (P,) by rank, then token. ids: (P, k) expert ids on the receiving rank, E_local = not there.
    first: (N, k) pair of each choice, P where an earlier choice of the token goes to the same rank. every: (N, k) pair
    of each choice. send, recv: rows to and from each rank. remote: rows that leave this rank."""

    token: Tensor
    ids: Tensor
    first: Tensor
    every: Tensor
    send: list[int]
    recv: list[int]
    remote: int


def _pair_up(indices_Nk: Tensor, experts_local: int, comm: Comm) -> _Pairs:
    n, k = indices_Nk.shape
    home = indices_Nk // experts_local
    needs = torch.zeros(n, comm.world, dtype=torch.bool, device=indices_Nk.device).scatter_(1, home, True).t()
    send = needs.sum(1)
    recv = comm.all_to_all(send, [1] * comm.world, [1] * comm.world)
    send_list, recv_list = torch.stack([send, recv]).tolist()
    rank, token = needs.nonzero().unbind(1)
    number = (needs.reshape(-1).cumsum(0) - 1).view(comm.world, n)
    every = number.gather(0, home.t()).t().contiguous()
    earlier = (home[:, :, None] == home[:, None, :]).tril(-1).any(-1)
    first = every.masked_fill(earlier, len(token))
    ids = indices_Nk[token] - (rank * experts_local)[:, None]
    ids = torch.where((ids >= 0) & (ids < experts_local), ids, experts_local)
    return _Pairs(token, ids, first, every, send_list, recv_list, sum(send_list) - send_list[comm.rank])


def _pack(*parts: Tensor) -> Tensor:
    """(P, bytes): rows of several tensors side by side, so that one message carries them all."""
    if not len(parts[0]):
        return parts[0].new_empty((0, sum(p.shape[1] * p.dtype.itemsize for p in parts)), dtype=torch.uint8)
    return torch.cat([p.clone(memory_format=torch.contiguous_format).view(torch.uint8) for p in parts], dim=1)


def _unpack(packed: Tensor, *kinds: tuple[int, torch.dtype]) -> list[Tensor]:
    parts = packed.split([width * dtype.itemsize for width, dtype in kinds], dim=1)
    return [
        part.clone(memory_format=torch.contiguous_format).view(dtype)
        if len(part)
        else part.new_empty((0, width), dtype=dtype)
        for part, (width, dtype) in zip(parts, kinds, strict=True)
    ]


def _padded(x: Tensor) -> Tensor:
    """A zero row after the last one: where ``first`` points for nothing."""
    return torch.cat([x, x.new_zeros(1, x.shape[1])])


class _Send(torch.autograd.Function):
    """Tokens, their weights and local expert ids to the ranks that hold their experts; gradients come back."""

    @staticmethod
    def forward(
        ctx: Any, x_ND: Tensor, weights_Nk: Tensor, pairs: _Pairs, comm: Comm, wire: torch.dtype
    ) -> tuple[Tensor, Tensor, Tensor]:
        ctx.pairs, ctx.comm, ctx.wire, ctx.kinds = pairs, comm, wire, (x_ND.dtype, weights_Nk.dtype)
        d, k = x_ND.shape[1], weights_Nk.shape[1]
        ids = pairs.ids.to(torch.int16)
        packed = _pack(x_ND.to(wire).index_select(0, pairs.token), weights_Nk.index_select(0, pairs.token), ids)
        packed = comm.all_to_all(packed, pairs.send, pairs.recv)
        rows, weights, ids = _unpack(packed, (d, wire), (k, weights_Nk.dtype), (k, torch.int16))
        ids = ids.long()
        ctx.mark_non_differentiable(ids)
        return rows, weights, ids

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_rows: Tensor, grad_weights: Tensor, _: Any) -> tuple[Tensor | None, ...]:
        pairs, (x_dtype, w_dtype), d, k = ctx.pairs, ctx.kinds, grad_rows.shape[1], grad_weights.shape[1]
        packed = _pack(grad_rows.to(ctx.wire), grad_weights.to(w_dtype))
        packed = ctx.comm.all_to_all(packed, pairs.recv, pairs.send)
        grad_rows, grad_weights = _unpack(packed, (d, ctx.wire), (k, w_dtype))
        grad_x = gather_sum(_padded(grad_rows.to(x_dtype)), pairs.first)
        # The weight of choice j was used on the rank of choice j alone; on others it was masked.
        return grad_x, grad_weights.gather(0, pairs.every), None, None, None


class _Return(torch.autograd.Function):
    """Each rank's part of a token's weighted sum back to the token's rank, added there in fp32."""

    @staticmethod
    def forward(ctx: Any, y_RD: Tensor, pairs: _Pairs, comm: Comm, wire: torch.dtype) -> Tensor:
        ctx.pairs, ctx.comm, ctx.wire, ctx.dtype = pairs, comm, wire, y_RD.dtype
        parts = comm.all_to_all(y_RD.to(wire), pairs.recv, pairs.send)
        return gather_sum(_padded(parts.to(y_RD.dtype)), pairs.first)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        rows = grad.to(ctx.wire).index_select(0, ctx.pairs.token)
        return ctx.comm.all_to_all(rows, ctx.pairs.send, ctx.pairs.recv).to(ctx.dtype), None, None, None
