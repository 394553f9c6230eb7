"""The router: which experts a token goes to, and with what weight.

Shapes: N rows (view-major images), T tokens a row, D width, E experts, k choices a token.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from moe_cl import rng
from moe_cl.config import ConfigError, MoEConfig

_NOISE = 0x6E6F6973  # purpose of the keys: router noise, apart from drop-path's


@dataclass
class Routing:
    """What one MoE layer decided for one forward: N = V_r*B rows (view-major), T tokens a row, k experts a token.

    indices: (N, T, k) int64 global expert ids, best first. weights: (N, T, k) combine weights, with graph.
    experts: E. probabilities: (N, T, E) softmax over experts, with graph (autograd holds it for the softmax anyway).
    load: (N, E) smooth load summed over a row's tokens, with graph; None without noise (then the count is the load).
    z_loss: (N,) mean over a row's tokens of log(sum(exp(logits)))^2 times the configured coefficient, with graph;
    None when that coefficient is 0. sent: token rows this rank sent to other ranks in the forward.
    """

    indices: Tensor
    weights: Tensor
    experts: int
    probabilities: Tensor | None = None
    load: Tensor | None = None
    z_loss: Tensor | None = None
    sent: int = 0


class Router(nn.Module):
    """V-MoE's noisy top-k (Riquelme et al. 2021, section 2 and appendix A), weights not renormalised unless asked.

    clean = x W;  noisy = clean + sigma eps, sigma = noise_std/E in training and 0 in evaluation;  p = softmax(noisy);
    the k largest p are the weights. Everything is computed in fp32 (fp64 for fp64 input), also under autocast.
    ``weight`` (D, E) ~ U(-1/sqrt(E), 1/sqrt(E)) as in the published CR-MoE code, whose layers start peaked.

    Args:
        dim: D.
        moe: experts, top_k, noise_std, renormalize, z_loss and load are read.
        layer: index of the MoE layer, part of the noise keys and of the seed.
        seed: of the initial weights.
    """

    def __init__(self, dim: int, moe: MoEConfig, layer: int = 0, seed: int = 0):
        super().__init__()
        if not 1 <= moe.top_k <= moe.experts:
            raise ConfigError(f"moe.top_k={moe.top_k}: set it between 1 and moe.experts={moe.experts}")
        self.experts, self.top_k, self.layer = moe.experts, moe.top_k, layer
        self.noise_std, self.renormalize, self.z_coefficient = moe.noise_std, moe.renormalize, moe.z_loss
        self.load: Literal["corrected", "published"] = moe.load
        bound = 1.0 / math.sqrt(moe.experts)
        self.weight = nn.Parameter(torch.empty(dim, moe.experts))
        if not self.weight.is_meta:  # a network of shapes alone has nothing to draw
            generator = torch.Generator().manual_seed(init_seed(seed, layer, -1))
            nn.init.uniform_(self.weight, -bound, bound, generator=generator)

    def forward(self, x_NTD: Tensor, keys_N: Tensor | None = None) -> Routing:
        """Routing of every token. ``keys_N`` int64 is needed where there is noise: training with noise_std > 0."""
        n, t, d = x_NTD.shape
        wide = torch.float64 if x_NTD.dtype == torch.float64 else torch.float32
        with torch.autocast(x_NTD.device.type, enabled=False):
            clean = (x_NTD.reshape(n * t, d).to(wide) @ self.weight.to(wide)).view(n, t, self.experts)
            sigma = self.noise_std / self.experts if self.training else 0.0
            noisy = clean + sigma * self._noise(keys_N, n, t, wide) if sigma else clean
            probabilities = noisy.softmax(-1)
            weights, indices = probabilities.topk(self.top_k, dim=-1)
            load = (
                self._smooth_load(clean, noisy, probabilities, sigma) if sigma and self.top_k < self.experts else None
            )
            if self.renormalize:
                weights = weights / weights.sum(-1, keepdim=True)
            z_loss = self.z_coefficient * noisy.logsumexp(-1).square().mean(1) if self.z_coefficient else None
        return Routing(indices, weights, self.experts, probabilities, load, z_loss)

    def _noise(self, keys_N: Tensor | None, n: int, t: int, dtype: torch.dtype) -> Tensor:
        if keys_N is None:
            raise ValueError("router noise needs the samples' keys: pass keys (N,) int64, or set moe.noise_std=0")
        return rng.normal(rng.fold(keys_N, self.layer, _NOISE), (t, self.experts), dtype)

    def _smooth_load(self, clean: Tensor, noisy: Tensor, probabilities: Tensor, sigma: float) -> Tensor:
        """(N, E): chance that an expert stays among the k best if its noise alone is drawn again, summed over tokens.

        V-MoE appendix A: threshold = the k-th largest of the *other* experts' noisy logits. ``published`` takes the
        thresholds from the softmax but compares logits with them, as the released CR-MoE code does.
        """
        space = noisy if self.load == "corrected" else probabilities
        top = space.topk(self.top_k + 1, dim=-1).values
        inside, outside = top[..., -1:], top[..., -2:-1]
        threshold = torch.where(noisy > inside, inside, outside)
        return torch.special.ndtr((clean - threshold) / sigma).sum(1)


def init_seed(seed: int, layer: int, expert: int) -> int:
    """Seed of one expert's (or, with -1, the router's) initial weights: by global id, the same in every layout."""
    return int(rng.fold(torch.tensor([seed]), layer, expert + 1)[0]) & ((1 << 63) - 1)
