"""The expert MLP as one autograd function: an expert's rows stay in cache from gather to scatter.

Legend: R rows, k choices a row, M assignments in expert order, E experts, D width, H hidden width.

For expert e and its rows r (Plan order):  h = x_r W1_e' + b1_e,  a = gelu(h),  y = a W2_e' + b2_e,  out_r += p_re y.
Kept for the backward: x, h and y (the dense MLP keeps x, h and a; y is half as wide as a). With ``recompute`` h is not.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from moe_cl.moe.dispatch import Plan, gather_sum

CHUNK = 1024  # rows of one expert at a time: bounds the scratch and keeps it in cache when the routing is uneven


def _chunks(counts: list[int]) -> Iterator[tuple[int, int, int, bool]]:
    """(expert, start, stop, first chunk of the expert) over assignments in expert order."""
    start = 0
    for e, count in enumerate(counts):
        for low in range(start, start + count, CHUNK):
            yield e, low, min(low + CHUNK, start + count), low == start
        start += count


class ExpertMLP(torch.autograd.Function):
    """out (R, D) from x (R, D), weights (R, k) and stacked parameters; all parameters get a gradient, 0 where idle."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weights: Tensor,
        w1: Tensor,
        b1: Tensor,
        w2: Tensor,
        b2: Tensor,
        plan: Plan,
        dtype: torch.dtype,
        recompute: bool,
    ) -> Tensor:
        with torch.autocast(x.device.type, enabled=False):
            counts = plan.counts.tolist()
            d, hidden, m, n = x.shape[1], w1.shape[1], len(plan.token), min(CHUNK, max(counts, default=0))
            wide = torch.float64 if dtype == torch.float64 else torch.float32
            train = any(ctx.needs_input_grad)
            keep = train and not recompute
            xc = x.to(dtype)
            h_all = xc.new_empty(m if keep else 0, hidden)
            rows, h_one, act = xc.new_empty(n, d), xc.new_empty(0 if keep else n, hidden), xc.new_empty(n, hidden)
            y = torch.empty(m + 1, d, dtype=wide, device=x.device)  # last row: choices whose expert is elsewhere
            y[m] = 0
            last = -1
            for e, s, t, _ in _chunks(counts):
                if e != last:
                    u1, c1, u2, c2 = (p[e].to(dtype) for p in (w1, b1, w2, b2))
                    last = e
                xe = torch.index_select(xc, 0, plan.token[s:t], out=rows[: t - s])
                h = torch.addmm(c1, xe, u1.t(), out=h_all[s:t] if keep else h_one[: t - s])
                a = torch.ops.aten.gelu.out(h, out=act[: t - s])
                if dtype == wide:
                    torch.addmm(c2, a, u2.t(), out=y[s:t])
                else:
                    y[s:t] = torch.addmm(c2, a, u2.t(), out=rows[: t - s])
            out = gather_sum(y, plan.inverse, weights)
        if train:
            ctx.save_for_backward(xc, weights, w1, b1, w2, b2, h_all, y, plan.token, plan.choice, plan.inverse)
            ctx.counts, ctx.dtype, ctx.x_dtype, ctx.keep = counts, dtype, x.dtype, keep
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weights, w1, b1, w2, b2, h_all, y, token, choice, inverse = ctx.saved_tensors
        dtype, counts = ctx.dtype, ctx.counts
        wide, m = y.dtype, len(token)
        with torch.autocast(x.device.type, enabled=False):
            gw1, gb1, gw2, gb2 = (torch.empty_like(p, memory_format=torch.contiguous_format) for p in (w1, b1, w2, b2))
            for e, count in enumerate(counts):
                if not count:
                    for g in (gw1, gb1, gw2, gb2):
                        g[e].zero_()
            gx, gp = torch.empty_like(y), y.new_empty(m + 1)
            gx[m], gp[m] = 0, 0
            p = weights.reshape(-1).index_select(0, choice)
            grad = grad.to(wide)
            last = -1
            for e, s, t, first in _chunks(counts):
                if e != last:
                    u1, c1, u2 = (q[e].to(dtype) for q in (w1, b1, w2))
                    last = e
                ge = grad.index_select(0, token[s:t])
                torch.sum(ge * y[s:t], 1, out=gp[s:t])
                ge = ge.mul_(p[s:t, None]).to(dtype)
                xe = x.index_select(0, token[s:t])
                h = h_all[s:t] if ctx.keep else torch.addmm(c1, xe, u1.t())
                a = torch.ops.aten.gelu(h)
                _weight_grad(gw2[e], gb2[e], ge, a, first)
                gh = torch.ops.aten.gelu_backward.grad_input(ge @ u2, h, grad_input=a)
                _weight_grad(gw1[e], gb1[e], gh, xe, first)
                if dtype == wide:
                    torch.mm(gh, u1, out=gx[s:t])
                else:
                    gx[s:t] = gh @ u1
            grad_x = gather_sum(gx, inverse).to(ctx.x_dtype)
            grad_weights = gp[inverse].to(weights.dtype)
        return grad_x, grad_weights, gw1, gb1, gw2, gb2, None, None, None


def _weight_grad(weight: Tensor, bias: Tensor, out: Tensor, into: Tensor, first: bool) -> None:
    """weight (O, I) and bias (O,) become (first chunk of an expert) or grow by (later ones) out' into and sum(out)."""
    if weight.dtype == out.dtype:
        torch.addmm(weight, out.t(), into, beta=0 if first else 1, out=weight)
        total = out.sum(0)
    else:
        product, total = out.t() @ into, out.sum(0, dtype=bias.dtype)
        weight.copy_(product) if first else weight.add_(product)
    bias.copy_(total) if first else bias.add_(total)
