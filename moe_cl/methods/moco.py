"""MoCo v1 and v2 (He et al. 2020; Chen et al. 2020): a query against its key and a queue of earlier keys.

v1: ``head: linear``, T 0.07. v2: ``head: mlp``, T 0.2. Equations and the order of a step: moco_jcl.md 1.1, 1.2.
Batch norm is each rank's own; keys are encoded in a batch shuffled over the ranks (one rank: in parts of the batch,
``bn_groups``), so that a key does not share statistics with its query.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

import torch
from torch import Tensor, nn

from moe_cl import rng
from moe_cl.comm import Comm
from moe_cl.config import ConfigError
from moe_cl.losses.info_nce import accuracy, first_is_positive, queue_logits
from moe_cl.losses.precision import unit
from moe_cl.methods import health, routing
from moe_cl.methods.base import Encoder, Method, StepOutput, summed, teacher_keys
from moe_cl.models.build import Encoded
from moe_cl.models.heads import linear, mlp_v2
from moe_cl.models.norm import batch_norms, share_statistics, shuffle, unshuffle
from moe_cl.typed import Amount, Few, Positive, Range, Width
from moe_cl.views.spec import Batch

_SHUFFLE = 0x73687566  # purpose of the keys that order the shuffled batch


@dataclass
class Params:
    """Defaults: MoCo v2."""

    temperature: Positive = 0.2
    dim: Width = 128
    queue: Annotated[int, Range(1, 2**26)] = 65536
    head: Literal["linear", "mlp"] = "mlp"
    shuffle: bool = True  # keys see a batch shuffled over ranks
    bn_groups: Few = 1  # on one rank: batch norm over this many parts of the batch ("split BN")
    symmetric: bool = False  # each view is query and key in turn (the authors' CIFAR demo)
    balance_weight: Amount = 0.01  # of the experts' balance, with an MoE backbone


class MoCo(Method):
    """Head ``fc`` on both sides; state: ``queue`` (C, K), one key a column, and ``queue_ptr``."""

    Params = Params
    teacher_update = "before_keys"

    def __init__(self, params: Params, comm: Comm, statistics: str = "global"):
        super().__init__(params, comm, statistics)
        start = torch.randn(params.dim, params.queue, generator=torch.Generator().manual_seed(0))
        self.register_buffer("queue", nn.functional.normalize(start, dim=0))
        self.register_buffer("queue_ptr", torch.zeros(1, dtype=torch.long))

    def _build(self, backbone: nn.Module) -> Encoder:
        p = self.params
        share_statistics(backbone, None, p.bn_groups)
        self._mixes = bool(batch_norms(backbone)) and p.shuffle
        return Encoder(backbone, {"fc": (linear if p.head == "linear" else mlp_v2)(backbone.dim, p.dim)})

    build_student = build_teacher = _build

    def check(self, student: Encoder, images: int, ranks: int) -> None:
        p, keys = self.params, images * ranks * self._key_batches()
        if keys > p.queue:
            raise ConfigError(f"params.queue={p.queue} is smaller than the {keys} keys of a step; make it a multiple")
        if batch_norms(student.backbone) and images % p.bn_groups:
            raise ConfigError(
                f"params.bn_groups={p.bn_groups} does not divide the {images} images of a rank's micro-batch; "
                "take a number that does, or another batch"
            )

    def notes(self, student: Encoder, images: int, ranks: int, samples: int) -> list[str]:
        p, normed, notes = self.params, bool(batch_norms(student.backbone)), []
        if p.bn_groups > 1 and not normed:
            notes.append(f"params.bn_groups={p.bn_groups} does nothing: the backbone has no batch norm")
        if self._mixes and ranks * p.bn_groups == 1:
            notes.append(
                "params.shuffle does nothing on one rank: a key shares batch statistics with its query and can be told "
                "by them; params.bn_groups=8 parts the batch"
            )
        if p.queue >= samples:
            notes.append(
                f"params.queue={p.queue} is not less than the {samples} images of the data set: an image's own earlier "
                "keys are among its negatives; make it smaller"
            )
        return notes

    def encode_student(self, net: nn.Module, batch: Batch) -> Encoded:
        """The query view; both views when symmetric."""
        rows, views = _rows(batch, 0, 2 if self.params.symmetric else 1)
        return net("encode", [batch.views[0][rows]], None if batch.keys is None else batch.keys[rows], [views])

    def encode_teacher(self, net: nn.Module, batch: Batch) -> Encoded:
        """The key views, in a batch shuffled over ranks; features in the batch's own order again."""
        rows, _ = _rows(batch, 0, 2) if self.params.symmetric else _rows(batch, 1, self.key_views(batch))
        x, keys = batch.views[0][rows], teacher_keys(batch)
        keys = None if keys is None else keys[rows]
        order = self.order(batch, rows)
        if order is None:
            return Encoded(net("encode", [x], keys, [self._key_batches()]).features)
        parts = x.chunk(self._key_batches()), keys.chunk(self._key_batches()), order.chunk(self._key_batches())
        out = []
        for x, keys, order in zip(*parts, strict=True):
            mixed = net("encode", [shuffle(x, order, self.comm)], shuffle(keys, order, self.comm), [1])
            out.append(unshuffle(mixed.features, order, self.comm))
        return Encoded(torch.cat(out))

    def _key_batches(self) -> int:
        """Batches of keys with statistics of their own: one a direction."""
        return 2 if self.params.symmetric else 1

    def key_views(self, batch: Batch) -> int:
        """Key views a sample."""
        return 1

    def order(self, batch: Batch, rows: slice) -> Tensor | None:
        """Permutation of all ranks' key rows, one a batch of keys in a row; None = as they come.

        From the samples' random keys: the same on every rank and after a resume, nothing to broadcast.
        """
        alone = self.comm.world == 1 and self.params.bn_groups == 1
        if not self._mixes or alone or batch.keys is None:
            return None
        draws = rng.fold(batch.keys[rows], _SHUFFLE).chunk(self._key_batches())
        return torch.cat([torch.argsort(self.comm.all_gather(d)) for d in draws])

    def loss(self, student: Encoded, teacher: Encoded, batch: Batch, comm: Comm) -> StepOutput:
        q = self.student("heads", "fc", student.features)
        with torch.no_grad():
            k = self.teacher("heads", "fc", teacher.features)
        if self.params.symmetric:
            (q1, q2), (k1, k2) = q.chunk(2), k.chunk(2)
            one, two = self.logits(q1, k2), self.logits(q2, k1)
            loss = (first_is_positive(one) + first_is_positive(two)) / 2
            logits = torch.cat([one, two])
        else:
            logits = self.logits(q, k)
            loss = first_is_positive(logits)
        with torch.no_grad():
            new = comm.all_gather(unit(k))
        return self.output(loss, logits, new, student, batch, comm)

    def logits(self, q: Tensor, k: Tensor) -> Tensor:
        """(N, 1+K) against the queue as it was before this step."""
        return queue_logits(q, k, self.queue, self.params.temperature)

    def output(
        self, loss: Tensor, logits: Tensor, new: Tensor, student: Encoded, batch: Batch, comm: Comm, **more: Tensor
    ) -> StepOutput:
        """Terms, health and what the queue will get."""
        p, samples = self.params, len(batch.sample_ids)
        terms = {"loss/contrastive": loss, **routing.terms(student, samples, comm, p.balance_weight, self.statistics)}
        with torch.no_grad():
            metrics = {
                "health/positive": logits[:, 0].mean() * p.temperature,
                "health/negative": logits[:, 1:].mean() * p.temperature,
                "health/queue_age": _age(self.progress.step, len(new), p.queue, logits),
                "accuracy/top1": accuracy(logits, 1),
                "accuracy/top5": accuracy(logits, 5),
                **health.features(student.features, self.progress.step),
                **more,
            }
        return summed(terms, metrics, keys=new)

    @torch.no_grad()
    def commit(self, pending: dict[str, Tensor]) -> None:
        """Overwrite the oldest columns with this step's keys (n, C), round the end where K is no multiple of n.

        Of more keys than columns (accumulation) the last K stay.
        """
        new = pending["keys"]
        places = torch.arange(len(new), device=new.device)[-self.params.queue :]
        columns = (self.queue_ptr + places) % self.params.queue
        self.queue.index_copy_(1, columns, new[-self.params.queue :].t().to(self.queue.dtype))
        self.queue_ptr.copy_((self.queue_ptr + len(new)) % self.params.queue)


def _rows(batch: Batch, first: int, views: int) -> tuple[slice, int]:
    """Rows of ``views`` views from view ``first`` on."""
    samples = len(batch.sample_ids)
    return slice(first * samples, (first + views) * samples), views


def _age(step: int, keys: int, length: int, like: Tensor) -> Tensor:
    """Steps since the oldest key of the queue was written (the start's random ones not counted)."""
    return torch.full((), min(step, length / keys), device=like.device)


METHOD = MoCo
