"""The tiny encoder of the golden files: y = relu(BN(x stem'))."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from moe_cl.comm import Comm
from moe_cl.models.build import Encoded
from moe_cl.models.norm import BatchNorm


class TinyNet(nn.Module):
    """A backbone like any other: list of views in, Encoded out."""

    def __init__(self, inputs: int, dim: int, comm: Comm | None = None):
        super().__init__()
        self.dim = dim
        self.stem, self.bn = nn.Linear(inputs, dim, bias=False), BatchNorm(dim, comm=comm)

    def forward(self, views: list[Tensor], keys: Tensor | None = None, counts: list[int] | None = None) -> Encoded:
        """Rows of all views -> features."""
        return Encoded(torch.relu(self.bn(self.stem(torch.cat(views)), sum(counts or [1]))))
