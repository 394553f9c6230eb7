"""Tokens to the ranks that hold their experts, and the experts' answers back: unique (token, rank) pairs, little else.

A token goes once to each rank that holds any of its experts and comes back as one row. Most pairs are *lone*: one of
the token's experts lives there. Their rows stand in the order of their experts, so that the counts of each expert,
exchanged first, say which expert a row is for, and their weight stays at home, where the answer is multiplied by it. A
*shared* pair (several of the token's experts on one rank) is answered by a weighted sum: its k local ids (a byte each)
and k weights go with the row. So a forward sends width x 2 numbers a pair, k ids and weights a shared pair, and the
counts.

Legend: N rows on this rank, k choices a row, P = pairs (row, rank) of this rank, S of them shared, R rows received,
E_local experts a rank; id E_local means "not on this rank".
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from moe_cl.comm import Comm
from moe_cl.moe.dispatch import gather_sum


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
    Otherwise rows travel in dtype ``wire``; sums and weights stay in the weights' own.
    """
    if comm.world == 1:
        return run(x_ND, indices_Nk, weights_Nk, True), 0
    pairs = pair_up(indices_Nk, experts_local, comm)
    rows, weights, ids = Send.apply(x_ND, weights_Nk, pairs, comm, wire)
    y = run(rows, ids, weights, False)
    # A shared pair's answer is weighted already; that of a lone pair is multiplied here.
    applied = torch.where(pairs.shared[pairs.every], 1.0, weights_Nk)
    return Return.apply(y, applied, pairs, comm, wire), pairs.remote


@dataclass
class Pairs:
    """Pairs stand by rank; within a rank lone ones by expert, then shared ones; then by row.

    token: (P,) row. column: (P,) the choice of a lone pair. shared: (P,) bool. ids: (P, k) expert ids on the receiving
    rank, E_local = not there. every: (N, k) pair of each choice. first: the same, but P where an earlier choice of the
    row has that pair. send, recv: for each rank, rows by local expert and, last, shared ones. remote: rows that leave
    this rank.
    """

    token: Tensor
    column: Tensor
    shared: Tensor
    ids: Tensor
    first: Tensor
    every: Tensor
    send: list[list[int]]
    recv: list[list[int]]
    remote: int


def pair_up(indices_Nk: Tensor, experts_local: int, comm: Comm) -> Pairs:
    """The pairs of this rank's rows, and (one collective) how many rows of each kind every rank gets and gives."""
    n, k = indices_Nk.shape
    home = indices_Nk // experts_local
    needs = torch.zeros(n, comm.world, dtype=torch.bool, device=indices_Nk.device).scatter_(1, home, True).t()
    rank, token = needs.nonzero().unbind(1)
    ids = indices_Nk[token] - (rank * experts_local)[:, None]
    here = (ids >= 0) & (ids < experts_local)
    shared, column = here.sum(1) > 1, here.to(torch.uint8).argmax(1)
    kind = torch.where(shared, experts_local, ids.gather(1, column[:, None])[:, 0]) + rank * (experts_local + 1)
    kind, order = kind.sort(stable=True)
    kinds = torch.arange(comm.world * (experts_local + 1), device=kind.device)
    ends = torch.searchsorted(kind, kinds, right=True)
    send = ends.diff(prepend=ends.new_zeros(1)).view(comm.world, -1).to(torch.int32)
    recv = comm.all_to_all(send, [1] * comm.world, [1] * comm.world)
    send_list, recv_list = torch.stack([send, recv]).tolist()
    token, shared, column, ids, here = (t[order] for t in (token, shared, column, ids, here))
    number = torch.zeros(comm.world, n, dtype=torch.int64, device=token.device)
    number[rank[order], token] = torch.arange(len(token), device=token.device)
    every = number.gather(0, home.t()).t().contiguous()
    earlier = (home[:, :, None] == home[:, None, :]).tril(-1).any(-1)
    first = every.masked_fill(earlier, len(token))
    remote = sum(map(sum, send_list)) - sum(send_list[comm.rank])
    return Pairs(token, column, shared, ids.where(here, experts_local), first, every, send_list, recv_list, remote)


def _bytes(x: Tensor) -> Tensor:
    return x.contiguous().view(-1).view(torch.uint8)


def _exchange(
    comm: Comm, rows: Tensor, beside: list[Tensor], send: list[list[int]], recv: list[list[int]]
) -> tuple[Tensor, list[Tensor]]:
    """One message a rank: its rows, then what stands beside its shared ones (each (S, k)), as bytes without padding."""
    tensors = [rows, *beside]
    width = [x.shape[1] * x.dtype.itemsize for x in tensors]

    def sizes(counts: list[list[int]]) -> list[list[int]]:
        """(rank, tensor) bytes."""
        return [[(c[-1] if j else sum(c)) * w for j, w in enumerate(width)] for c in counts]

    there, back = sizes(send), sizes(recv)
    cuts = [_bytes(x).split([each[j] for each in there]) for j, x in enumerate(tensors)]
    packed = torch.cat([cut for of_rank in zip(*cuts, strict=True) for cut in of_rank])
    parts = comm.all_to_all(packed, [sum(s) for s in there], [sum(s) for s in back]).split(sum(back, []))
    got = [torch.cat(parts[j :: len(tensors)]).view(x.dtype).view(-1, x.shape[1]) for j, x in enumerate(tensors)]
    return got[0], got[1:]


