"""The expert MLP with torch's grouped matrix product: one launch for all experts, counts stay on the device (CUDA)."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from moe_cl.moe.dispatch import Plan, gather_sum


def available(x: Tensor, dtype: torch.dtype, hidden: int, assignments: int) -> bool:
    """Whether rows on this device in ``dtype`` can take the grouped path: bf16 on CUDA from Hopper or Ampere up.

    Both widths are multiples of 8, for rows lie at multiples of 16 bytes there; and there is a row at all, for with
    experts on several ranks all tokens may go elsewhere.
    """
    if not (x.is_cuda and dtype == torch.bfloat16 and hasattr(torch, "_grouped_mm")):
        return False
    fits = x.shape[1] % 8 == 0 and hidden % 8 == 0 and assignments > 0
    return fits and torch.cuda.get_device_capability(x.device) >= (8, 0)


class _Take(torch.autograd.Function):
    """Rows in expert order; the backward adds each row's assignments by the inverse permutation, without atomics."""

    @staticmethod
    def forward(ctx: Any, x_RD: Tensor, token_M: Tensor, inverse_Rk: Tensor) -> Tensor:
        ctx.save_for_backward(inverse_Rk)
        return x_RD.index_select(0, token_M)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_MD: Tensor) -> tuple[Tensor, None, None]:
        (inverse,) = ctx.saved_tensors
        padded = torch.cat([grad_MD.float(), grad_MD.new_zeros(1, grad_MD.shape[1], dtype=torch.float32)])
        return gather_sum(padded, inverse).to(grad_MD.dtype), None, None


class _Combine(torch.autograd.Function):
    """out[r] = sum_j p[r, j] y[inverse[r, j]] in fp32."""

    @staticmethod
    def forward(ctx: Any, y_MD: Tensor, weights_Rk: Tensor, plan: Plan) -> Tensor:
        padded = torch.cat([y_MD.float(), y_MD.new_zeros(1, y_MD.shape[1], dtype=torch.float32)])
        ctx.save_for_backward(y_MD, weights_Rk, plan.token, plan.choice, plan.inverse)
        return gather_sum(padded, plan.inverse, weights_Rk)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        y, weights, token, choice, inverse = ctx.saved_tensors
        g = grad.index_select(0, token)
        gp = torch.cat([(g * y).sum(1), g.new_zeros(1)])
        p = weights.reshape(-1).index_select(0, choice)
        return (g * p[:, None]).to(y.dtype), gp[inverse].to(weights.dtype), None


def forward(
    x: Tensor, weights: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor, plan: Plan, dtype: torch.dtype,
    recompute: bool,
) -> Tensor:  # fmt: skip
    """As ``mlp.ExpertMLP``: (R, D) fp32. Biases are added as one-hot (M, E) products, so their gradient is one too."""
    with torch.autocast(x.device.type, enabled=False):
        offsets = plan.counts.cumsum(0).to(torch.int32)
        slots = torch.arange(len(plan.token), device=x.device)
        expert = torch.searchsorted(offsets.long(), slots, right=True)
        onehot = F.one_hot(expert, len(w1)).to(dtype)

        def run(rows: Tensor) -> Tensor:
            h = torch._grouped_mm(rows, w1.to(dtype).transpose(1, 2), offs=offsets) + onehot @ b1.to(dtype)
            return torch._grouped_mm(F.gelu(h), w2.to(dtype).transpose(1, 2), offs=offsets) + onehot @ b2.to(dtype)

        rows = _Take.apply(x.to(dtype), plan.token, plan.inverse)
        y = checkpoint(run, rows, use_reentrant=False) if recompute and torch.is_grad_enabled() else run(rows)
        return _Combine.apply(y, weights, plan)
