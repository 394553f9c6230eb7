"""The tiny encoder of the golden files: y = relu(BN(x stem')), and the names its states go by there."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
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


def load(module: nn.Module, arrays: Mapping[str, np.ndarray], names: Mapping[str, str]) -> None:
    """Copy golden arrays into ``module``: golden prefix -> our prefix; every tensor of the module must be given."""
    state = {}
    for name, value in arrays.items():
        for theirs, ours in names.items():
            if name.startswith(theirs):
                state[ours + name.removeprefix(theirs)] = torch.from_numpy(np.asarray(value))
    module.load_state_dict(state, strict=True)


def under(arrays: Mapping[str, np.ndarray], prefix: str) -> dict[str, np.ndarray]:
    """The arrays whose name starts with ``prefix``, without it."""
    return {k.removeprefix(prefix): arrays[k] for k in arrays if k.startswith(prefix)}
