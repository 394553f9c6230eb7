"""What the routers of a step did, layer by layer, as small tensors on the device: nothing here waits for the host.

Legend: N = V*B rows (view-major), T tokens a row (class token first), k choices, E experts, P patches.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from moe_cl.moe.router import Routing

if TYPE_CHECKING:
    from moe_cl.models.build import Encoded

Match = tuple[Tensor, ...]  # idx1 (B, P), valid1 (B, P), ... of moe_cl.views.crops.match


@torch.no_grad()
def summarize(encoded: Encoded, views: int, batch: int, match: Match | None = None) -> dict[str, Tensor]:
    """Figures of every MoE layer l under ``moe/L{l}/``, this rank's tokens of one loss (``joined`` and ``whole_step``
    make a step's of them).

    load, importance: (E,) each expert's share of the assignments and of the summed weights. entropy: mean entropy of
    the router's softmax in nats, in [0, log E]. margin: mean p_1st - p_2nd. agreement_cls: mean share of the k experts
    that the class tokens of views 0 and 1 have in common, in [0, 1]; agreement_patch: the same for matched patches.
    sent: rows that the forward sent to other ranks.

    Args:
        encoded: the student's, of one forward or joined from several.
        views: V and ``batch``: B of the first resolution, whose rows are V*B.
        match: view 0's best patch of view 1 and whether it counts; None leaves agreement_patch out.
    """
    out: dict[str, Tensor] = {}
    for layer, resolutions in enumerate(zip(*encoded.routing, strict=True)):
        for name, value in _layer(list(resolutions), views, batch, match).items():
            out[f"moe/L{layer}/{name}"] = value
    return out


def joined(name: str, values: Tensor) -> Tensor:
    """A rank's figure of a step from those of its micro-batches (M, ...): their sum for rows sent, else their mean."""
    return values.double().sum(0) if _is(name, "sent") else values.mean(0)


def whole_step(metrics: Mapping[str, Tensor], world: int) -> dict[str, Tensor]:
    """What a mean over ranks cannot say, from such means: nothing is sent for it, nothing waits for a device.

    dead: experts without a token in the whole step. Shares of the load are not negative, so their mean over ranks and
    micro-batches is 0 only where every one of them is. sent: rows that all ranks sent to others in the forwards.

    Args:
        metrics: means over ``world`` ranks, on the CPU (``moe_cl.engine.health.agree``).
    """
    out = {}
    for name, value in metrics.items():
        if _is(name, "load"):
            out[f"{name.removesuffix('load')}dead"] = (value == 0).sum().to(value.dtype)
        elif _is(name, "sent"):
            out[name] = (value * world).round()
    return out


def _is(name: str, figure: str) -> bool:
    return name.startswith("moe/") and name.endswith(f"/{figure}")


def _layer(parts: list[Routing], views: int, batch: int, match: Match | None) -> dict[str, Tensor]:
    first = parts[0]
    ids = torch.cat([p.indices.flatten() for p in parts])
    weights = torch.cat([p.weights.flatten() for p in parts])
    # A product with one-hot rows instead of bincount: bincount asks the host for its length on CUDA.
    onehot = (ids[:, None] == torch.arange(first.experts, device=ids.device)).to(weights.dtype)
    count, importance = onehot.sum(0), weights @ onehot
    out = {
        "load": count / count.sum().clamp(min=1),
        "importance": importance / importance.sum().clamp(min=torch.finfo(weights.dtype).tiny),
        "sent": torch.full((), float(sum(p.sent for p in parts)), device=ids.device),
    }
    if all(p.probabilities is not None for p in parts):
        p = torch.cat([part.probabilities.flatten(0, 1) for part in parts])
        tokens = max(len(p), 1)
        out["entropy"] = torch.special.entr(p).sum() / tokens
        if first.experts > 1:
            best = p.topk(2, dim=-1).values
            out["margin"] = (best[:, 0] - best[:, 1]).sum() / tokens
    if views >= 2 and len(first.indices) >= 2 * batch > 0:  # a query encoder sees one of the views
        one, two = first.indices[:batch], first.indices[batch : 2 * batch]
        out["agreement_cls"] = _in_common(one[:, 0], two[:, 0]).mean()
        if match is not None:
            idx, valid = match[0], match[1]
            partner = two[:, 1:].gather(1, idx[:, :, None].expand(-1, -1, two.shape[-1]))
            common = _in_common(one[:, 1:], partner) * valid
            out["agreement_patch"] = common.sum() / valid.sum().clamp(min=1)
    return out


def _in_common(a: Tensor, b: Tensor) -> Tensor:
    """(..., k) and (..., k) expert ids -> (...) share of a's that b has too."""
    return (a[..., :, None] == b[..., None, :]).any(-1).float().mean(-1)
