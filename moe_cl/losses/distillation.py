"""Self-distillation of DINO and EsViT: view loss, region loss without its gather, centres and temperature.

V views (i = 0, 1 are the teacher's), B images, K prototypes, T_v tokens of view v, T of a teacher view (esvit.md 1.3).
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from moe_cl.losses.precision import full_precision, unit, wide

_CHUNK = 1 << 24  # student logits of regions held at once; one image at least


def teacher_temperature(epoch: int, start: float, end: float, warmup_epochs: int) -> float:
    """linspace(start, end, warmup_epochs)[epoch], then ``end``."""
    if epoch >= warmup_epochs:
        return end
    return start + (end - start) * epoch / max(warmup_epochs - 1, 1)


@full_precision
def targets(teacher: Tensor, centre: Tensor, temperature: float) -> Tensor:
    """softmax((t - c) / tau_t) over the last dim, without graph."""
    return ((wide(teacher.detach()) - wide(centre)) / temperature).softmax(-1)


@full_precision
def view_loss(student: Tensor, q: Tensor, temperature: float, mix: Tensor | None = None) -> Tensor:
    """Mean over the 2V - 2 pairs (i, v), v != i, and over images, of -sum_k q_i log softmax(s_v / tau_s).

    Args:
        student: (V, B, K) logits. q: (2, B, K) from ``targets``.
        mix: (V, B, B) soft targets: image b of view v is compared with the teacher's b against all students' images.
    """
    log_p = (wide(student) / temperature).log_softmax(-1)
    if mix is not None:
        log_p = torch.einsum("vbj,vjk->vbk", wide(mix), log_p)
    cross = -torch.einsum("ibk,vbk->iv", q, log_p) / student.shape[1]
    teachers, views = cross.shape
    return (cross.sum() - cross.diagonal().sum()) / (teachers * views - teachers)


@torch.no_grad()
@full_precision
def match_regions(teacher: Tensor, *student: Tensor) -> Tensor:
    """For each student token the most similar (cosine) token of each teacher view, per image: (B, S, 2) into 2*T.

    Args:
        teacher: (2, B, T, P) backbone features. student: (V_r, B, T_r, P) a resolution; S = sum V_r T_r, in order.
    """
    views, batch, tokens, _ = teacher.shape
    keys = unit(teacher).permute(1, 3, 0, 2).flatten(2)  # (B, P, 2T)
    best = []
    for x in student:
        rows = unit(x).transpose(0, 1).flatten(1, 2)  # (B, V_r T_r, P)
        best.append((rows @ keys).view(batch, -1, views, tokens).argmax(-1))
    return torch.cat(best, 1) + torch.arange(views, device=teacher.device) * tokens


def region_rows(xs: Sequence[Tensor]) -> Tensor:
    """(V_r, B, T_r, D) a resolution -> (B, S, D), an image's tokens together."""
    return torch.cat([x.transpose(0, 1).flatten(1, 2) for x in xs], 1)


@functools.lru_cache(maxsize=64)  # the same every step; made anew it would wait for the device
def pair_weights(counts: tuple[tuple[int, int], ...], teachers: int, device: torch.device) -> Tensor:
    """(S, 2): 1 / ((2V - 2) T_v) for the pairs of a token, 0 for its own view. counts: (V_r, T_r) a resolution."""
    tokens = torch.cat([torch.full((v * t,), t, dtype=torch.float64) for v, t in counts])
    first = torch.cumsum(torch.tensor([0] + [v for v, _ in counts]), 0)
    view = torch.cat([
        (f + torch.arange(v)).repeat_interleave(t) for f, (v, t) in zip(first, counts, strict=False)
    ])  # fmt: skip
    pairs = teachers * (sum(v for v, _ in counts) - 1)
    return ((view[:, None] != torch.arange(teachers)) / (pairs * tokens[:, None])).to(device)


def region_loss(
    student: Tensor,
    teacher: Tensor,
    pick: Tensor,
    weights: Tensor,
    centre: Tensor,
    temperature: float,
    teacher_temp: float,
    student_weight: Tensor | None = None,
    teacher_weight: Tensor | None = None,
) -> Tensor:
    """Mean over images of sum over tokens m and teacher views i of weight * -sum_k Q_i[n*(m)] log P[m].

    sum_k Q = 1, so a token's cross-entropy is logsumexp(s) - s.Q[n*]: one (S, K) x (K, 2T) product an image and a pick
    of scalars. With ``student_weight`` the last linear layer is inside too, and logits exist for a few images at a time
    only; the gradient is formed in the same pass.

    Args:
        student: (B, S, D), teacher: (B, 2T, D): rows before the last layer, of at most unit length, or logits (D = K)
            without weights.
        pick: (B, S, 2) from ``match_regions``. weights: (S, 2) from ``pair_weights``. centre: (K,).
        student_weight, teacher_weight: (K, D), its rows of about unit length.
    """
    kind = student.device.type
    dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None
    with torch.autocast(kind, enabled=False):
        return _Region.apply(
            student, student_weight, teacher, teacher_weight, pick, weights, centre, temperature, teacher_temp, dtype
        )


