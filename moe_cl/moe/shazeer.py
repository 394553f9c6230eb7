"""The noisy top-k router with learned noise (Shazeer et al. 2017, section 2.1): CR-MoE's code default, not its recipe.

Shapes: N rows, T tokens a row, D width, E experts, k choices a token.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moe_cl.config import MoEConfig
from moe_cl.moe.router import Router, Routing

_FLOOR = 0.01  # smallest noise


class ShazeerRouter(Router):
    """clean = x W; in training noisy = clean + eps (softplus(x W_noise) + 0.01); weights = softmax over the k largest.

    The balance's load is smooth in training: the chance to stay among the k best under a new draw. ``noise_weight``
    (D, E) starts at 0, ``moe.noise_std`` and ``moe.renormalize`` are not read.
    """

    def __init__(self, dim: int, moe: MoEConfig, layer: int = 0, seed: int = 0):
        super().__init__(dim, moe, layer, seed)
        self.noise_weight = nn.Parameter(torch.zeros(dim, moe.experts))
        self.noise_std = float(self.experts)  # a teacher without noise sets it to 0, as of every router

    def forward(self, x_NTD: Tensor, keys_N: Tensor | None = None) -> Routing:
        n, t, _ = x_NTD.shape
        wide = torch.float64 if x_NTD.dtype == torch.float64 else torch.float32
        with torch.autocast(x_NTD.device.type, enabled=False):
            x = x_NTD.to(wide)
            clean = x @ self.weight.to(wide)
            noisy, load = clean, None
            draws = self.training and self.noise_std > 0
            if draws:
                std = F.softplus(x @ self.noise_weight.to(wide)) + _FLOOR
                noisy = clean + std * self._noise(keys_N, n, t, wide)
            logits, indices = noisy.topk(self.top_k, dim=-1)
            if draws and self.top_k < self.experts:
                load = self._smooth_load(clean, noisy, noisy, std)
            z_loss = self.z_coefficient * noisy.logsumexp(-1).square().mean(1) if self.z_coefficient else None
            return Routing(indices, logits.softmax(-1), self.experts, noisy.softmax(-1), load, z_loss)
