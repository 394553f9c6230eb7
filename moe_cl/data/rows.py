"""The tensors of a micro-batch, filled sample by sample while its views are still in the processor's cache."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.utils.data import get_worker_info


class Rows:
    """What ``moe_cl.views.spec.collate`` gives for ``samples`` samples, without holding their views until the end.

    In a loading process the memory is shared with the training process from the start, so the batch is written once and
    not copied on its way.
    """

    def __init__(self, samples: int):
        self.samples = samples
        self._views: list[Tensor] = []  # (V_r, B, C, H_r, W_r) a resolution
        self._boxes: list[Tensor] = []

    def add(self, views: Sequence[Tensor], boxes: Tensor) -> None:
        """The next sample's V views, equal shapes side by side, and boxes (V, 5)."""
        if not self._boxes:
            groups = [(shape, len(list(same))) for shape, same in itertools.groupby(v.shape for v in views)]
            self._views = [_empty((count, self.samples, *shape), views[0].dtype) for shape, count in groups]
        slot, rest = len(self._boxes), iter(views)
        for rows in self._views:
            for view in rows[:, slot]:
                view.copy_(next(rest))
        self._boxes.append(boxes)

    def finish(self) -> tuple[list[Tensor], Tensor]:
        """One (V_r*B, C, H_r, W_r) a resolution, view-major, and boxes (V, B, 5)."""
        return [rows.flatten(0, 1) for rows in self._views], torch.stack(self._boxes, dim=1)


def _empty(shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    if get_worker_info() is None:
        return torch.empty(shape, dtype=dtype)
    # as torch's own default_collate does it; share_memory_() would copy
    size = torch.Size(shape).numel() * dtype.itemsize
    storage = torch.UntypedStorage._new_shared(size, device="cpu")
    return torch.empty(0, dtype=dtype).set_(storage, 0, torch.Size(shape))
