"""The expert MLP as one autograd function: an expert's rows stay in cache from gather to scatter.

Legend: R rows, k choices a row, M assignments in expert order, E experts, D width, H hidden width.

For expert e and its rows r (Plan order):  h = x_r W1_e' + b1_e,  a = gelu(h),  y = a W2_e' + b2_e,  out_r += p_re y.
Backward with g = dL/dout_r:  da = g W2_e,  dp_re = <da, a> + <g, b2_e>,  and everything else from p_re g as in any MLP.
Kept for it: x and h (the dense MLP keeps x, h and a); with ``recompute`` x alone.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from moe_cl.moe.dispatch import Plan, gather_sum

CHUNK = 1024  # rows of one expert at a time: bounds the scratch and keeps it in cache when the routing is uneven
aten = torch.ops.aten


def _pieces(counts: list[int]) -> tuple[list[tuple[int, bool]], list[int]]:
    """(expert, first piece of it) and the rows of each piece, over assignments in expert order."""
    owners, sizes = [], []
    for e, count in enumerate(counts):
        for low in range(0, count, CHUNK):
            owners.append((e, low == 0))
            sizes.append(min(CHUNK, count - low))
    return owners, sizes


def _per_expert(dtype: torch.dtype, *parameters: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Each expert's parameters in ``dtype``, cast one expert at a time so that the copy is used while in cache."""
    for tensors in zip(*(p.unbind(0) for p in parameters), strict=True):
        yield tuple(t.to(dtype) for t in tensors)


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
            owners, sizes = _pieces(plan.counts.tolist())
            d, hidden, m, most = x.shape[1], w1.shape[1], len(plan.token), max(sizes, default=0)
            wide = torch.float64 if dtype == torch.float64 else torch.float32
            train = any(ctx.needs_input_grad)
            keep = train and not recompute
            xc = x.to(dtype)
            h_all = xc.new_empty(m if keep else 0, hidden)
            h_of = h_all.split(sizes) if keep else None
            rows, scratch = xc.new_empty(most, d), xc.new_empty(most, hidden)
            y = torch.empty(m + 1, d, dtype=wide, device=x.device)  # last row: choices whose expert is elsewhere
            y[m] = 0
            experts = _per_expert(dtype, w1, b1, w2, b2)
            at = -1
            pieces = zip(owners, sizes, plan.token.split(sizes), y[:m].split(sizes), strict=True)
            for i, ((e, _), n, token, ye) in enumerate(pieces):
                while at < e:
                    (u1, c1, u2, c2), at = next(experts), at + 1
                xe = torch.index_select(xc, 0, token, out=rows[:n])
                h = torch.addmm(c1, xe, u1.t(), out=h_of[i] if keep else scratch[:n])
                a = aten.gelu.out(h, out=scratch[:n])
                if dtype == wide:
                    torch.addmm(c2, a, u2.t(), out=ye)
                else:
                    ye.copy_(torch.addmm(c2, a, u2.t(), out=rows[:n]))
            out = gather_sum(y, plan.inverse, weights)
        if train:
            ctx.save_for_backward(xc, weights, w1, b1, w2, b2, h_all, plan.token, plan.choice, plan.inverse)
            ctx.owners, ctx.sizes, ctx.dtype, ctx.x_dtype, ctx.keep = owners, sizes, dtype, x.dtype, keep
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weights, w1, b1, w2, b2, h_all, token, choice, inverse = ctx.saved_tensors
        dtype, sizes, keep = ctx.dtype, ctx.sizes, ctx.keep
        with torch.autocast(x.device.type, enabled=False):
            d, hidden, m, most = x.shape[1], w1.shape[1], len(token), max(sizes, default=0)
            grad = grad.contiguous()
            gx, gp = grad.new_empty(m + 1, d), grad.new_empty(m + 1)
            gx[m], gp[m] = 0, 0
            sums = [torch.empty_like(p) for p in (w1, b1, w2, b2)]
            parts = [s.unbind(0) for s in sums]
            for e in set(range(len(w1))) - {e for e, _ in ctx.owners}:
                for part in parts:
                    part[e].zero_()
            p = weights.reshape(-1, 1).index_select(0, choice).to(dtype)
            low = grad.to(dtype)
            xe, ge = x.new_empty(most, d), x.new_empty(most, d)
            h_one, act, da = (x.new_empty(most, hidden) for _ in range(3))
            experts = _per_expert(dtype, w1, b1, w2, b2)
            at = -1
            views = (v.split(sizes) for v in (token, p, gx[:m], gp[:m]))
            pieces = zip(ctx.owners, sizes, *views, strict=True)
            h_of = h_all.split(sizes) if keep else None
            for i, ((e, first), n, rows, pe, gxe, gpe) in enumerate(pieces):
                while at < e:
                    (u1, c1, u2, c2), at = next(experts), at + 1
                xn = torch.index_select(x, 0, rows, out=xe[:n])
                gn = torch.index_select(low, 0, rows, out=ge[:n])
                h = h_of[i] if keep else torch.addmm(c1, xn, u1.t(), out=h_one[:n])
                a = aten.gelu.out(h, out=act[:n])
                dan = torch.mm(gn, u2, out=da[:n])
                bias_part = torch.mv(gn, c2)
                _weight_grad(parts[2][e], parts[3][e], gn.mul_(pe), a, first)
                torch.sum(a.mul_(dan), 1, dtype=gp.dtype, out=gpe).add_(bias_part)
                gh = aten.gelu_backward.grad_input(dan.mul_(pe), h, grad_input=a)
                _weight_grad(parts[0][e], parts[1][e], gh, xn, first)
                if dtype == grad.dtype:
                    torch.mm(gh, u1, out=gxe)
                else:
                    gxe.copy_(torch.mm(gh, u1, out=gn))
            grad_x = gather_sum(gx, inverse).to(ctx.x_dtype)
            grad_weights = gp[inverse].to(weights.dtype)
        return grad_x, grad_weights, *sums, None, None, None


def _weight_grad(weight: Tensor, bias: Tensor, out: Tensor, into: Tensor, first: bool) -> None:
    """weight (O, I) and bias (O,) become (first chunk of an expert) or grow by (later ones) out' into and sum(out)."""
    if weight.dtype == out.dtype:
        torch.addmm(weight, out.t(), into, beta=0 if first else 1, out=weight)
        total = out.sum(0)
    else:
        product, total = out.t() @ into, out.sum(0)
        weight.copy_(product) if first else weight.add_(product)
    bias.copy_(total) if first else bias.add_(total)
