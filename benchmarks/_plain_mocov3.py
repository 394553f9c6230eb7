"""One MoCo v3 step in plain, careful PyTorch, in the published order: the side our step is measured against.

q1, q2 one after the other, EMA as one fused pass, keys without gradient, two cross-entropies, backward, fused AdamW.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moe_cl.models.build import build_backbone


def mlp(dims: list[int]) -> nn.Sequential:
    """MoCo v3's head on torch's own batch norm."""
    layers: list[nn.Module] = []
    for i, (a, b) in enumerate(zip(dims[:-1], dims[1:], strict=True)):
        last = i == len(dims) - 2
        layers += [nn.Linear(a, b, bias=False), nn.BatchNorm1d(b, affine=not last), *([] if last else [nn.ReLU()])]
    return nn.Sequential(*layers)


class Encoder(nn.Module):
    """Backbone and projector."""

    def __init__(self, backbone: str, options: dict):
        super().__init__()
        self.backbone = build_backbone(backbone, **options)
        self.projector = mlp([self.backbone.dim, 4096, 4096, 256])

    def forward(self, x: Tensor) -> Tensor:
        return self.projector(self.backbone([x]).features)


class PlainStep:
    """``step(x1, x2, m)``."""

    def __init__(self, backbone: str, options: dict, precision: str, temperature: float = 0.2):
        torch.manual_seed(0)
        self.student = Encoder(backbone, options)
        torch.manual_seed(0)
        self.teacher = Encoder(backbone, options).requires_grad_(False)
        self.predictor = mlp([256, 4096, 256])
        self.temperature, self.precision = temperature, precision
        pairs = zip(self.teacher.parameters(), self.student.parameters(), strict=True)
        self.pairs = [(t, s.detach()) for t, s in pairs if s.requires_grad]
        trained = [p for p in [*self.student.parameters(), *self.predictor.parameters()] if p.requires_grad]
        self.optimizer = torch.optim.AdamW(trained, 1e-4, weight_decay=0.1, fused=True)

    def contrast(self, q: Tensor, k: Tensor) -> Tensor:
        logits = F.normalize(q.float()) @ F.normalize(k.float()).t() / self.temperature
        return 2 * self.temperature * F.cross_entropy(logits, torch.arange(len(q)))

    def __call__(self, x1: Tensor, x2: Tensor, momentum: float = 0.99) -> float:
        self.optimizer.zero_grad(set_to_none=True)
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=self.precision == "bf16"):
            q1, q2 = self.predictor(self.student(x1)), self.predictor(self.student(x2))
            with torch.no_grad():
                torch._foreach_lerp_([t for t, _ in self.pairs], [s for _, s in self.pairs], 1 - momentum)
                k1, k2 = self.teacher(x1), self.teacher(x2)
        loss = self.contrast(q1, k2) + self.contrast(q2, k1)
        loss.backward()
        self.optimizer.step()
        return float(loss.detach())  # a loop reads its loss to stop on nan
