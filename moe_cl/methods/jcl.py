"""JCL (Cai et al., NeurIPS 2020): MoCo v2 with M key views a sample, whose mean and covariance enter the loss.

The paper: M 5, lambda 4, batch 512, lr .06. The released script: M 4, lambda 2 with a ramp, batch 256, lr .03
(moco_jcl.md 1.4). The queue gets the mean keys only.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from moe_cl.comm import Comm
from moe_cl.losses.jcl import joint, ramp
from moe_cl.losses.precision import unit
from moe_cl.methods import moco
from moe_cl.methods.base import StepOutput
from moe_cl.models.build import Encoded
from moe_cl.typed import Amount
from moe_cl.views.spec import Batch


@dataclass
class Params(moco.Params):
    """Defaults: the paper's. ``ramp``: lambda grows over the epochs as in the released script."""

    covariance_weight: Amount = 4.0  # lambda
    ramp: bool = False


class JCL(moco.MoCo):
    """View 0 is the query, all others are keys; key batch norm sees the M*N key images together."""

    Params = Params

    def key_views(self, batch: Batch) -> int:
        return batch.boxes.shape[0] - 1

    def weight(self) -> float:
        """lambda of this step."""
        p, at = self.params, self.progress
        return ramp(p.covariance_weight, at.epoch, at.epochs) if p.ramp else p.covariance_weight

    def loss(self, student: Encoded, teacher: Encoded, batch: Batch, comm: Comm) -> StepOutput:
        q = self.student("heads", "fc", student.features)
        with torch.no_grad():
            k = self.teacher("heads", "fc", teacher.features)
            keys_MNC = k.view(self.key_views(batch), len(q), -1)
        out = joint(q, keys_MNC, self.queue, self.params.temperature, self.weight())
        new = comm.all_gather(out.mean)
        more = {
            "jcl/cross_entropy": out.cross_entropy.detach(),
            "jcl/covariance": out.covariance.detach(),
            "health/key_spread": 1 - out.mean.square().sum(1).mean(),  # total variance of a sample's keys
            "health/positive": (unit(q.detach()) * out.mean).sum(1).mean(),
        }
        return self.output(out.loss, out.logits.detach(), new, student, batch, comm, **more)


METHOD = JCL
