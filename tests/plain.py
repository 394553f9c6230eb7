"""A step of any method without DeepSpeed: the project's own driver on a plain autograd "engine", in fp32 or fp64."""

from __future__ import annotations

import contextlib
from typing import Any

import torch
from torch import Tensor, nn

from moe_cl.comm import Comm, LocalComm, mean_gradients
from moe_cl.config import OptimConfig
from moe_cl.engine.optim import build, param_groups
from moe_cl.engine.step import Parts, step
from moe_cl.engine.teacher import Teacher
from moe_cl.methods.base import Encoder, Method
from moe_cl.views.spec import Batch


class PlainEngine:
    """What ``moe_cl.engine.step`` asks of an engine: forward, backward (gradients averaged over ranks), step.

    ``copies``: the ranks that hold the same experts as this one; all of them, unless it is set.
    """

    def __init__(self, student: Encoder, comm: Comm):
        self.student, self.comm, self.losses, self.copies = student, comm, [], comm
        still = OptimConfig(name="sgd", weight_decay=0.0)
        self.optimizer: torch.optim.Optimizer = build(param_groups(student, still), still, 0.0)

    def __call__(self, fn: Any) -> Tensor:
        return fn(self.student)

    def backward(self, loss: Tensor) -> None:
        self.losses.append(loss.detach())
        loss.backward()
        trained = [(n, p) for n, p in self.student.named_parameters() if p.requires_grad]
        experts = [p for n, p in trained if ".experts." in n]
        mean_gradients([p for n, p in trained if ".experts." not in n], self.comm)
        mean_gradients(experts, self.copies)
        for p in experts:  # of the sum over an expert group's losses so far
            p.grad *= self.copies.world / self.comm.world

    def step(self) -> None:
        self.optimizer.step()


class Run:
    """Student, teacher and method of a run; ``step`` gives loss and gradients by name."""

    def __init__(self, method: Method, student: Encoder, teacher: Encoder | None, comm: Comm | None = None):
        self.method, self.student, self.comm = method, student, comm or LocalComm()
        self.teacher = None
        if teacher is not None:
            with _kept(teacher):  # a Teacher starts as a copy; golden files have a teacher of their own
                self.teacher = Teacher(teacher, student, contextlib.nullcontext)
        method.bind(student, self.teacher)
        self.engine = PlainEngine(student, self.comm)
        self.grads: dict[str, Tensor] = {}
        self.before_clip = dict
        self.parts = Parts(self.engine, student, self.teacher, method, self.comm, 0, self._before_step)

    def optimize(self, optimizer: torch.optim.Optimizer) -> None:
        """Steps move the student from now on."""
        self.engine.optimizer = optimizer

    def _before_step(self) -> dict[str, Tensor]:
        self.grads = {n: p.grad.clone() for n, p in self.student.named_parameters() if p.grad is not None}
        return self.before_clip()

    def step(self, batch: Batch | list[Batch], momentum: float = 0.99, number: int = 0) -> Tensor:
        """One step; returns this rank's loss. Gradients (mean over ranks) are in ``grads``."""
        self.student.zero_grad(set_to_none=True)
        self.metrics = step(self.parts, batch if isinstance(batch, list) else [batch], number, momentum).metrics
        return self.engine.losses[-1]


@contextlib.contextmanager
def _kept(module: nn.Module) -> Any:
    state = {k: v.clone() for k, v in module.state_dict().items()}
    yield
    module.load_state_dict(state)


def batch_of(views: list[Tensor], boxes: Tensor | None = None, count: int = 2) -> Batch:
    """A batch of ``count`` views a sample (rows view-major) with places 0..B-1."""
    samples = sum(map(len, views)) // count
    ids = torch.arange(samples)
    boxes = torch.zeros(count, samples, 5) if boxes is None else boxes
    return Batch(views, boxes, ids, torch.full_like(ids, -1), ids)
