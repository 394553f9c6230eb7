"""SimCLR's NT-Xent over all ranks, gradient through the gather (Chen et al. 2020, Eq. 1)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from moe_cl.comm import Comm
from moe_cl.losses.info_nce import Contrast
from moe_cl.losses.precision import full_precision, unit


@full_precision
def ntxent(z0: Tensor, z1: Tensor, temperature: float, comm: Comm) -> Contrast:
    """Mean over this rank's 2N rows; each row against the 2NW - 1 others, the other view of its sample positive.

    Args:
        z0, z1: (N, C) of the two views, not normalised.
    """
    rows, width = z0.shape
    own = torch.cat([unit(z0), unit(z1)], 1)
    all_MC = comm.all_gather_grad(own).view(-1, 2, width)  # (N*W, view, C)
    keys = torch.cat(all_MC.unbind(1))
    total = len(all_MC)
    at = torch.arange(rows, device=z0.device) + rows * comm.rank
    logits = torch.cat(own.split(width, 1)) @ keys.t() / temperature
    itself, other = torch.cat([at, at + total])[:, None], torch.cat([at + total, at])[:, None]
    with torch.no_grad():
        positive = logits.gather(1, other).mean()
        negative = (logits.sum(1).mean() - positive - 1 / temperature) / max(2 * total - 2, 1)
    loss = F.cross_entropy(logits.scatter(1, itself, float("-inf")), other[:, 0])
    return Contrast(loss, positive * temperature, negative * temperature)