class _Region(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        z: Tensor,
        w: Tensor | None,
        zt: Tensor,
        wt: Tensor | None,
        pick: Tensor,
        weights: Tensor,
        centre: Tensor,
        temperature: float,
        teacher_temp: float,
        dtype: torch.dtype | None,
    ) -> Tensor:
        batch, tokens, _ = z.shape
        train = ctx.needs_input_grad[0] or ctx.needs_input_grad[1]
        low = [None if t is None else t.to(dtype or t.dtype) for t in (z, w, zt, wt)]
        real = torch.float64 if z.dtype == torch.float64 else torch.float32
        weights, centre = weights.to(real), centre.to(real)
        total = weights.sum(1)[:, None]
        dz = torch.empty_like(z) if train else None
        dw = torch.zeros(w.shape, dtype=real, device=w.device) if train and w is not None else None
        loss = z.new_zeros((), dtype=real)
        step = max(1, _CHUNK // (tokens * len(centre)))
        lift = _lift(low[0].dtype, min(step, batch) / (temperature * batch))
        for at in range(0, batch, step):
            rows = slice(at, at + step)
            s = _project(low[0][rows], low[1]).to(real) / temperature
            q = ((_project(low[2][rows], low[3]).to(real) - centre) / teacher_temp).softmax(-1)
            lse = s.logsumexp(-1, keepdim=True)
            picked = (s @ q.mT).gather(2, pick[rows])
            loss += ((lse - picked) * weights).sum()
            if not train:
                continue
            grad = s.sub_(lse).exp_().mul_(total)  # weight * softmax(s)
            chosen = grad.new_zeros(*grad.shape[:2], q.shape[1])
            chosen.scatter_add_(2, pick[rows], weights.expand(len(grad), -1, -1))
            grad.baddbmm_(chosen, q, alpha=-1).div_(temperature * batch / (1.0 if w is None else lift))
            if w is None:
                dz[rows] = grad
                continue
            low_grad = grad.to(low[0].dtype)
            dz[rows] = (low_grad @ low[1]).to(real) / lift
            dw.add_((low_grad.flatten(0, 1).t() @ low[0][rows].flatten(0, 1)).to(real), alpha=1 / lift)
        if train:
            ctx.save_for_backward(dz, dw)
            ctx.weight_dtype = None if w is None else w.dtype
        return loss / batch

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        dz, dw = ctx.saved_tensors
        return dz * grad, None if dw is None else (dw * grad).to(ctx.weight_dtype), *[None] * 8


def _lift(dtype: torch.dtype, size: float) -> float:
    """Power of two that brings the logits' gradient into fp16's range; 1 for other types.

    It is formed before the loss is scaled, and with K prototypes most of its entries are 1/K of the size of the largest
    and would become 0. Its sums over a chunk's rows stay below 2 * ``size``, for the weights of an image's pairs sum to
    1 (or less) and softmax and target each to 1.
    """
    return 2.0 ** math.floor(math.log2(2**15 / (2 * size))) if dtype == torch.float16 else 1.0


def _project(x: Tensor, weight: Tensor | None) -> Tensor:
    return x.clone() if weight is None else F.linear(x, weight)


@torch.no_grad()
@full_precision
def mean_logits(rows: Tensor, weight: Tensor) -> Tensor:
    """(K,) mean over rows (n, D) of rows weight' : the last layer is linear, so the logits need not exist."""
    return wide(weight) @ wide(rows).mean(0)


@torch.no_grad()
@full_precision
def next_centre(centre: Tensor, batch_mean: Tensor, momentum: float) -> Tensor:
    """c <- m c + (1 - m) mean of the uncentred teacher logits over all rows and ranks."""
    return wide(centre) * momentum + wide(batch_mean) * (1 - momentum)


@torch.no_grad()
def entropy(q: Tensor) -> Tensor:
    """Mean entropy in nats of distributions (..., K)."""
    return -torch.special.xlogy(q, q).sum(-1).mean()
