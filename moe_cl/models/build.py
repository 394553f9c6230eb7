"""Backbones by name, and what every one of them returns."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor

from moe_cl.moe.router import Routing


@dataclass
class Encoded:
    """What a backbone gives for a list of views (R resolutions, view-major rows).

    features: (V*B, D) pooled, all resolutions concatenated. regions: one (V_r*B, T_r, D) a resolution.
    routing: routing[r][l] = Routing of MoE layer l at resolution r (empty lists without MoE).
    """

    features: Tensor
    regions: list[Tensor] = field(default_factory=list)
    routing: list[list[Routing]] = field(default_factory=list)
