"""Batch norm over a view, over all ranks, or over groups of a batch; state dict as torch's BatchNorm.

Which samples share statistics (moco_jcl: 1.1 shuffle-BN, split-BN; 1.3 SyncBatchNorm)::

    comm=None, groups=1    one view of this rank's batch           (MoCo v1/v2 with shuffled keys, plain DDP)
    comm=None, groups=G    a contiguous 1/G of that                (one device in the place of G: "split BN")
    comm=Comm, groups=1    one view of every rank's batch          (MoCo v3, SimCLR, CR-MoE, EsViT)

Rows are view-major; each view is normalised as if it came in a forward of its own, and running statistics move view
after view, so V views in one pass leave the same state as V passes. EsViT, whose published code has all crops of a
resolution in one forward, counts them as one view.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from contextvars import ContextVar
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from moe_cl.comm import Comm

_views: ContextVar[int] = ContextVar("views", default=1)
_replay: ContextVar[bool] = ContextVar("replay", default=False)


@contextlib.contextmanager
def view_count(views: int) -> Iterator[None]:
    """Inside, a ``BatchNorm`` that is not told otherwise sees ``views`` views (for networks of one tensor)."""
    token = _views.set(views)
    try:
        yield
    finally:
        _views.reset(token)


@contextlib.contextmanager
def replay(views: int) -> Iterator[None]:
    """As ``view_count``, and running statistics stay: a second forward (checkpointing's, or a step's that is tried
    again) counts no batch twice."""
    token = _replay.set(True)
    try:
        with view_count(views):
            yield
    finally:
        _replay.reset(token)


def current_views() -> int:
    """What the enclosing ``view_count`` says."""
    return _views.get()


class BatchNorm(_BatchNorm):
    """Batch norm of (V*B, C) or (V*B, C, H, W).

    Args:
        dim: channels C.
        affine: learn a scale and a shift.
        comm: ranks that share statistics; None = this rank alone.
        groups: contiguous parts of a view with statistics of their own; running statistics take their mean.

    Statistics are in fp32 (fp64 for fp64 input) also under autocast; the output has the input's dtype.
    """

    def __init__(
        self,
        dim: int,
        affine: bool = True,
        comm: Comm | None = None,
        groups: int = 1,
        eps: float = 1e-5,
        momentum: float = 0.1,
    ):
        super().__init__(dim, eps=eps, momentum=momentum, affine=affine)
        self.comm, self.groups = comm, groups

    def _check_input_dim(self, x: Tensor) -> None:
        if x.ndim < 2 or x.shape[1] != self.num_features:
            raise ValueError(f"batch norm of {self.num_features} channels got a tensor of shape {tuple(x.shape)}")

    def forward(self, x: Tensor, views: int | None = None) -> Tensor:
        """``views``: how many views the rows hold, view-major; None = what ``view_count`` says (1 without it)."""
        self._check_input_dim(x)
        views = _views.get() if views is None else views
        wide = x if x.dtype not in (torch.float16, torch.bfloat16) or self._mixed() else x.float()
        if not self.training:
            out = F.batch_norm(wide, self.running_mean, self.running_var, *self._affine(wide), False, 0.0, self.eps)
            return out.to(x.dtype)
        if len(x) % (views * self.groups):
            raise ValueError(f"batch norm: {len(x)} rows cannot be cut into {views} views of {self.groups} groups")
        if self.comm is not None and self.comm.world > 1:
            if self.groups > 1:
                raise ValueError("batch norm: groups are for one rank's batch; give either groups or a comm")
            return self._joint(x, views)
        if x.numel() // x.shape[1] == views * self.groups:
            raise ValueError("batch norm needs more than one value a channel in training; use a larger micro-batch")
        return self._local(wide, views).to(x.dtype)

    def _mixed(self) -> bool:
        # the native kernels take half input with fp32 parameters and then keep fp32 statistics
        return self.running_mean.dtype == torch.float32 and (self.weight is None or self.weight.dtype == torch.float32)

    def _affine(self, x: Tensor) -> tuple[Tensor | None, Tensor | None]:
        if self.weight is None or self.weight.dtype == x.dtype or self._mixed():
            return self.weight, self.bias
        return self.weight.to(x.dtype), self.bias.to(x.dtype)

    def _local(self, x: Tensor, views: int) -> Tensor:
        """Native kernel a view and group."""
        parts, weight, bias = [], *self._affine(x)
        for view in x.chunk(views):
            running = torch.stack([self.running_mean, self.running_var]).to(torch.promote_types(x.dtype, torch.float32))
            after = [running.clone() for _ in range(self.groups)]
            for part, (mean, var) in zip(view.chunk(self.groups), after, strict=True):
                parts.append(F.batch_norm(part, mean, var, weight, bias, True, self.momentum, self.eps))
            if not _replay.get():
                self._keep(*(after[0] if self.groups == 1 else torch.stack(after).mean(0)))
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def _joint(self, x: Tensor, views: int) -> Tensor:
        """Statistics of all ranks' rows, all views in one message each way."""
        y, mean_VC, var_VC, count = _JointNorm.apply(x, self.weight, self.bias, self.eps, self.comm, views)
        if not _replay.get():
            unbiased = var_VC * (count / (count - 1).clamp(min=1))
            for mean, var in zip(mean_VC.unbind(), unbiased.unbind(), strict=True):
                keep = 1 - self.momentum
                self._keep(
                    keep * self.running_mean + self.momentum * mean, keep * self.running_var + self.momentum * var
                )
        return y

    @torch.no_grad()
    def _keep(self, mean: Tensor, var: Tensor) -> None:
        self.running_mean.copy_(mean)
        self.running_var.copy_(var)
        self.num_batches_tracked.add_(1)

    def extra_repr(self) -> str:
        world = 1 if self.comm is None else self.comm.world
        return f"{super().extra_repr()}, world={world}, groups={self.groups}"


