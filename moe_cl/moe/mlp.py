"""The expert MLP as one autograd function: by the compiled kernels of ``cpp/`` on the CPU, else a product an expert.

Legend: R rows, k choices a row, M assignments in expert order, E experts, D width, H hidden width.

For expert e and its rows r (Plan order):  h = x_r W1_e' + b1_e,  a = gelu(h),  y = a W2_e' + b2_e,  out_r += p_re y.
Backward with g = dL/dout_r:  da = g W2_e,  dp_re = <da, a> + <g, b2_e>,  and everything else from p_re g as in any MLP.
Kept for it: x and h in the products' type (without the kernels also a and the weights, as autocast keeps them of the
dense MLP); with ``recompute`` x alone. Neither the k copies of x nor y are.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from moe_cl.moe import kernels
from moe_cl.moe.dispatch import Plan, gather_sum

CHUNK = 512  # most rows of one expert at a time: bounds the scratch and keeps it in cache when the routing is uneven
# oneDNN compiles a kernel for every shape of a product it has not seen (0.5 to 1 ms, as much as the product). Routed
# counts are new in every step, so pieces are filled up with zero rows to a multiple of this.
MULTIPLE = 8
gelu = torch._C._nn.gelu  # what F.gelu is, with ``out=``
gelu_backward = torch.ops.aten.gelu_backward.grad_input


if torch.backends.mkldnn.is_available():

    @register_flop_formula(torch.ops.mkldnn._linear_pointwise)
    def _flops(x: tuple[int, ...], weight: tuple[int, ...], *args: Any, **more: Any) -> int:
        """A multiply-add is two, as torch counts ``mm``."""
        return 2 * x[0] * x[1] * weight[0]


def _onednn(x: Tensor, dtype: torch.dtype) -> bool:
    """Whether products of ``dtype`` are oneDNN's."""
    if not (x.is_cpu and torch.backends.mkldnn.is_available() and torch.backends.mkldnn.enabled):
        return False
    return dtype == torch.float32 or (dtype == torch.bfloat16 and torch.ops.mkldnn._is_mkldnn_bf16_supported())


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None, onednn: bool, after: str = "none") -> Tensor:
    """x weight' + bias, then ``after`` ("none" or "gelu").

    oneDNN does all of it inside the product, which in fp32 is also 15 % faster than MKL's on AMD's processors.
    """
    if onednn:
        return torch.ops.mkldnn._linear_pointwise(x, weight, bias, after, [], "none")
    y = F.linear(x, weight, bias)
    return gelu(y, out=y) if after == "gelu" else y


