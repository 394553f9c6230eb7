"""SimCLR (Chen et al. 2020) and the end-to-end baseline of the MoCo papers: no teacher, gradient into every view.

``ntxent``: each of the 2N rows against all others. ``end_to_end``: q of view 1 against all ranks' keys of view 2
(moco_jcl.md 1.5). Batch norm is synchronised over ranks.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from torch import nn

from moe_cl.comm import Comm
from moe_cl.losses.info_nce import contrastive, gather_keys
from moe_cl.losses.ntxent import ntxent
from moe_cl.methods import health, routing
from moe_cl.methods.base import Encoder, Method, StepOutput, summed
from moe_cl.models.build import Encoded
from moe_cl.models.heads import mlp_v2
from moe_cl.typed import Amount, Positive, Width
from moe_cl.views.spec import Batch


@dataclass
class Params:
    """Defaults: SimCLR."""

    temperature: Positive = 0.1
    dim: Width = 128
    objective: Literal["ntxent", "end_to_end"] = "ntxent"
    balance_weight: Amount = 0.01  # of the experts' balance, with an MoE backbone


class SimCLR(Method):
    """Head ``projector`` = Linear, ReLU, Linear."""

    Params = Params
    teacher_update = "none"
    in_batch_negatives = True

    def build_student(self, backbone: nn.Module) -> Encoder:
        return Encoder(backbone, {"projector": mlp_v2(backbone.dim, self.params.dim)})

    def loss(self, student: Encoded, teacher: None, batch: Batch, comm: Comm) -> StepOutput:
        p, samples = self.params, len(batch.sample_ids)
        z0, z1 = self.student("heads", "projector", student.features, 2).chunk(2)
        if p.objective == "ntxent":
            out = ntxent(z0, z1, p.temperature, comm)
        else:
            (keys,) = gather_keys(z1, comm=comm, gradient=True)
            out = contrastive(z0, keys, p.temperature, comm.rank, scale=1.0)
        terms = {
            "loss/contrastive": out.loss,
            **routing.terms(student, samples, comm, p.balance_weight, self.statistics),
        }
        return summed(
            terms,
            {
                "health/positive": out.positive,
                "health/negative": out.negative,
                **health.features(student.features, self.progress.step),
            },
        )


METHOD = SimCLR
