"""EsViT's region loss beside the form that materialises its gather, at Swin-T's tokens and 65,536 prototypes."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from moe_cl.losses import distillation as dist

COUNTS = ((2, 49), (8, 9))  # (views, tokens) of a resolution


def inputs(batch: int, out: int, dim: int = 256) -> tuple[Tensor, ...]:
    """Rows before the last layer, its weights, and random matches."""
    g = torch.Generator().manual_seed(0)
    size, tokens = sum(v * t for v, t in COUNTS), COUNTS[0][1]
    z, zt = (F.normalize(torch.randn(batch, n, dim, generator=g), dim=-1) for n in (size, 2 * tokens))
    w, wt = (F.normalize(torch.randn(out, dim, generator=g), dim=-1) for _ in range(2))
    pick = torch.stack([torch.randint(i * tokens, (i + 1) * tokens, (batch, size), generator=g) for i in (0, 1)], 2)
    return z.requires_grad_(), zt, w.requires_grad_(), wt, pick, torch.zeros(out)


def fused(z: Tensor, zt: Tensor, w: Tensor, wt: Tensor, pick: Tensor, centre: Tensor) -> Tensor:
    """Ours."""
    weights = dist.pair_weights(COUNTS, 2, z.device)
    return dist.region_loss(z, zt, pick, weights, centre, 0.1, 0.04, w, wt)


def gathered(z: Tensor, zt: Tensor, w: Tensor, wt: Tensor, pick: Tensor, centre: Tensor) -> Tensor:
    """As published: all logits, the teacher's softmax gathered to each student token, log-softmax a pair."""
    s = F.linear(z, w)
    with torch.no_grad():
        q = ((F.linear(zt, wt) - centre) / 0.04).softmax(-1)
    sizes = [t for v, t in COUNTS for _ in range(v)]
    total, pairs, starts = 0, 0, torch.tensor([0, *sizes]).cumsum(0).tolist()
    for i in (0, 1):
        for v, size in enumerate(sizes):
            if v == i:
                continue
            rows = slice(starts[v], starts[v] + size)
            target = q.gather(1, pick[:, rows, i, None].expand(-1, -1, q.shape[-1]))
            total = total - (target * F.log_softmax(s[:, rows] / 0.1, -1)).sum(-1).mean()
            pairs += 1
    return total / pairs
