"""Over which samples the statistics of balance and consistency are taken: G groups of the global batch.

``global``: one group. ``published``: one a rank (what the published code does). ``group: N``: groups of N images, equal
to ``published`` on as many ranks as there are groups. Sample i of rank r stands at place r + i*W of the global batch
(ranks take positions in turn) and belongs to group (r + i*W) mod G, so a group does not depend on W.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

import torch
from torch import Tensor

from moe_cl.comm import Comm
from moe_cl.config import ConfigError


def parse(statistics: str) -> int | str:
    """``global``, ``published`` or the N of ``group: N``. Raises ConfigError."""
    if statistics in ("global", "published"):
        return statistics
    found = re.fullmatch(r"group:\s*([1-9]\d*)", statistics)
    if not found:
        raise ConfigError(f"engine.statistics: {statistics!r} is not global, published or 'group: N' (images)")
    return int(found[1])


def check(statistics: str, total: int) -> int | str:
    """``parse``, for batches of ``total`` images over all ranks. Raises ConfigError when groups cannot be equal."""
    kind = parse(statistics)
    if isinstance(kind, int) and total % kind:
        raise ConfigError(
            f"engine.statistics: groups of {kind} images do not divide the {total} of a micro-batch over all ranks; "
            "take global, or a group that does"
        )
    return kind


@dataclass
class Groups:
    """``count``: G over all ranks. ``ids``: (B,) group of each local sample, from 0. ``slots``: how many this rank
    keeps (its own ones when every group lies on one rank, else all G). ``shared``: groups span ranks."""

    count: int
    ids: Tensor
    slots: int
    shared: bool

    def sum(self, *parts: Tensor, comm: Comm) -> list[Tensor]:
        """Per-sample values (B, ...) -> sums over each group (slots, ...), over ranks where groups span them: one
        all-reduce for all of ``parts``, in the dtype of the first.

        The gradient is that of the mean over ranks: values are the global sums, and each rank's backward carries W
        times its own rows, which the average over ranks undoes.
        """
        # A product with one-hot rows: index_add on a GPU adds in an order of its own, other bits each time.
        member = (self.ids == torch.arange(self.slots, device=self.ids.device)[:, None]).to(parts[0].dtype)
        local = [(member @ x.flatten(1).to(member.dtype)).view(self.slots, *x.shape[1:]) for x in parts]
        if not self.shared:
            return local
        packed = comm.all_reduce(torch.cat([x.detach().flatten() for x in local]))
        totals = [t.view_as(x) for t, x in zip(packed.split([x.numel() for x in local]), local, strict=True)]
        return [
            total + comm.world * (x - x.detach()) if x.requires_grad else total
            for total, x in zip(totals, local, strict=True)
        ]

    def weights(self, valid: Tensor, counts: Tensor, comm: Comm) -> Tensor:
        """bool (B, V, P) and how many are true in each group (slots, V) -> weights whose sum over ranks / W is the mean
        over groups of the mean over valid entries, for each of V.

        A group without a valid entry weighs 0 (the published code gives nan there).
        """
        return valid * (comm.world / self.count / counts.clamp_min(1))[self.ids][:, :, None]


def make(statistics: str, samples: int, comm: Comm, device: torch.device) -> Groups:
    """Groups of a local batch of ``samples``. Raises ConfigError when groups cannot be equal."""
    kind, total = check(statistics, samples * comm.world), samples * comm.world
    count = {"global": 1, "published": comm.world}.get(kind, 0) if isinstance(kind, str) else total // kind
    ids = (comm.rank + torch.arange(samples, device=device) * comm.world) % count
    if count % comm.world == 0:  # every group lies on one rank: group g on rank g mod W
        return Groups(count, ids // comm.world, count // comm.world, False)
    return Groups(count, ids, count, True)
