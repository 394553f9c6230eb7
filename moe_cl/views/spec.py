"""What views are made of a sample, and the batch they arrive in."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass
class Batch:
    """B samples on this rank, V views each, grouped by resolution r.

    views: one tensor (V_r*B, C, H_r, W_r) a resolution, view-major (all samples of view 0, then of view 1 ...),
    global views first. boxes: (V, B, 5) x, y, w, h, flip as fractions of the original image (crmoe.md 1.5).
    sample_ids: (B,) int64. labels: (B,) int64, -1 where unknown. positions: (B,) int64, place in the epoch's order.
    keys: (V*B,) int64 counter-based random keys, view-major, or None (router noise, drop-path).
    """

    views: list[Tensor]
    boxes: Tensor
    sample_ids: Tensor
    labels: Tensor
    positions: Tensor
    keys: Tensor | None = None
