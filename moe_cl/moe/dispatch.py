"""Where tokens go on a rank: sorted by expert (between ranks: ``exchange.py``).

Nothing is padded to a capacity and nothing is dropped. Every movement of rows is a gather: a permutation forwards and
its inverse backwards, so there are no atomic additions and equal inputs give equal bits on any device.

Legend: R rows on this rank, k choices a row, M = assignments (row, expert), E_local experts a rank; id E_local means
"not on this rank".
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass
class Plan:
    """Assignments of rows to local experts in expert order.

    token: (M,) row of each assignment. choice: (M,) its place in the flattened (R*k) choices.
    inverse: (R, k) assignment of each choice, M where the expert is elsewhere. counts: (E_local,) of each expert.
    """

    token: Tensor
    choice: Tensor
    inverse: Tensor
    counts: Tensor


def sort_by_expert(ids_Rk: Tensor, experts: int, complete: bool = True) -> Plan:
    """Group the choices by local expert id; ``complete`` = no id says "elsewhere" (then M = R*k needs no host sync)."""
    flat = ids_Rk.reshape(-1)
    ordered, order = flat.sort(stable=True)
    # Not bincount, which asks the host for its length on CUDA.
    ends = torch.searchsorted(ordered, torch.arange(experts, device=flat.device), right=True)
    counts = ends.diff(prepend=ends.new_zeros(1))
    inverse = torch.empty_like(order)
    inverse[order] = torch.arange(len(order), device=order.device)
    if not complete:
        m = int(counts.sum())
        order, inverse = order[:m], inverse.clamp_(max=m)
    return Plan(order // ids_Rk.shape[1], order, inverse.view_as(ids_Rk), counts)


def gather_sum(values_MD: Tensor, inverse_Rk: Tensor, weights_Rk: Tensor | None = None) -> Tensor:
    """out[r] = sum_j weights[r, j] * values[inverse[r, j]] in one pass, without a copy for each of the k choices."""
    if not inverse_Rk.shape[0] or not values_MD.shape[0]:
        return values_MD.new_zeros(inverse_Rk.shape[0], values_MD.shape[1])
    return torch.nn.functional.embedding_bag(inverse_Rk, values_MD, mode="sum", per_sample_weights=weights_Rk)
