"""One step of the real code on tensors without memory: every operation's FLOPs and bytes, and what is alive when.

Method, backbone, heads, losses and autograd are those of a run, driven as the engine's drivers do; tensors are torch's
fake ones (shapes and types only), so the step of a 1,024-GPU recipe is traced in seconds on a laptop. Routing is taken
as balanced.
"""

from __future__ import annotations

import contextlib
import copy
import math
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from moe_cl.config import RunConfig
from moe_cl.engine import large_batch, setup
from moe_cl.losses import distillation
from moe_cl.methods.base import Encoder, Method
from moe_cl.models import swin, vit
from moe_cl.moe import mlp, telemetry
from moe_cl.planning import compiled
from moe_cl.planning.balanced import factory
from moe_cl.planning.ledger import Ledger, Message, Op, PlanComm
from moe_cl.views.spec import Batch, build_spec

LARGE = 2**25  # freed blocks below this stay with a training process on the CPU (moe_cl/allocator.py)


@dataclass
class Trace:
    """One optimizer step of one rank.

    ops: phase (student, teacher, loss, backward) -> operations and how often. peak: bytes alive at the worst moment of
    forward and backward by part, without weights and images; on a CPU that of blocks below ``LARGE``, ``large`` of the
    others. Sizes in elements but ``buffers`` and ``images`` (bytes);
    experts: those held here. backbone: (dense, expert) elements of it. tensors: trained ones. queue: bytes of the
    method's state.
    """

    ops: dict[str, Counter[Op]] = field(default_factory=dict)
    peak: dict[str, int] = field(default_factory=dict)
    large: dict[str, int] = field(default_factory=dict)
    routed: int = 0  # bytes of blocks, of those below LARGE, whose size follows the routing: the most alive at once
    messages: Counter[Message] = field(default_factory=Counter)
    dense: int = 0
    experts: int = 0
    frozen: int = 0
    teacher: int = 0
    backbone: tuple[int, int] = (0, 0)
    tensors: int = 0
    largest: int = 0  # elements of the largest trained tensor
    small: int = 0  # trained elements in tensors below LARGE
    convolutions: bool = False
    queue: int = 0
    buffers: int = 0
    images: int = 0

    @property
    def trained(self) -> int:
        """Elements with a gradient on this rank."""
        return self.dense + self.experts

    @property
    def flops(self) -> int:
        """Of matrix products and convolutions."""
        return sum(op.flops * times for ops in self.ops.values() for op, times in ops.items())


def trace(
    cfg: RunConfig, world: int, micro: int, accumulation: int, precision: str, gpu: bool, gradient_share: float = 1.0
) -> Trace:
    """Trace one optimizer step on one of ``world`` ranks.

    Args:
        micro: samples of a micro-batch; accumulation: micro-batches of a step.
        precision: fp32, bf16 or fp16. gpu: kernels as on an accelerator (fused attention, grouped experts).
        gradient_share: see ``Ledger``.
    """
    ledger = Ledger(gradient_share, math.inf if gpu else LARGE)
    comm = PlanComm(world, "world", ledger)
    one = copy.deepcopy(cfg)
    one.model.compile = False
    with torch.device("meta"):
        grouped = gpu and precision == "bf16"
        method, student, teacher = setup.build_method(one, comm, factory(ledger, cfg.moe.ep_size, grouped))
    if teacher is not None:
        teacher.requires_grad_(False)
    fake = FakeTensorMode(allow_non_fake_inputs=True)
    try:
        with _kernels(gpu, ledger), fake:
            for module in filter(None, (student, teacher, method)):
                _give_shapes(module, ledger)
            batch = _batch(cfg, micro, ledger)
            for p in student.parameters():
                if p.requires_grad:
                    p.register_post_accumulate_grad_hook(lambda q: ledger.gradient(q.grad))
            step = _Step(method, student, teacher, batch, comm, ledger, precision != "fp32")
            with ledger:
                step.exact(accumulation) if cfg.batch.exact_large_batch else step.plain(accumulation)
    finally:  # shapes without values must not stay in caches of values
        _forget()
    out = _sizes(method, student, teacher)
    out.ops, out.messages = ledger.ops, ledger.messages
    out.peak, out.large = ledger.held.peak, ledger.large_blocks.peak
    out.routed = ledger.routed.most
    out.images = accumulation * sum(math.prod(v.shape) * v.element_size() for v in batch.views)
    return out


