"""Joint contrastive learning (Cai et al., NeurIPS 2020): a closed-form bound for infinitely many positive keys.

N rows a rank, M keys a row, C width, K queue length, T temperature.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from moe_cl.losses.info_nce import first_is_positive
from moe_cl.losses.precision import full_precision, unit, wide


@dataclass
class Joint:
    """``loss`` = ``cross_entropy`` + ``covariance``, scalars with graph. logits: (N, 1+K). mean: (N, C) of the keys,
    not re-normalised, for the queue. quadratic: (N,) q' Sigma q."""

    loss: Tensor
    cross_entropy: Tensor
    covariance: Tensor
    logits: Tensor
    mean: Tensor
    quadratic: Tensor


def ramp(weight: float, epoch: int, epochs: float) -> float:
    """lambda * (e + 1) / E, e the whole epoch from 0: the released script's ramp."""
    return weight * min((epoch + 1) / epochs, 1.0)


@full_precision
def joint(q: Tensor, keys: Tensor, queue: Tensor, temperature: float, weight: float) -> Joint:
    """Eq. 8: mean_i { -q'mu/T + log[exp(q'mu/T + lambda/(2T^2) q'Sigma q) + sum_j exp(q'k_j/T)] }.

    q' Sigma q = mean_m (q'(k_m - mu))^2, so the C x C covariance is never formed. mu and Sigma carry no gradient.

    Args:
        q: (N, C), not normalised. keys: (M, N, C), not normalised. queue: (C, K). weight: lambda.
    """
    q, keys = unit(q), unit(keys.detach())
    mean_NC = keys.mean(0)
    quadratic_N = torch.einsum("nc,mnc->mn", q, keys - mean_NC).square().mean(0)
    bonus_N = weight / (2 * temperature**2) * quadratic_N
    positive_N = (q * mean_NC).sum(1) / temperature + bonus_N
    logits = torch.cat([positive_N[:, None], q @ wide(queue) / temperature], 1)
    cross_entropy, covariance = first_is_positive(logits), bonus_N.mean()
    return Joint(cross_entropy + covariance, cross_entropy, covariance, logits, mean_NC, quadratic_N.detach())