def _pieces(counts: list[int]) -> tuple[list[tuple[int, bool]], list[int]]:
    """(expert, first piece of it) and rows of each piece, over assignments in expert order; pieces of like size."""
    owners, sizes = [], []
    for e, count in enumerate(counts):
        number = -(-count // CHUNK)
        for i in range(number):
            owners.append((e, i == 0))
            sizes.append(count * (i + 1) // number - count * i // number)
    return owners, sizes


def _filled(sizes: list[int], onednn: bool) -> list[int]:
    """Rows of each piece as it is multiplied: with zero rows at its end where that saves a kernel."""
    return [-(-n // MULTIPLE) * MULTIPLE for n in sizes] if onednn else sizes


def _gather(source: Tensor, rows: Tensor, out: Tensor) -> Tensor:
    """``out`` with ``source[rows]`` first and zeros after: (F, D)."""
    n = len(rows)
    if n == len(out):
        return torch.index_select(source, 0, rows, out=out)
    torch.index_select(source, 0, rows, out=out[:n])
    out[n:].zero_()
    return out


class ExpertMLP(torch.autograd.Function):
    """out (R, D) from x (R, D), weights (R, k) and stacked parameters; all parameters get a gradient, 0 where idle.

    ``ids`` (R, k): the local experts that ``plan`` was made of. ``train``: a backward will come. Matrix products run in
    ``dtype``; the sum over a row's experts and the gradients of weights and parameters are in the parameters' type.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weights: Tensor,
        w1: Tensor,
        b1: Tensor,
        w2: Tensor,
        b2: Tensor,
        ids: Tensor,
        plan: Plan,
        dtype: torch.dtype,
        train: bool,
        recompute: bool,
    ) -> Tensor:
        native = kernels.get(x, dtype, w1, b1, w2, b2)
        ctx.native, ctx.dtype, ctx.x_dtype = native, dtype, x.dtype
        if native is not None:
            xc = x.to(dtype)
            h, y = native.forward(xc, plan.token, plan.counts, w1, b1, w2, b2, keep=train and not recompute)
            if train:
                saved = (xc, weights, w1, b1, w2, b2, ids, plan.token, plan.choice, plan.inverse, plan.counts, h)
                ctx.save_for_backward(*saved)
            return native.combine(y, plan.inverse, weights.float())
        with torch.autocast(x.device.type, enabled=False):
            onednn = _onednn(x, dtype)
            owners, sizes = _pieces(plan.counts.tolist())
            filled = _filled(sizes, onednn)
            d, m = x.shape[1], len(plan.token)
            wide = torch.float64 if dtype == torch.float64 else torch.float32
            keep = train and not recompute
            xc = x.to(dtype)
            rows = xc.new_empty(max(filled, default=0), d)
            hs, a_all = [], xc.new_empty(sum(filled) if keep else 0, w1.shape[1])
            a_of = a_all.split(filled) if keep else [None] * len(filled)
            y = torch.empty(m + 1, d, dtype=wide, device=x.device)  # last row: choices whose expert is elsewhere
            y[m] = 0
            v1, v2 = (torch.empty_like(w, dtype=dtype) if keep and w.dtype != dtype else w for w in (w1, w2))
            stacks = list(zip(*(q.unbind(0) for q in (w1, b1, w2, b2, v1, v2)), strict=True))
            pieces = zip(owners, sizes, filled, plan.token.split(sizes), y[:m].split(sizes), a_of, strict=True)
            for (e, first), n, f, token, ye, a in pieces:
                if first:  # cast one expert at a time, so that the copy is used while in cache
                    p1, c1, p2, c2, u1, u2 = stacks[e]
                    if dtype != p1.dtype:
                        c1, c2 = c1.to(dtype), c2.to(dtype)
                        u1, u2 = (u1.copy_(p1), u2.copy_(p2)) if keep else (p1.to(dtype), p2.to(dtype))
                xe = _gather(xc, token, rows[:f])
                if keep:
                    h = _linear(xe, u1, c1, onednn)
                    gelu(h, out=a)
                    hs.append(h)
                else:
                    a = _linear(xe, u1, c1, onednn, "gelu")
                ye.copy_(_linear(a, u2, c2, onednn)[:n])
            out = gather_sum(y, plan.inverse, weights)
        if train:
            saved = (xc, weights, v1, b1, v2, b2, ids, plan.token, plan.choice, plan.inverse)
            ctx.save_for_backward(*saved, a_all, *hs)
            ctx.pieces, ctx.keep = (owners, sizes, filled, onednn), keep
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        if ctx.native is not None:
            return _native_backward(ctx, grad)
        x, weights, w1, b1, w2, b2, ids, token, choice, inverse, a_all, *hs = ctx.saved_tensors
        dtype, keep, (owners, sizes, filled, onednn) = ctx.dtype, ctx.keep, ctx.pieces
        with torch.autocast(x.device.type, enabled=False):
            d, hidden, m, most = x.shape[1], w1.shape[1], len(token), max(filled, default=0)
            grad = grad.contiguous()
            gx, gp = grad.new_empty(m + 1, d), grad.new_empty(m + 1)  # last: choices whose expert is elsewhere
            gx[m], gp[m] = 0, 0
            sums = [torch.empty_like(q, dtype=b1.dtype) for q in (w1, b1, w2, b2)]
            gw1, gb1, gw2, gb2 = parts = [s.unbind(0) for s in sums]
            for e in set(range(len(w1))).difference(e for e, _ in owners):
                for part in parts:
                    part[e].zero_()
            p, low = weights.reshape(-1, 1).index_select(0, choice).to(dtype), grad.to(dtype)
            xe, ge = x.new_empty(most, d), x.new_empty(most, d)
            spare = x.new_empty(most, hidden)
            stacks = [q.unbind(0) for q in (w1, b1, w2)]
            views = [v.split(sizes) for v in (token, p, gx[:m], gp[:m])]
            kept = (hs, a_all.split(filled)) if keep else ([None] * len(filled),) * 2
            pieces = zip(owners, sizes, filled, *views, *kept, strict=True)
            for (e, first), n, f, rows, pe, gxe, gpe, h, a in pieces:
                if first:
                    u1, c1, u2 = (s[e].to(dtype) for s in stacks)
                xf, gf = _gather(x, rows, xe[:f]), _gather(low, rows, ge[:f])
                if not keep:
                    h = _linear(xf, u1, c1, onednn)
                    a = gelu(h)
                daf = _linear(gf, u2.t(), None, onednn)
                torch.sum(torch.mul(daf[:n], a[:n], out=spare[:n]), 1, dtype=gp.dtype, out=gpe)
                gf[:n].mul_(pe)
                daf[:n].mul_(pe)
                _weight_grad(gw2[e], gb2[e], gf, a, first)
                gh = gelu_backward(daf, h, grad_input=spare[:f])
                _weight_grad(gw1[e], gb1[e], gh, xf, first)
                gxe.copy_(_linear(gh, u1.t(), None, onednn)[:n])
            grad_x = gather_sum(gx, inverse).to(ctx.x_dtype)
            grad_weights = (gp[inverse] + _on_bias(grad, b2, ids)).to(weights.dtype)
        return grad_x, grad_weights, *sums, None, None, None, None, None


def _native_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    x, weights, w1, b1, w2, b2, ids, token, choice, inverse, counts, h = ctx.saved_tensors
    with torch.autocast(x.device.type, enabled=False):
        if h is None:  # recompute
            h, _ = ctx.native.forward(x, token, counts, w1, b1, w2, b2, keep=True, last=False)
        p = weights.float().reshape(-1).index_select(0, choice)
        gx, gp, sums = ctx.native.backward(x, grad.to(ctx.dtype), p, token, counts, w1, w2, h)
        grad_x = ctx.native.combine(gx, inverse).to(ctx.x_dtype)
        grad_weights = (gp[inverse] + _on_bias(grad, b2, ids)).to(weights.dtype)
    return grad_x, grad_weights, *sums, None, None, None, None, None


def _on_bias(grad: Tensor, b2: Tensor, ids: Tensor) -> Tensor:
    """<g_r, b2_e> of each choice: (R, k), 0 where the expert is elsewhere."""
    return F.pad(grad @ b2.to(grad.dtype).t(), (0, 1)).gather(1, ids)


def _weight_grad(weight: Tensor, bias: Tensor, out: Tensor, into: Tensor, first: bool) -> None:
    """weight (O, I) and bias (O,) become (first piece of an expert) or grow by (later ones) out' into and sum(out)."""
    if weight.dtype == out.dtype:
        torch.addmm(weight, out.t(), into, beta=0 if first else 1, out=weight)
        total = out.sum(0)
    else:
        product, total = out.t() @ into, out.sum(0)
        weight.copy_(product) if first else weight.add_(product)
    bias.copy_(total) if first else bias.add_(total)
