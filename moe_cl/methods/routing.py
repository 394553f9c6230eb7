"""From the routing of a backbone's MoE layers to the losses on it, the same for every method."""

from __future__ import annotations

import torch
from torch import Tensor

from moe_cl.comm import Comm
from moe_cl.losses.balance import balance_and_counts, expert_sums
from moe_cl.models.build import Encoded


def balance_sums(encoded: Encoded, batch: int) -> Tensor | None:
    """(L, V, B, 2, E) importance and load of every row, views of all resolutions in order; None without MoE."""
    per_resolution = [
        torch.stack([
            expert_sums(r.indices, r.weights, r.experts, r.load).view(-1, batch, 2, r.experts) for r in layers
        ])
        for layers in encoded.routing
        if layers
    ]  # fmt: skip
    return torch.cat(per_resolution, 1) if per_resolution else None


def terms(encoded: Encoded, batch: int, comm: Comm, weight: float, statistics: str) -> dict[str, Tensor]:
    """Weighted losses on the student's routing, with graph; empty without MoE.

    ``loss/balance``: over layers and views (crmoe.md 1.4). ``loss/router_z``: the routers' own z-loss, where asked for.
    """
    return terms_and_counts(encoded, batch, comm, weight, statistics)[0]


def terms_and_counts(
    encoded: Encoded, batch: int, comm: Comm, weight: float, statistics: str, counts: Tensor | None = None
) -> tuple[dict[str, Tensor], Tensor | None]:
    """``terms``, and ``counts`` (B, ...) summed over each group, in the balance's message (None: it sent none)."""
    out, counted = {}, None
    sums = balance_sums(encoded, batch) if weight else None
    if sums is not None:
        total, _, counted = balance_and_counts(sums, counts, comm, statistics)
        out["loss/balance"] = weight * total
    z = [r.z_loss.mean() for layers in encoded.routing for r in layers if r.z_loss is not None]
    if z:
        out["loss/router_z"] = torch.stack(z).sum()
    return out, counted


def sparse_gates(encoded: Encoded, views: int, activation: str) -> tuple[Tensor, Tensor, int]:
    """(L, V, B, T, k) expert ids and gate values of the first resolution's layers, and E.

    ``activation``: ``gated`` = the k kept weights, ``softmax`` = all E probabilities.
    """
    layers = encoded.routing[0]
    experts = layers[0].experts
    if activation == "softmax":
        values = torch.stack([r.probabilities for r in layers])
        ids = torch.arange(experts, device=values.device).expand(values.shape)
    else:
        values, ids = torch.stack([r.weights for r in layers]), torch.stack([r.indices for r in layers])
    shape = (len(layers), views, -1, *values.shape[2:])
    return ids.reshape(shape), values.reshape(shape), experts
