"""Projectors and predictors: MoCo v1/v2, MoCo v3, SimCLR, and DINO's head with weight-normalised prototypes.

Every head is called as ``head(x, views)`` with x (V*B, D) view-major; batch norm takes its statistics per view, and
over ``comm``'s ranks where one is given.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moe_cl.comm import Comm
from moe_cl.models.norm import BatchNorm


class Head(nn.Sequential):
    """Layers in a row; batch norms are told how many views the rows hold. State-dict names as nn.Sequential."""

    def forward(self, x: Tensor, views: int = 1) -> Tensor:
        """(V*B, D) -> (V*B, out)."""
        for layer in self:
            x = layer(x, views) if isinstance(layer, BatchNorm) else layer(x)
        return x


def mlp_v3(
    dim: int, hidden: int, out: int, layers: int, *, last_norm: bool = True, comm: Comm | None = None
) -> nn.Module:
    """MoCo v3's MLP: linears without bias, BN and ReLU between, at the end BN without affine (moco_jcl.md 1.3).

    ResNet: projector 2 layers, predictor 2 layers and ``last_norm=False``. ViT: projector 3 layers, predictor 2.
    """
    parts: list[nn.Module] = []
    for layer in range(layers):
        last = layer == layers - 1
        parts.append(nn.Linear(dim if layer == 0 else hidden, out if last else hidden, bias=False))
        if not last:
            parts += [BatchNorm(hidden, comm=comm), nn.ReLU()]
        elif last_norm:
            parts.append(BatchNorm(out, affine=False, comm=comm))
    return Head(*parts)


def mlp_v2(dim: int, out: int, hidden: int | None = None) -> nn.Module:
    """MoCo v2's MLP (and SimCLR's 2-layer one): Linear, ReLU, Linear, with biases, no BN. ``hidden`` None = ``dim``."""
    hidden = dim if hidden is None else hidden
    return Head(nn.Linear(dim, hidden), nn.ReLU(), nn.Linear(hidden, out))


def linear(dim: int, out: int) -> nn.Module:
    """MoCo v1's head: one linear layer with bias (named ``0``)."""
    return Head(nn.Linear(dim, out))


class Prototypes(nn.Module):
    """Linear without bias whose rows are g_k v_k / |v_k| (torch's weight_norm along dim 0, its parameter names)."""

    def __init__(self, dim: int, out: int, train_scale: bool = True):
        super().__init__()
        self.weight_g = nn.Parameter(torch.ones(out, 1), requires_grad=train_scale)
        self.weight_v = nn.Parameter(nn.Linear(dim, out, bias=False).weight.detach().clone())

    def weight(self) -> Tensor:
        """(out, dim), normalised and scaled."""
        return self.weight_v * (self.weight_g / self.weight_v.norm(dim=1, keepdim=True))

    def forward(self, x: Tensor) -> Tensor:
        """(n, dim) -> (n, out)."""
        return F.linear(x, self.weight())


class DINOHead(nn.Module):
    """MLP, L2 normalisation, weight-normalised linear to K prototypes (Caron et al. 2021; esvit.md 1.2).

    Args:
        layers: linears before the last one; 1 = one linear to the bottleneck.
        norm_last_layer: keep the rows' scale g at 1.
    """

    def __init__(
        self,
        dim: int,
        out: int,
        hidden: int = 2048,
        bottleneck: int = 256,
        layers: int = 3,
        *,
        use_bn: bool = False,
        norm_last_layer: bool = True,
        comm: Comm | None = None,
    ):
        super().__init__()
        parts: list[nn.Module] = []
        for layer in range(layers):
            last = layer == layers - 1
            parts.append(nn.Linear(dim if layer == 0 else hidden, bottleneck if last else hidden))
            if not last:
                parts += [BatchNorm(hidden, comm=comm)] * use_bn + [nn.GELU()]
        # one linear alone is called mlp.weight, several mlp.0.weight ... as in published checkpoints
        self.mlp = parts[0] if layers == 1 else Head(*parts)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                nn.init.zeros_(module.bias)
        self.last_layer = Prototypes(bottleneck, out, train_scale=not norm_last_layer)

    def forward(self, x: Tensor, views: int = 1, project: bool = True) -> Tensor | tuple[Tensor, Tensor]:
        """(n, dim) -> logits (n, out).

        ``project=False``: (rows (n, bottleneck) at unit length, weight (out, bottleneck)) for a loss that applies the
        last layer in chunks.
        """
        x = self.mlp(x, views) if isinstance(self.mlp, Head) else self.mlp(x)
        z = F.normalize(x if x.dtype == torch.float64 else x.float(), dim=-1, eps=1e-12)
        return self.last_layer(z) if project else (z, self.last_layer.weight())
