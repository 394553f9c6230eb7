"""MoCo v3 (Chen, Xie, He 2021): symmetric InfoNCE between two views, no queue, predictor on the student's side.

L = ctr(q1, k2) + ctr(q2, k1), q = predictor(projector(f(x))), k = the same of the teacher without predictor.
Equations: moco_jcl.md 1.3. With an MoE backbone the balance loss joins: "naive V-MoE + MoCo v3".
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from moe_cl.comm import Comm
from moe_cl.losses.info_nce import contrastive, gather_keys
from moe_cl.methods import health, routing
from moe_cl.methods.base import Encoder, Method, StepOutput, summed
from moe_cl.models.build import Encoded
from moe_cl.models.heads import mlp_v3
from moe_cl.typed import Amount, Positive, Width
from moe_cl.views.spec import Batch


@dataclass
class Params:
    """Defaults: ViT-S/B of the paper. ResNet-50 takes temperature 1 and head resnet."""

    temperature: Positive = 0.2
    dim: Width = 256
    mlp_dim: Width = 4096
    head: Literal["vit", "resnet"] = "vit"  # 3-layer projector and normed predictor, or 2-layer and bare
    balance_weight: Amount = 0.01  # of the experts' balance, with an MoE backbone


class MoCoV3(Method):
    """Two views; heads ``projector`` (both sides) and ``predictor`` (student)."""

    Params = Params
    teacher_update = "before_keys"
    in_batch_negatives = True

    def _projector(self, dim: int) -> nn.Module:
        p = self.params
        return mlp_v3(dim, p.mlp_dim, p.dim, 3 if p.head == "vit" else 2, comm=self.comm)

    def build_student(self, backbone: nn.Module) -> Encoder:
        p = self.params
        predictor = mlp_v3(p.dim, p.mlp_dim, p.dim, 2, last_norm=p.head == "vit", comm=self.comm)
        return Encoder(backbone, {"projector": self._projector(backbone.dim), "predictor": predictor})

    def build_teacher(self, backbone: nn.Module) -> Encoder:
        return Encoder(backbone, {"projector": self._projector(backbone.dim)})

    def loss(self, student: Encoded, teacher: Encoded, batch: Batch, comm: Comm) -> StepOutput:
        return summed(*self.terms(student, teacher, batch, comm))

    def terms(
        self, student: Encoded, teacher: Encoded, batch: Batch, comm: Comm
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Loss terms (with graph, weighted) and other metrics."""
        p = self.params
        q = self.student("heads", "predictor", self.student("heads", "projector", student.features, 2), 2)
        with torch.no_grad():
            k = self.teacher("heads", "projector", teacher.features, 2)
        (q1, q2), (k1, k2) = q.chunk(2), gather_keys(*k.chunk(2), comm=comm)
        one = contrastive(q1, k2, p.temperature, comm.rank)
        two = contrastive(q2, k1, p.temperature, comm.rank)
        metrics = {
            "health/positive": (one.positive + two.positive) / 2,
            "health/negative": (one.negative + two.negative) / 2,
            **health.features(student.features, self.progress.step),
        }
        routed, more = self.routed(student, teacher, batch, comm)
        return {"loss/contrastive": one.loss + two.loss, **routed}, metrics | more

    def routed(
        self, student: Encoded, teacher: Encoded, batch: Batch, comm: Comm
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Loss terms on the routing, and other metrics of it; none without experts."""
        samples = len(student.features) // 2
        return routing.terms(student, samples, comm, self.params.balance_weight, self.statistics), {}


METHOD = MoCoV3
