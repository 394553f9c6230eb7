"""What the routers do, as cheap device tensors without host reads."""

from __future__ import annotations

import torch
from torch import Tensor

from moe_cl.models.build import Encoded


@torch.no_grad()
def summarize(encoded: Encoded, views: int, batch: int, match: object = None) -> dict[str, Tensor]:
    """``moe/L{l}/load``: (E,) share of the routed (token, expert) pairs, of the first resolution's layers."""
    out = {}
    for number, routing in enumerate(encoded.routing[0] if encoded.routing else []):
        counts = torch.bincount(routing.indices.reshape(-1), minlength=routing.experts)
        out[f"moe/L{number}/load"] = counts / counts.sum().clamp(min=1)
    return out
