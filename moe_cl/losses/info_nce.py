"""InfoNCE with in-batch negatives over all ranks (MoCo v3, CR-MoE, end-to-end) or with a queue (MoCo v1/v2).

N rows a rank, W ranks, M = N*W, C width, K queue length, T temperature. Rows are normalised here.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from moe_cl.comm import Comm
from moe_cl.losses.precision import full_precision, unit, wide


@dataclass
class Contrast:
    """``loss``: mean over this rank's rows. ``positive``, ``negative``: mean cosine, without graph."""

    loss: Tensor
    positive: Tensor
    negative: Tensor


@full_precision
def gather_keys(*keys: Tensor, comm: Comm, gradient: bool = False) -> list[Tensor]:
    """Normalised keys (N, C) of several views -> (M, C) each, in one message; ``gradient``: also back through it."""
    packed = torch.cat([unit(k) for k in keys], dim=1)
    packed = comm.all_gather_grad(packed) if gradient else comm.all_gather(packed)
    return list(packed.split([k.shape[1] for k in keys], dim=1))


@full_precision
def contrastive(q: Tensor, keys: Tensor, temperature: float, rank: int = 0, scale: float | None = None) -> Contrast:
    """scale * CE(nz(q) keys' / T, own row): row n of rank r has its positive in row n + N*r of ``keys``.

    Args:
        q: (N, C), not normalised. keys: (M, C) from ``gather_keys``.
        scale: None = 2T, which makes the gradient's size independent of T (MoCo v3, Chen et al. 2021, Algorithm 1).
    """
    logits_NM = unit(q) @ keys.t() / temperature
    target = torch.arange(len(q), device=q.device) + len(q) * rank
    loss = F.cross_entropy(logits_NM, target) * (2 * temperature if scale is None else scale)
    with torch.no_grad():
        positive = logits_NM.gather(1, target[:, None]).mean()
        others = max(keys.shape[0] - 1, 1)
        negative = (logits_NM.mean() * keys.shape[0] - positive) / others
    return Contrast(loss, positive * temperature, negative * temperature)


@full_precision
def queue_logits(q: Tensor, k: Tensor, queue: Tensor, temperature: float) -> Tensor:
    """(N, 1+K): the own key first, then the queue (C, K). He et al. 2020, Eq. 1. q, k: (N, C), not normalised."""
    q, k = unit(q), unit(k)
    positive_N1 = (q * k).sum(1, keepdim=True)
    return torch.cat([positive_N1, q @ wide(queue)], dim=1) / temperature


@full_precision
def first_is_positive(logits: Tensor) -> Tensor:
    """Mean cross-entropy of rows whose label is column 0."""
    return F.cross_entropy(wide(logits), logits.new_zeros(len(logits), dtype=torch.long))


@torch.no_grad()
def accuracy(logits: Tensor, k: int) -> Tensor:
    """Percent of rows whose column 0 is among the k largest (0-d tensor, no host sync)."""
    rank = (logits[:, 1:] > logits[:, :1]).sum(1)
    return (rank < k).to(logits.dtype).mean() * 100
