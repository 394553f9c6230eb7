"""Load balancing of experts: CV^2 of importance and of load, per layer and per view (crmoe.md 1.4; V-MoE, Riquelme et
al. 2021, section 2.4, without its factor 1/2).

L layers, V views, B samples a rank, T tokens, k experts a token, E experts, N = V*B rows.
"""

from __future__ import annotations

import torch
from torch import Tensor

from moe_cl.comm import Comm
from moe_cl.losses import groups
from moe_cl.losses.precision import full_precision, wide


@full_precision
def expert_sums(indices: Tensor, weights: Tensor, experts: int, load: Tensor | None = None) -> Tensor:
    """(N, 2, E): each row's importance (sum of combine weights) and load, summed over its tokens.

    Args:
        indices, weights: (N, T, k), a token's k experts distinct. load: (N, E) smooth load with graph; None = the hard
            count, without gradient.
    """
    gates = wide(weights)
    # A token's experts differ, so each value has a place of its own: no additions whose order a GPU would choose.
    dense = gates.new_zeros(*gates.shape[:2], experts).scatter(2, indices, gates)
    if load is None:
        # an expert whose weight underflowed to 0 does not count, as in the published code
        load = (dense.detach() > 0).sum(1, dtype=gates.dtype)
    return torch.stack([dense.sum(1), wide(load)], dim=1)


def cv2(x: Tensor) -> Tensor:
    """Squared coefficient of variation over the last dim: unbiased variance / (mean^2 + 1e-10)."""
    if x.shape[-1] == 1:
        return x[..., 0] * 0
    return x.var(-1) / (x.mean(-1).square() + 1e-10)


@full_precision
def balance(sums: Tensor, comm: Comm, statistics: str = "global") -> tuple[Tensor, Tensor]:
    """Loss (scalar) and its parts (L, V, 2), CV^2 of importance and of load.

    Args:
        sums: (L, V, B, 2, E) from ``expert_sums``. statistics: see ``groups``; ``global`` takes one packed all-reduce.
    Returns: sum over layers and views, mean over groups (this rank's share: ranks are averaged).
    """
    return balance_and_counts(sums, None, comm, statistics)[:2]


@full_precision
def balance_and_counts(
    sums: Tensor, counts: Tensor | None, comm: Comm, statistics: str = "global"
) -> tuple[Tensor, Tensor, Tensor | None]:
    """``balance``, and the sums over each group of ``counts`` (B, ...), which travel in the same message."""
    group = groups.make(statistics, sums.shape[2], comm, sums.device)
    beside = () if counts is None else (counts,)
    per_group, *counted = group.sum(sums.movedim(2, 0), *beside, comm=comm)  # (G, L, V, 2, E)
    parts = cv2(per_group).mean(0)
    return parts.sum(), parts.detach(), counted[0] if counted else None
