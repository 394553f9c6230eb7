"""An MoE layer for tracing: the run's own router and experts, an exchange of the same bytes, balanced routing.

Where each token goes depends on values, which traced tensors do not have: every set of k experts is taken as equally
likely. Legend: N rows, k choices a row, E experts, P pairs (row, rank that holds one of its experts), R rows received.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from moe_cl.config import MoEConfig
from moe_cl.moe import grouped, mlp
from moe_cl.moe.dispatch import Plan, gather_sum
from moe_cl.moe.experts import compute_dtype
from moe_cl.moe.router import Router, Routing
from moe_cl.moe.shazeer import ShazeerRouter
from moe_cl.planning.compiled import shares
from moe_cl.planning.ledger import Ledger


def ranks_a_token(experts: int, ep: int, k: int) -> float:
    """Expected number of different ranks that hold a token's k experts."""
    local = experts // ep
    return ep * (1 - math.comb(experts - local, k) / math.comb(experts, k))


def shared_a_token(experts: int, ep: int, k: int) -> float:
    """Expected number of ranks that hold more than one of a token's k experts."""
    local = experts // ep
    one = local * math.comb(experts - local, k - 1) / math.comb(experts, k)
    return ranks_a_token(experts, ep, k) - ep * one


def _even(ids: Tensor, total: int, experts: int) -> Tensor:
    """Counts of a balanced routing; ``tolist``, where the code reads them on the host, has them."""
    counts = ids.new_empty(experts)
    counts.tolist = lambda: shares(total, experts)
    return counts


class _Stack(nn.Module):
    """The stacked weights of ``moe_cl.moe.experts.Experts``, by the same names, without values."""

    def __init__(self, dim: int, hidden: int, experts: int):
        super().__init__()
        self.w1, self.b1 = nn.Parameter(torch.empty(experts, hidden, dim)), nn.Parameter(torch.empty(experts, hidden))
        self.w2, self.b2 = nn.Parameter(torch.empty(experts, dim, hidden)), nn.Parameter(torch.empty(experts, dim))


class PlannedMoE(nn.Module):
    """(N, T, D) tokens -> (N, T, D) and routing, as ``SparseMLP``; ``ep`` ranks share the experts."""

    def __init__(self, dim: int, moe: MoEConfig, layer: int, ledger: Ledger, ep: int, use_grouped: bool):
        super().__init__()
        with torch.device("cpu"):  # its start is drawn; it is small
            self.router = (ShazeerRouter if moe.gate == "shazeer" else Router)(dim, moe, layer, 0)
        self.experts = _Stack(dim, round(dim * moe.hidden_ratio), moe.experts // ep)
        self.moe, self.ep, self.ledger, self.use_grouped = moe, ep, ledger, use_grouped

    def forward(self, x_NTD: Tensor, keys_N: Tensor | None = None) -> tuple[Tensor, Routing]:
        routing = self.router(x_NTD, keys_N)
        d, k = x_NTD.shape[-1], routing.indices.shape[-1]
        x, weights, ids = x_NTD.reshape(-1, d), routing.weights.view(-1, k), routing.indices.view(-1, k)
        total, wire = ids.numel(), compute_dtype(x_NTD)
        if self.ep == 1:
            return self._run(x, ids, weights, total, wire).view(x_NTD.shape), routing
        pairs = round(len(x) * ranks_a_token(self.moe.experts, self.ep, k))
        beside = k * round(len(x) * shared_a_token(self.moe.experts, self.ep, k))
        with self.ledger.within("dispatch buffers"):
            rows, sent = _Send.apply(x, weights, pairs, beside, wire, self.ledger)
        y = self._run(rows, ids.new_empty(pairs, k), sent, total, wire)
        with self.ledger.within("dispatch buffers"):
            y = _Return.apply(y, weights, wire, self.ledger)
        routing.sent = pairs - pairs // self.ep
        return y.view(x_NTD.shape), routing

    def _run(self, x: Tensor, ids: Tensor, weights: Tensor, total: int, dtype: torch.dtype) -> Tensor:
        e = self.experts
        stacks = e.w1, e.b1, e.w2, e.b2
        token, choice, inverse = ids.new_empty(total), ids.new_empty(total), torch.empty_like(ids)
        if self.use_grouped:
            plan = Plan(token, choice, inverse, ids.new_empty(len(e.w1)))
            return grouped.forward(x, weights, *stacks, plan, dtype, self.moe.recompute)
        plan = Plan(token, choice, inverse, _even(ids, total, len(e.w1)))
        train = torch.is_grad_enabled() and any(t.requires_grad for t in (x, weights, *stacks))
        return mlp.ExpertMLP.apply(x, weights, *stacks, ids, plan, dtype, train, self.moe.recompute)


def _message(ledger: Ledger, rows: Tensor, beside: int) -> Tensor:
    """Rows packed, sent and unpacked; ``beside`` bytes go with them."""
    packed = torch.cat([rows.contiguous().view(-1).view(torch.uint8), rows.new_empty(beside, dtype=torch.uint8)])
    ledger.send("all_to_all", "expert", packed)
    return packed[: len(packed) - beside].clone().view(rows.dtype).view(rows.shape)


class _Send(torch.autograd.Function):
    """A row to each rank that holds any of its experts; of shared ones (several experts there) ids and weights too."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weights: Tensor, pairs: int, beside: int, wire: torch.dtype, ledger: Ledger
    ) -> tuple[Tensor, Tensor]:
        ctx.shape, ctx.kinds, ctx.beside, ctx.wire, ctx.ledger = x.shape, (x.dtype, weights.shape), beside, wire, ledger
        rows = x.to(wire).index_select(0, torch.empty(pairs, dtype=torch.int64))
        rows = _message(ledger, rows, beside * (1 + weights.element_size()))
        return rows, weights.new_zeros(pairs, weights.shape[1])

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_rows: Tensor, grad_weights: Tensor) -> tuple[Tensor | None, ...]:
        rows = _message(ctx.ledger, grad_rows.to(ctx.wire), ctx.beside * grad_weights.element_size())
        first = torch.empty(ctx.kinds[1], dtype=torch.int64)
        grad = gather_sum(rows.to(ctx.kinds[0]), first)
        return grad, grad_weights.new_zeros(ctx.kinds[1]), None, None, None, None


class _Return(torch.autograd.Function):
    """One row back for each pair, weighted and added at home in fp32."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, weights: Tensor, wire: torch.dtype, ledger: Ledger) -> Tensor:
        ctx.dtype, ctx.ledger = y.dtype, ledger
        parts = _message(ledger, y.to(wire), 0)
        ctx.save_for_backward(parts, weights)
        return gather_sum(parts.to(y.dtype), torch.empty(weights.shape, dtype=torch.int64), weights.to(y.dtype))

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        parts, weights = ctx.saved_tensors
        rows = grad.index_select(0, torch.empty(len(parts), dtype=torch.int64))
        on_weights = (rows * parts).sum(1).new_zeros(weights.shape)
        return _message(ctx.ledger, rows.to(parts.dtype), 0).to(ctx.dtype), on_weights, None, None


def factory(ledger: Ledger, ep: int, use_grouped: bool) -> Callable[..., PlannedMoE]:
    """What ``build_backbone(moe_factory=...)`` takes."""

    def make(dim: int, layer: int, moe: MoEConfig) -> PlannedMoE:
        return PlannedMoE(dim, moe, layer, ledger, ep, use_grouped)

    return make
