"""Signs of collapse, cheap and without a host sync: 0-d tensors for the journal."""

from __future__ import annotations

import torch
from torch import Tensor

from moe_cl.losses.precision import full_precision, unit

RANK_EVERY = 50  # steps between effective ranks: an eigenvalue problem each


@torch.no_grad()
@full_precision
def feature_std(z: Tensor) -> Tensor:
    """Standard deviation over rows of the normalised features (n, D), times sqrt(D): about 1 spread, 0 collapsed."""
    return unit(z).std(0, unbiased=False).mean() * z.shape[1] ** 0.5


@torch.no_grad()
@full_precision
def effective_rank(z: Tensor) -> Tensor:
    """exp of the entropy of the singular values of the normalised features (n, D) (Roy and Vetterli 2007)."""
    z = unit(z)
    gram = z @ z.t() if len(z) < z.shape[1] else z.t() @ z
    singular = torch.linalg.eigvalsh(gram).clamp_min(0).sqrt()
    p = singular / singular.sum().clamp_min(1e-12)
    return torch.exp(-torch.special.xlogy(p, p).sum())


def features(z: Tensor, step: int) -> dict[str, Tensor]:
    """Spread of ``z`` (n, D) each step, its effective rank every ``RANK_EVERY`` steps."""
    out = {"health/feature_std": feature_std(z)}
    if step % RANK_EVERY == 0:
        out["health/effective_rank"] = effective_rank(z)
    return out