class _JointNorm(torch.autograd.Function):
    """y = (x - mean_v) / sqrt(var_v + eps) * weight + bias with mean and variance over all ranks' rows of view v.

    Backward, of the sum over ranks of the losses: dx = w/s * (dy - E[dy] - xhat * E[dy xhat]), E over all ranks.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, comm: Comm, views: int
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        x_VBCP = _split(x, views)
        var_VC, mean_VC = torch.var_mean(x_VBCP, (1, 3), correction=0)
        count = x_VBCP.shape[1] * x_VBCP.shape[3]
        # fp64: sums of squares cancel where |mean| >> std
        var, mean = var_VC.double(), mean_VC.double()
        packed = torch.cat([(mean * count).flatten(), ((var + mean**2) * count).flatten(), mean.new_tensor([count])])
        packed = comm.all_reduce(packed)
        total = packed[-1]
        mean, square = (packed[:-1] / total).view(2, *mean.shape).unbind()
        var = (square - mean**2).clamp(min=0)
        scale_VC = torch.rsqrt(var + eps).to(mean_VC.dtype)
        mean_VC, var_VC = mean.to(mean_VC.dtype), var.to(mean_VC.dtype)
        # Written through a view of what is returned: a view itself could not be changed in place (ReLU) afterwards.
        y = torch.empty(x.shape, dtype=x_VBCP.dtype, device=x.device)
        y_VBCP = torch.sub(x_VBCP, _wide(mean_VC), out=y.view(x_VBCP.shape)).mul_(_wide(scale_VC))
        if weight is not None:
            y_VBCP.mul_(weight.to(y.dtype)[:, None]).add_(bias.to(y.dtype)[:, None])
        ctx.save_for_backward(x, weight, mean_VC, scale_VC, total)
        ctx.comm, ctx.views = comm, views
        ctx.mark_non_differentiable(mean_VC, var_VC, total)
        return y.to(x.dtype), mean_VC, var_VC, total

    @staticmethod
    def backward(ctx: Any, grad: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
        x, weight, mean_VC, scale_VC, total = ctx.saved_tensors
        dy_VBCP, x_VBCP = _split(grad, ctx.views), _split(x, ctx.views)
        xhat_VBCP = (x_VBCP - _wide(mean_VC)) * _wide(scale_VC)
        sums_2VC = torch.stack([dy_VBCP.sum((1, 3)), (dy_VBCP * xhat_VBCP).sum((1, 3))])
        dweight = dbias = None
        if weight is not None:
            dbias, dweight = (s.sum(0).to(weight.dtype) for s in sums_2VC)
        mean_dy, mean_dyx = (ctx.comm.all_reduce(sums_2VC) / total.to(sums_2VC.dtype)).unbind()
        dx = (dy_VBCP - _wide(mean_dy) - xhat_VBCP * _wide(mean_dyx)) * _wide(scale_VC)
        if weight is not None:
            dx = dx * weight.to(dx.dtype)[:, None]
        return dx.view(x.shape).to(x.dtype), dweight, dbias, None, None, None


def _split(x: Tensor, views: int) -> Tensor:
    """(V*B, C, ...) -> (V, B, C, P) in at least fp32."""
    wide = x.float() if x.dtype in (torch.float16, torch.bfloat16) else x
    return wide.reshape(views, len(x) // views, x.shape[1], -1)


def _wide(t_VC: Tensor) -> Tensor:
    return t_VC[:, None, :, None]


def batch_norms(module: nn.Module) -> list[BatchNorm]:
    """Every ``BatchNorm`` inside."""
    return [m for m in module.modules() if isinstance(m, BatchNorm)]


def share_statistics(module: nn.Module, comm: Comm | None = None, groups: int = 1) -> nn.Module:
    """Set what all batch norms inside ``module`` share statistics with; returns ``module``."""
    for norm in batch_norms(module):
        norm.comm, norm.groups = comm, groups
    return module


def shuffle(x: Tensor, permutation: Tensor, comm: Comm) -> Tensor:
    """Shuffle-BN's way in: rows (n, ...) of every rank, permuted over all ranks; this rank's part (n, ...).

    ``permutation`` (world*n,) is the same on every rank. moco_jcl 1.1; no gradient.
    """
    return comm.all_gather(x)[permutation.view(comm.world, -1)[comm.rank].to(x.device)]


def unshuffle(x: Tensor, permutation: Tensor, comm: Comm) -> Tensor:
    """Shuffle-BN's way back: undoes ``shuffle`` on the encoded rows (n, ...)."""
    return comm.all_gather(x)[torch.argsort(permutation).view(comm.world, -1)[comm.rank].to(x.device)]