def _ends(counts: list[list[int]]) -> list[slice]:
    """Where the shared rows of each rank lie."""
    out, at = [], 0
    for each in counts:
        at += sum(each)
        out.append(slice(at - each[-1], at))
    return out


def _padded(x: Tensor) -> Tensor:
    """A zero row after the last one: where ``first`` points for nothing."""
    return torch.cat([x, x.new_zeros(1, x.shape[1])])


class Send(torch.autograd.Function):
    """Rows, and the weights and ids of shared ones, to the ranks of their experts; gradients come back.

    Returns rows (R, D), weights (R, k) (1 in the first column of lone rows) and ids (R, k).
    """

    @staticmethod
    def forward(
        ctx: Any, x_ND: Tensor, weights_Nk: Tensor, pairs: Pairs, comm: Comm, wire: torch.dtype
    ) -> tuple[Tensor, Tensor, Tensor]:
        ctx.pairs, ctx.comm, ctx.wire, ctx.kinds = pairs, comm, wire, (x_ND.dtype, weights_Nk.dtype)
        k, local = weights_Nk.shape[1], len(pairs.send[0]) - 1
        own = _ends(pairs.send)
        weights = torch.cat([weights_Nk.index_select(0, pairs.token[part]) for part in own])
        ids = torch.cat([pairs.ids[part] for part in own]).to(torch.uint8 if local < 256 else torch.int32)
        rows = x_ND.to(wire).index_select(0, pairs.token)
        rows, (weights, ids) = _exchange(comm, rows, [weights, ids], pairs.send, pairs.recv)
        # Local ids of lone rows are their places: expert e as often as the counts say, and E_local for shared ones.
        kinds = torch.arange(local + 1, device=ids.device).repeat(len(pairs.recv))
        counts = torch.tensor(sum(pairs.recv, []), device=ids.device)
        all_ids = torch.full((len(rows), k), local, dtype=torch.int64, device=ids.device)
        all_ids[:, 0] = kinds.repeat_interleave(counts, output_size=len(rows))
        all_weights = weights.new_zeros(len(rows), k)
        all_weights[:, 0] = 1.0
        beside = [t.split([c[-1] for c in pairs.recv]) for t in (weights, ids)]
        for part, w, i in zip(_ends(pairs.recv), *beside, strict=True):
            all_weights[part], all_ids[part] = w, i.long()
        ctx.mark_non_differentiable(all_ids)
        return rows, all_weights, all_ids

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_rows: Tensor, grad_weights: Tensor, _: Any) -> tuple[Tensor | None, ...]:
        pairs, (x_dtype, w_dtype) = ctx.pairs, ctx.kinds
        theirs = torch.cat([grad_weights[part] for part in _ends(pairs.recv)]).to(w_dtype)
        rows, (mine,) = _exchange(ctx.comm, grad_rows.to(ctx.wire), [theirs], pairs.recv, pairs.send)
        grad_x = gather_sum(_padded(rows.to(x_dtype)), pairs.first)
        by_pair = mine.new_zeros(len(pairs.token), mine.shape[1])  # lone ones have theirs from ``Return``
        for part, g in zip(_ends(pairs.send), mine.split([c[-1] for c in pairs.send]), strict=True):
            by_pair[part] = g
        # The weight of choice j was used on the rank of choice j alone; on others it was masked.
        return grad_x, by_pair.gather(0, pairs.every), None, None, None


class Return(torch.autograd.Function):
    """Each rank's answer back to the token's rank, multiplied by ``applied`` (N, k) and added there in fp32."""

    @staticmethod
    def forward(ctx: Any, y_RD: Tensor, applied_Nk: Tensor, pairs: Pairs, comm: Comm, wire: torch.dtype) -> Tensor:
        ctx.pairs, ctx.comm, ctx.dtype = pairs, comm, y_RD.dtype
        parts, _ = _exchange(comm, y_RD.to(wire), [], pairs.recv, pairs.send)
        ctx.save_for_backward(parts, applied_Nk)
        return gather_sum(_padded(parts.to(y_RD.dtype)), pairs.first, applied_Nk.to(y_RD.dtype))

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (parts, applied), pairs = ctx.saved_tensors, ctx.pairs
        rows = grad.index_select(0, pairs.token)
        on = torch.cat([(rows * parts).sum(1), rows.new_zeros(1)])[pairs.first].to(applied.dtype)
        rows = rows * applied[pairs.token, pairs.column].to(rows.dtype)[:, None]
        rows, _ = _exchange(ctx.comm, rows.to(parts.dtype), [], pairs.send, pairs.recv)
        return rows.to(ctx.dtype), on, None, None, None
