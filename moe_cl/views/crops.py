"""Which patches of two views show the same place (crmoe.md 1.5), for a whole batch and all layers at once.

Shapes: B images, g patches a side, P = g*g patches, token index = row*g + column.
"""

from __future__ import annotations

import torch
from torch import Tensor


def match(boxes1: Tensor, boxes2: Tensor, grid: int, threshold: float = 0.2) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Each patch's best partner in the other view by the overlap (IoU) of the boxes they show.

    Patches of one view are equally large, so IoU grows with the intersection, and the intersection is a product of an
    overlap in x and one in y: the best partner is found a side at a time, B*g*g numbers instead of B*P*P.

    Args:
        boxes1, boxes2: (B, 5) x, y, w, h, flip of the two views, fractions of the original image.
        grid: patches a side, g.
        threshold: a match is valid where its IoU is above it (strictly).

    Returns:
        idx1 (B, P) int64, the index in view 2 of the partner of each patch of view 1 (the first one on ties, 0 where
        nothing overlaps), valid1 (B, P) bool; idx2 and valid2 the same for the patches of view 2. Many-to-one, not
        mutual.
    """
    x1, x2 = _edges(boxes1, 0, grid, boxes1[:, 4] > 0.5), _edges(boxes2, 0, grid, boxes2[:, 4] > 0.5)
    y1, y2 = _edges(boxes1, 1, grid), _edges(boxes2, 1, grid)
    along_x, along_y = _overlap(x1, x2), _overlap(y1, y2)  # (B, g of view 1, g of view 2)
    area1, area2 = (boxes[:, 2] * boxes[:, 3] / grid**2 for boxes in (boxes1, boxes2))
    total = (area1 + area2)[:, None, None]
    return *_best(along_x, along_y, total, threshold), *_best(along_x.mT, along_y.mT, total, threshold)


def _edges(boxes: Tensor, axis: int, grid: int, flip: Tensor | None = None) -> Tensor:
    """(B, g, 2): start and end along an axis of each row or column of patches, mirrored where ``flip``."""
    place = torch.arange(grid, device=boxes.device, dtype=boxes.dtype)[None].expand(len(boxes), grid)
    if flip is not None:
        place = torch.where(flip[:, None], grid - 1 - place, place)
    size = boxes[:, 2 + axis, None] / grid
    start = boxes[:, axis, None] + place * size
    return torch.stack((start, start + size), dim=-1)


def _overlap(a: Tensor, b: Tensor) -> Tensor:
    """(B, g, g): length that intervals a (B, g, 2) and b (B, g, 2) have in common."""
    low = torch.maximum(a[:, :, None, 0], b[:, None, :, 0])
    high = torch.minimum(a[:, :, None, 1], b[:, None, :, 1])
    return (high - low).clamp_min(0)


def _best(along_x: Tensor, along_y: Tensor, total: Tensor, threshold: float) -> tuple[Tensor, Tensor]:
    batch, grid = along_x.shape[:2]
    (wide, column), (tall, row) = along_x.max(-1), along_y.max(-1)
    shared = tall[:, :, None] * wide[:, None, :]  # (B, row, column) of this view's patches
    index = torch.where(shared > 0, row[:, :, None] * grid + column[:, None, :], 0)
    valid = shared > threshold * (total - shared)
    return index.view(batch, -1), valid.view(batch, -1)