class _Step:
    """The two drivers (``engine/step.py``, ``engine/large_batch.py``) without engine, optimizer and values."""

    def __init__(
        self, method: Method, student: Encoder, teacher: Encoder | None, batch: Batch, comm: PlanComm, ledger: Ledger,
        low: bool,
    ):  # fmt: skip
        self.method, self.student, self.teacher, self.batch = method, student, teacher, batch
        self.comm, self.ledger, self.low = comm, ledger, low
        method.bind(student, self._teach if teacher is not None else None)

    def _precision(self) -> torch.autocast:
        return torch.autocast("cpu", torch.bfloat16, enabled=self.low)

    def _teach(self, *args: Any) -> Any:
        with torch.no_grad(), self._precision():
            return self.teacher(*args)

    def _teacher(self) -> Any:
        if self.teacher is None:
            return None
        with self.ledger.within("teacher's activations", "teacher"), torch.no_grad():
            return self.method.encode_teacher(self._teach, self.batch)

    def _student(self) -> Any:
        with self.ledger.within("activations", "student"):
            return self.method.encode_student(self.student, self.batch)

    def _loss(self, student: Any, teacher: Any, batch: Batch) -> Any:
        with self.ledger.within("region loss" if self.method.uses_regions else "heads and loss", "loss"):
            out = self.method.loss(student, teacher, batch, self.comm)
            views, samples = batch.boxes.shape[:2]
            out.metrics.update(telemetry.summarize(student, views, samples, self.method.matched))
            return out.loss

    def _backward(self, loss: Any) -> None:
        with self.ledger.within("backward", "backward"):
            loss.backward()

    def plain(self, accumulation: int) -> None:
        """Micro-batch after micro-batch; from the second on the gradients of the first are there."""
        for times in (1, accumulation - 1) if accumulation > 1 else (1,):
            self.ledger.times = times
            with self._precision():
                student = self._student()
                loss = self._loss(student, self._teacher(), self.batch)
            del student
            self._backward(loss)
            del loss

    def exact(self, accumulation: int) -> None:
        """Backbone without graph, heads and loss on the whole batch, backbone again."""
        batches, regions = [self.batch] * accumulation, self.method.uses_regions
        slim = lambda encoded: large_batch._slim(encoded, regions)  # noqa: E731
        self.ledger.times = accumulation
        teacher = None
        if self.teacher is not None:
            teacher = large_batch._merge([slim(self._teacher())] * accumulation, batches)
        with torch.no_grad(), self._precision():
            student = large_batch._merge([slim(self._student())] * accumulation, batches)
        self.ledger.times = 1
        leaves = [x.requires_grad_() for x in large_batch._tensors(student) if x.is_floating_point()]
        with self._precision():
            loss = self._loss(student, teacher, large_batch._whole(batches))
        self._backward(loss)
        del loss
        cached = [None if x.grad is None else x.grad / 1.0 for x in leaves]
        parts = SimpleNamespace(method=self.method)
        for times in (1, accumulation - 1) if accumulation > 1 else (1,):
            self.ledger.times = times
            body = large_batch._replay(parts, self.batch, batches, 0, cached, regions)
            with self._precision(), self.ledger.within("activations", "student"):
                total = body(self.student)
            self._backward(total)
            del total


def _give_shapes(module: nn.Module, ledger: Ledger) -> None:
    """Meta tensors become fake ones on the CPU, in place."""
    for part in module.modules():
        for name, p in part._parameters.items():
            if p is not None:
                shape = torch.empty(p.shape, dtype=p.dtype, device="cpu")
                part._parameters[name] = nn.Parameter(shape, requires_grad=p.requires_grad)
                ledger.known(part._parameters[name])
        for name, b in part._buffers.items():
            if b is not None:
                part._buffers[name] = torch.empty(b.shape, dtype=b.dtype, device="cpu")
                ledger.known(part._buffers[name])


def _batch(cfg: RunConfig, micro: int, ledger: Ledger) -> Batch:
    spec = build_spec(cfg.views)
    views = [torch.empty(count * micro, 3, side, side) for side, count in spec.resolutions]
    ids = torch.empty(micro, dtype=torch.int64)
    keys = torch.empty(spec.views * micro, dtype=torch.int64)
    batch = Batch(views, torch.empty(spec.views, micro, 5), ids, ids, ids, keys)
    for tensor in (*views, batch.boxes, ids, keys):
        ledger.known(tensor)
    return batch


@contextlib.contextmanager
def _kernels(gpu: bool, ledger: Ledger) -> Iterator[None]:
    """An accelerator's attention is the fused one, whatever device the fake tensors say, and a CPU's experts go
    through the compiled kernels where it has them; an expert's rows and a block's images are one piece (same FLOPs
    and bytes, and no thousands of operations to trace)."""
    own = vit.attention, vit.CACHE, mlp.CHUNK
    vit.CACHE = mlp.CHUNK = 2**62
    if gpu:
        vit.attention = nn.functional.scaled_dot_product_attention
    _forget()
    try:
        with contextlib.nullcontext() if gpu else compiled.planned(ledger):
            yield
    finally:
        vit.attention, vit.CACHE, mlp.CHUNK = own


def _forget() -> None:
    for cached in (vit.sincos, swin.shift_mask, distillation.pair_weights):
        cached.cache_clear()


def _sizes(method: Method, student: Encoder, teacher: Encoder | None) -> Trace:
    out = Trace()
    dense = here = 0
    for name, p in student.named_parameters():
        expert = ".experts." in name
        if not p.requires_grad:
            out.frozen += p.numel()
        else:
            out.tensors += 1
            out.largest = max(out.largest, p.numel())
            out.small += p.numel() if 4 * p.numel() < LARGE else 0
            out.dense += 0 if expert else p.numel()
            out.experts += p.numel() if expert else 0
        if name.startswith("backbone."):
            dense, here = dense + (0 if expert else p.numel()), here + (p.numel() if expert else 0)
    out.backbone = dense, here
    out.convolutions = sum(isinstance(m, nn.Conv2d) for m in student.modules()) > 1  # more than a patch projection
    out.teacher = sum(p.numel() for p in teacher.parameters()) if teacher is not None else 0
    out.queue = sum(b.numel() * b.element_size() for b in method.buffers())
    networks = [m for m in (student, teacher) if m is not None]
    out.buffers = sum(b.numel() * b.element_size() for m in networks for b in m.buffers())
    return out
