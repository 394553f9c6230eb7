"""CR-MoE (Meng et al., TMLR 2023): MoCo v3 on a ViT with sparse experts, routing kept balanced and consistent.

L = L_cl + w_lb * sum over layers and views [CV2(importance) + CV2(load)] + w_G * sum over layers L_G (crmoe.md 1.7).
``consistency: none`` is the naive V-MoE + MoCo v3 baseline; its other forms: ``moe_cl.losses.consistency``.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from moe_cl.comm import Comm
from moe_cl.config import ConfigError
from moe_cl.losses.consistency import Match, consistency
from moe_cl.methods import mocov3, routing
from moe_cl.models.build import Encoded
from moe_cl.typed import Amount, Share
from moe_cl.views import crops
from moe_cl.views.spec import Batch


@dataclass
class Params(mocov3.Params):
    """Defaults: the paper's VMoE-S/16. ``threshold``: smallest IoU (lambda) of patches that overlap."""

    consistency: Literal["none", "cls", "overlap", "similarity", "nearest", "pool"] = "overlap"
    consistency_weight: Amount = 0.001
    alpha: Share = 0.3  # share of the patches in L_G, the rest is cls
    threshold: Share = 0.2
    activation: Literal["gated", "softmax"] = "gated"  # gate vector: the k kept weights, or all probabilities


class CRMoE(mocov3.MoCoV3):
    """MoCo v3 and the two losses on the routing of both views."""

    Params = Params

    def routed(
        self, student: Encoded, teacher: Encoded, batch: Batch, comm: Comm
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        p = self.params
        if p.consistency == "none" or p.consistency_weight == 0:
            return super().routed(student, teacher, batch, comm)
        if not student.routing or not student.routing[0]:
            raise ConfigError("crmoe needs experts: set moe.blocks=odd, or params.consistency=none for a dense ViT")
        q_idx, q_w, experts = routing.sparse_gates(student, 2, p.activation)
        with torch.no_grad():
            k_idx, k_w, _ = routing.sparse_gates(teacher, 2, p.activation)
        match, metrics = None, {}
        if p.consistency in ("overlap", "similarity"):
            match = self.match(batch.boxes, q_w.shape[3] - 1)
            self.matched = match.idx1, match.valid1
            metrics["health/match_rate"] = (match.valid1.float().mean() + match.valid2.float().mean()) / 2
        samples = len(student.features) // 2
        terms, counts = routing.terms_and_counts(
            student, samples, comm, p.balance_weight, self.statistics, match and match.counts()
        )
        total, per_layer = consistency(
            q_idx, q_w, k_idx, k_w, experts, comm, match, p.temperature, p.alpha, self.statistics, p.consistency, counts
        )
        terms["loss/consistency"] = p.consistency_weight * total
        metrics.update({f"health/consistency/L{layer}": value for layer, value in enumerate(per_layer)})
        return terms, metrics

    def match(self, boxes: Tensor, patches: int) -> Match:
        """Overlapping patches of the two views, once for all layers. boxes: (2, B, 5)."""
        return Match(*crops.match(boxes[0], boxes[1], math.isqrt(patches), self.params.threshold))


METHOD = CRMoE
