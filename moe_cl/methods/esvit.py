"""EsViT (Li et al., ICLR 2022): self-distillation between views and between their regions. ``regions: false`` is DINO.

L = 1/2 L_V + 1/2 L_R, each a mean over the pairs (teacher view i, student view v != i); the teacher sees the two global
views. Equations, halves included: esvit.md 1.3-1.7.

Batch norm (ResNet, ``head_bn``) is over all ranks and, as in the published code, over all crops of a resolution: they
go through the network in one forward, the teacher's two global views likewise (esvit.md 1.1).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from moe_cl.comm import Comm
from moe_cl.losses import distillation as dist
from moe_cl.losses.precision import wide
from moe_cl.methods import health, routing
from moe_cl.methods.base import Encoder, Method, StepOutput, summed
from moe_cl.models.build import Encoded
from moe_cl.models.heads import DINOHead
from moe_cl.moe.router import Router
from moe_cl.typed import Amount, Few, Natural, Positive, Share, Width
from moe_cl.views.spec import Batch

TEACHER_VIEWS = 2


@dataclass
class Params:
    """Defaults: the Swin-T recipe."""

    out_dim: Width = 65536
    hidden: Width = 2048
    bottleneck: Width = 256
    head_layers: Few = 3
    head_bn: bool = False
    norm_last_layer: bool = False  # keep the prototypes' scale at 1
    regions: bool = True
    student_temperature: Positive = 0.1
    teacher_temperature: Positive = 0.07
    warmup_teacher_temperature: Positive = 0.04
    warmup_teacher_epochs: Natural = 30
    centre_momentum: Share = 0.9
    freeze_last_layer: Natural = 1  # epochs
    balance_weight: Amount = 0.01  # of the experts' balance, with an MoE backbone


class EsViT(Method):
    """Heads ``view`` and ``region``; state: ``centre`` and ``centre_region`` (1, K)."""

    Params = Params
    teacher_update = "after_step"
    evaluated = "teacher"

    def __init__(self, params: Params, comm: Comm, statistics: str = "global"):
        super().__init__(params, comm, statistics)
        self.register_buffer("centre", torch.zeros(1, params.out_dim))
        if params.regions:
            self.register_buffer("centre_region", torch.zeros(1, params.out_dim))

    def _head(self, dim: int) -> nn.Module:
        p = self.params
        return DINOHead(
            dim, p.out_dim, p.hidden, p.bottleneck, p.head_layers,
            use_bn=p.head_bn, norm_last_layer=p.norm_last_layer, comm=self.comm,
        )  # fmt: skip

    def build_student(self, backbone: nn.Module) -> Encoder:
        names = ["view", "region"] if self.params.regions else ["view"]
        return Encoder(backbone, {name: self._head(backbone.dim) for name in names})

    def build_teacher(self, backbone: nn.Module) -> Encoder:
        for module in backbone.modules():
            if isinstance(module, Router):
                module.noise_std = 0.0  # a target without noise
        return self.build_student(backbone)

    def encode_student(self, net: nn.Module, batch: Batch) -> Encoded:
        """All views; the crops of a resolution share batch statistics."""
        return net("encode", batch.views, batch.keys, [1] * len(batch.views))

    def encode_teacher(self, net: nn.Module, batch: Batch) -> Encoded:
        """The two global views, with batch statistics over both."""
        rows = TEACHER_VIEWS * len(batch.sample_ids)
        return net("encode", [batch.views[0][:rows]], None, [1])

    def temperature(self) -> float:
        """tau_t of this epoch."""
        p = self.params
        return dist.teacher_temperature(
            self.progress.epoch, p.warmup_teacher_temperature, p.teacher_temperature, p.warmup_teacher_epochs
        )

    def loss(self, student: Encoded, teacher: Encoded, batch: Batch, comm: Comm) -> StepOutput:
        p, samples, tau = self.params, len(batch.sample_ids), self.temperature()
        s = self.student("heads", "view", student.features).unflatten(0, (-1, samples))
        with torch.no_grad():
            t = self.teacher("heads", "view", teacher.features).unflatten(0, (TEACHER_VIEWS, samples))
            q = dist.targets(t, self.centre, tau)
            means = [wide(t).mean((0, 1))]
        loss = dist.view_loss(s, q, p.student_temperature)
        entropy = dist.entropy(q)
        metrics = {
            "health/teacher_entropy": entropy,
            "health/kl": loss.detach() - entropy,
            "health/centre_norm": self.centre.norm(),
            **health.features(student.features, self.progress.step),
        }
        terms = {"loss/view": loss}
        if p.regions:
            region, mean, unique = self._region(student, teacher, samples, tau)
            terms = {"loss/view": 0.5 * loss, "loss/region": 0.5 * region}
            metrics["health/match_unique"] = unique
            means.append(mean)
        terms |= routing.terms(student, samples, comm, p.balance_weight, self.statistics)
        means = comm.all_reduce(torch.stack(means), "mean")
        return summed(terms, metrics, means=means)

    def _region(self, student: Encoded, teacher: Encoded, samples: int, tau: float) -> tuple[Tensor, Tensor, Tensor]:
        """Region loss, mean teacher logits (K,), share of the teacher's regions that some token picks."""
        s = [x.unflatten(0, (-1, samples)) for x in student.regions]  # (V_r, B, T_r, P)
        t = teacher.regions[0].unflatten(0, (TEACHER_VIEWS, samples))
        pick = dist.match_regions(t, *s)
        weights = dist.pair_weights(tuple((x.shape[0], x.shape[2]) for x in s), TEACHER_VIEWS, t.device)
        # one call of the head for all tokens, an image's together: (B, S, D) and (B, 2T, D) before the last layer
        z, w = self.student("heads", "region", dist.region_rows(s).flatten(0, 1), 1, False)
        with torch.no_grad():
            zt, wt = self.teacher("heads", "region", dist.region_rows([t]).flatten(0, 1), 1, False)
            mean = dist.mean_logits(zt, wt)
            chosen = torch.zeros(samples, TEACHER_VIEWS * t.shape[2], device=t.device)
            unique = chosen.scatter_(1, pick.flatten(1), 1.0).mean()
        loss = dist.region_loss(
            z.unflatten(0, (samples, -1)), zt.unflatten(0, (samples, -1)), pick, weights, self.centre_region[0],
            self.params.student_temperature, tau, w, wt,
        )  # fmt: skip
        return loss, mean, unique

    def together(self, pending: list[dict[str, Tensor]]) -> dict[str, Tensor]:
        """The mean of the micro-batches' means: a centre decays once a step, whatever the accumulation."""
        return {"means": torch.stack([one["means"] for one in pending]).mean(0)}

    @torch.no_grad()
    def commit(self, pending: dict[str, Tensor]) -> None:
        """Both centres move towards this step's mean teacher logits."""
        centres = [self.centre, self.centre_region] if self.params.regions else [self.centre]
        for centre, mean in zip(centres, pending["means"], strict=True):
            centre.copy_(dist.next_centre(centre, mean, self.params.centre_momentum))

    def frozen(self) -> dict[str, bool]:
        return {"last_layer": self.progress.epoch < self.params.freeze_last_layer}


METHOD = EsViT
