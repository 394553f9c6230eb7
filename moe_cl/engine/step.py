"""The plain and the accumulated driver of the method contract (``moe_cl/methods/base.py``).

One engine forward a micro-batch runs encode and loss inside the engine's precision context; the packed all-reduce
comes before the last backward, so that a non-finite loss on any rank stops all of them before optimizer, queue or
centre move.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from moe_cl import rng
from moe_cl.comm import Comm
from moe_cl.data.order import digest_parts
from moe_cl.engine.health import Agreed, agree
from moe_cl.engine.optim import freeze
from moe_cl.engine.scaler import optimizer_step, until_finite
from moe_cl.engine.teacher import Teacher
from moe_cl.methods.base import Encoder, Method, StepOutput
from moe_cl.models.build import Encoded
from moe_cl.moe import telemetry
from moe_cl.spans import span
from moe_cl.views.spec import Batch


class Student(nn.Module):
    """What the engine wraps: ``student(fn)`` runs ``fn(encoder)`` in the engine's forward (precision, ZeRO hooks)."""

    def __init__(self, encoder: Encoder):
        super().__init__()
        self.encoder = encoder

    def forward(self, fn: Callable[[Encoder], Any]) -> Any:
        return fn(self.encoder)


@dataclass
class Parts:
    """What a driver drives. ``before_step``: between backward and optimizer (clipping). ``stop``: asked to stop?
    ``again``: the step is tried anew at a smaller loss scale, the teacher has moved already."""

    engine: Any
    student: Encoder
    teacher: Teacher | None
    method: Method
    comm: Comm
    seed: int
    before_step: Callable[[], dict[str, Tensor]] = dict
    stop: Callable[[], bool] = bool
    again: bool = False


def with_keys(batch: Batch, seed: int, step: int) -> Batch:
    """The batch with its (V*B,) random keys: a function of (seed, step, position, view) alone."""
    base = rng.sample_keys(seed, step, batch.positions)
    batch.keys = torch.cat([rng.fold(base, view) for view in range(batch.boxes.shape[0])])
    return batch


def teacher_pass(parts: Parts, batch: Batch, momentum: float | None) -> Any:
    """The teacher's features; its EMA first (``before_keys``) if ``momentum`` is given."""
    if parts.teacher is None:
        return None
    if momentum is not None and parts.method.teacher_update == "before_keys" and not parts.again:
        with span("ema"):
            parts.teacher.update(momentum)
    with span("encode teacher"), torch.no_grad():
        return parts.method.encode_teacher(parts.teacher, batch)


def objective(parts: Parts, student: Encoded, teacher: Encoded | None, batch: Batch) -> StepOutput:
    """Heads and loss on the features of ``batch``, with what the routers did among the metrics."""
    with span("loss"):
        out = parts.method.loss(student, teacher, batch, parts.comm)
        views, samples = batch.boxes.shape[:2]
        out.metrics.update(telemetry.summarize(student, views, samples, parts.method.matched))
    return out


@until_finite
def step(parts: Parts, batches: list[Batch], number: int, momentum: float) -> Agreed:
    """One optimizer step over this rank's micro-batches; returns metrics of the whole step: means over ranks and
    micro-batches, but for what ``moe_cl.moe.telemetry`` counts.

    Raises NonFiniteLoss on every rank together.
    """
    engine, method = parts.engine, parts.method
    outputs: list[StepOutput] = []
    for index, batch in enumerate(batches):
        with_keys(batch, parts.seed, number)

        def body(encoder: Encoder, batch: Batch = batch, first: bool = index == 0) -> Tensor:
            with span("encode student"):
                student_out = method.encode_student(encoder, batch)
            teacher_out = teacher_pass(parts, batch, momentum if first else None)
            outputs.append(objective(parts, student_out, teacher_out, batch))
            return outputs[-1].loss

        last = index == len(batches) - 1
        loss = engine(body)
        if last:
            agreed = _agree(parts, outputs, batches, number)
        with span("backward"):
            engine.backward(loss)
        if not last:
            engine.step()  # counts the micro-batch; the optimizer runs at the boundary only
    finish(parts, outputs, momentum, agreed)
    return agreed


def finish(parts: Parts, outputs: list[StepOutput], momentum: float, agreed: Agreed) -> None:
    """Optimizer, commit, teacher: everything after a whole step's gradient is there."""
    parts.method.after_backward(parts.student)
    for pattern, frozen in parts.method.frozen().items():
        freeze(parts.engine.optimizer, pattern, frozen)
    agreed.metrics.update(parts.before_step())
    with span("optimizer"):
        optimizer_step(parts.engine)
    with span("commit"), torch.no_grad():
        parts.method.commit(parts.method.together([out.pending for out in outputs]))
        if parts.teacher is not None and parts.method.teacher_update == "after_step":
            parts.teacher.update(momentum)


def _agree(parts: Parts, outputs: list[StepOutput], batches: list[Batch], number: int) -> Agreed:
    names = outputs[0].metrics
    metrics = {n: telemetry.joined(n, torch.stack([o.metrics[n].detach().float() for o in outputs])) for n in names}
    loss = torch.stack([o.loss.detach().float() for o in outputs]).mean()
    metrics["loss"] = loss
    digest = digest_parts(torch.cat([b.sample_ids for b in batches]))
    with span("agree"):
        agreed = agree(parts.comm, loss, metrics, digest, number, parts.stop())
    agreed.metrics.update(telemetry.whole_step(agreed.metrics, parts.comm.world))
    return agreed
