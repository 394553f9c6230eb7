"""One small packed all-reduce a step: is every rank's loss finite, which samples were used, the metrics' means."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from moe_cl.comm import Comm


class NonFiniteLoss(RuntimeError):
    """A loss term is not finite on some rank; raised on every rank together, before anything was updated."""


@dataclass
class Agreed:
    """metrics: means over ranks, on the CPU, any shape. digest: sums over ranks of the digest's parts."""

    metrics: dict[str, Tensor]
    digest: Tensor


def agree(comm: Comm, loss: Tensor, metrics: dict[str, Tensor], digest: Tensor, step: int) -> Agreed:
    """Means of ``metrics`` and sums of ``digest`` over ranks; raises NonFiniteLoss on all ranks if one is not finite.

    Packed in float64: digests are sums of 16-bit parts and must not round. One message, one host read (the flag).
    """
    names = list(metrics)
    parts = [metrics[name].detach().to(torch.float64).reshape(-1) for name in names]
    value = loss.detach().to(torch.float64).reshape(1)
    bad = (~torch.isfinite(value)).to(torch.float64)
    # Non-finite values would spread through the sums: the flag carries the news, the sums carry zeros.
    packed = torch.cat([bad, digest.to(value), *parts]).nan_to_num(0.0, 0.0, 0.0)
    summed = comm.all_reduce(packed).cpu()  # the one wait for the device in a step
    if summed[0] > 0:
        mine = [name for name, part in zip(names, parts, strict=True) if not torch.isfinite(part).all()]
        who = "this rank's own: " + (", ".join(mine) or "loss") if bad.item() else "all finite on this rank"
        raise NonFiniteLoss(f"step {step}: the loss is not finite on {int(summed[0])} of {comm.world} ranks ({who})")
    counts = summed[1 + digest.numel() :] / comm.world
    out = {
        name: part.view(metrics[name].shape)
        for name, part in zip(names, counts.split([p.numel() for p in parts]), strict=True)
    }
    return Agreed(out, summed[1 : 1 + digest.numel()])
