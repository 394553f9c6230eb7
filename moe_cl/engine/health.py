"""One small packed all-reduce a step: is every rank's loss finite, is a stop asked for, samples, the metrics' means.

Also what is left behind when a loss is not finite.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from moe_cl.comm import Comm
from moe_cl.engine import flat


class NonFiniteLoss(RuntimeError):
    """A loss or gradient is not finite on some rank; raised on every rank together, before anything was updated."""


@dataclass
class Agreed:
    """metrics: means over ranks, on the CPU, any shape. digest: sums over ranks of the digest's parts.

    stop: some rank was asked to stop.
    """

    metrics: dict[str, Tensor]
    digest: Tensor
    stop: bool = False


def agree(
    comm: Comm, loss: Tensor, metrics: dict[str, Tensor], digest: Tensor, step: int, stop: bool = False
) -> Agreed:
    """Means of ``metrics`` and sums of ``digest`` over ranks; raises NonFiniteLoss on all ranks if one is not finite.

    Packed in float64: digests are sums of 16-bit parts and must not round. One message, one host read.
    """
    names = list(metrics)
    parts = [metrics[name].detach().to(torch.float64).reshape(-1) for name in names]
    value = loss.detach().to(torch.float64).reshape(1)
    asked = value.new_full((1,), float(stop))
    bad = torch.stack([(~torch.isfinite(x)).any() for x in (value, *parts)]).to(torch.float64)
    # Non-finite values would spread through the sums: the flags carry the news, the sums carry zeros.
    packed = torch.cat([asked, bad, digest.to(value), *parts]).nan_to_num(0.0, 0.0, 0.0)
    summed = comm.all_reduce(packed).cpu()  # a wait for the device; the gradients' norm (clip.py) is the step's other
    stop_of, bad_of, digest_of, *means = summed.split([1, 1 + len(names), digest.numel(), *(p.numel() for p in parts)])
    if bad_of[0] > 0:
        anywhere = [name for name, count in zip(names, bad_of[1:].tolist(), strict=True) if count and name != "loss"]
        mine = [name for name, flag in zip(names, bad[1:].tolist(), strict=True) if flag]
        who = f"this rank's own: {', '.join(mine) or 'loss'}" if bad[0] else "all finite on this rank"
        raise NonFiniteLoss(
            f"step {step}: the loss is not finite on {int(bad_of[0])} of {comm.world} ranks ({who}); "
            f"over all ranks: {', '.join(anywhere) or 'only the sum of its terms'}"
        )
    out = {name: (mean / comm.world).view(metrics[name].shape) for name, mean in zip(names, means, strict=True)}
    return Agreed(out, digest_of, bool(stop_of > 0))


@torch.no_grad()
def explain(
    out: str | Path,
    rank: int,
    step: int,
    error: NonFiniteLoss,
    batches: Sequence[Any],
    student: nn.Module,
    optimizer: Any = None,
    comm: Comm | None = None,
) -> None:
    """Write what explains a non-finite step of this rank into ``OUT/nonfinite-step-N/rank-R.json``; a note on ``error``
    says where that is, or why the disk refused it.

    The samples (ids, positions, whether their views are finite, their extremes) and every parameter that is not finite
    or has a gradient that is not, with the largest values of the others: enough to run the step again by itself. Of
    what ZeRO has cut up, this rank's part.

    Args:
        student: the trained network. optimizer: the engine's, which holds the gradients (None: the parameters do).
        comm: all ranks.
    """
    weights = {name: _extremes(flat.local(p)[1]) for name, p in student.named_parameters()}
    largest = sorted(weights, key=lambda n: -weights[n].get("max", 0.0))[:10]
    tree = {
        "error": str(error),
        "step": step,
        "rank": rank,
        "batches": [
            {
                "sample_ids": batch.sample_ids.tolist(),
                "positions": batch.positions.tolist(),
                "views": [_extremes(x) for x in batch.views],
            }
            for batch in batches
        ],
        "parameters_not_finite": [name for name, w in weights.items() if not w["finite"]],
        "gradients_not_finite": [name for name, g in _gradients(student, optimizer, comm) if not g.isfinite().all()],
        "largest_parameters": {name: weights[name] for name in largest},
    }
    path = Path(out) / f"nonfinite-step-{step}" / f"rank-{rank:05d}.json"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(tree, indent=1))
    except OSError as refused:
        error.add_note(f"what explains it could not be written ({path}: {refused.strerror})")
        return
    error.add_note(f"what explains it is in {path.parent}")


def _gradients(student: nn.Module, optimizer: Any, comm: Comm | None) -> Iterator[tuple[str, Tensor]]:
    """Names and gradients that are here: the parameters' own, or what ZeRO keeps of their mean over ranks."""
    if optimizer is None:
        yield from ((name, p.grad) for name, p in student.named_parameters() if p.grad is not None)
        return
    view = flat.FlatView(student, optimizer, comm)
    for fragment in view.fragments:
        if (gradient := view.gradient(fragment)) is not None:
            yield fragment.name, gradient


def _extremes(x: Tensor) -> dict[str, Any]:
    finite = bool(torch.isfinite(x).all())
    if not finite or not x.numel():
        return {"finite": finite, "shape": list(x.shape)}
    return {"finite": True, "max": float(x.abs().max()), "mean": float(x.float().mean()), "shape": list(x.shape)}
