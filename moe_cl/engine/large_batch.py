"""The exact large batch: one step over all micro-batches with the in-batch negatives of the whole batch.

Gradient caching (Gao et al. 2021, arXiv:2101.06983) on the method contract: the backbone runs in micro-batches without
graph; heads and loss run once on the whole batch's features, routing weights and loads, which gives the gradient with
respect to each of them; the backbone runs again in micro-batches, now with graph, and (output x cached gradient).sum()
is sent backward. Router noise and drop-path are keyed by sample, so both passes see the same numbers. Memory is that of
one micro-batch and the features, time that of the plain step and one more forward of the student.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from moe_cl.config import ConfigError
from moe_cl.engine.health import Agreed
from moe_cl.engine.scaler import loss_scale, until_finite
from moe_cl.engine.step import Parts, _agree, finish, objective, teacher_pass, with_keys
from moe_cl.methods.base import Encoder, StepOutput
from moe_cl.models.build import Encoded
from moe_cl.models.norm import BatchNorm
from moe_cl.moe.router import Routing
from moe_cl.spans import span
from moe_cl.views.spec import Batch


def check_backbone(backbone: nn.Module) -> None:
    """Raises ConfigError if the backbone has batch norm, whose statistics would be those of a micro-batch."""
    kinds = (BatchNorm, nn.modules.batchnorm._BatchNorm)
    if any(isinstance(module, kinds) for module in backbone.modules()):
        raise ConfigError(
            "batch.exact_large_batch needs a backbone without batch norm (its statistics would be each micro-batch's); "
            "take a ViT or Swin, or set it to false and raise batch.micro_batch"
        )


@until_finite
def step(parts: Parts, batches: list[Batch], number: int, momentum: float) -> Agreed:
    """One optimizer step over this rank's micro-batches as if they were one batch; as ``moe_cl.engine.step.step``."""
    engine, method = parts.engine, parts.method
    with_regions = method.uses_regions
    for batch in batches:
        with_keys(batch, parts.seed, number)
    teacher_out = None
    if parts.teacher is not None:
        encoded = [
            _slim(teacher_pass(parts, batch, momentum if i == 0 else None), with_regions)
            for i, batch in enumerate(batches)
        ]
        teacher_out = _merge(encoded, batches)
    with span("encode student"), torch.no_grad():
        encoded = [_slim(engine(_encoder(parts, batch)), with_regions) for batch in batches]
    student_out, whole = _merge(encoded, batches), _whole(batches)
    del encoded
    leaves = [x.requires_grad_() for x in _tensors(student_out) if x.is_floating_point()]
    outputs: list[StepOutput] = []

    def heads(encoder: Encoder) -> Tensor:
        outputs.append(objective(parts, student_out, teacher_out, whole))
        return outputs[-1].loss

    loss = engine(heads)
    agreed = _agree(parts, outputs, batches, number)
    with span("backward"), _one_reduction(engine) as before:
        before(last=False)
        _backward(engine, loss)
        # What arrives at the leaves carries the loss scale; each backward below puts it on anew.
        scale = loss_scale(engine)
        cached = [None if x.grad is None else x.grad / scale for x in leaves]
        for i, batch in enumerate(batches):
            before(last=i == len(batches) - 1)
            _backward(engine, engine(_replay(parts, batch, batches, i, cached, with_regions)))
    finish(parts, outputs, momentum, agreed)
    return agreed


def _encoder(parts: Parts, batch: Batch) -> Callable[[Encoder], Encoded]:
    return lambda encoder: parts.method.encode_student(encoder, batch)


def _replay(
    parts: Parts, batch: Batch, batches: list[Batch], index: int, cached: list[Tensor | None], with_regions: bool
) -> Callable[[Encoder], Tensor]:
    """(output x cached gradient).sum() of one micro-batch: its gradient is the whole step's, this batch's share."""

    def body(encoder: Encoder) -> Tensor:
        encoded = _slim(parts.method.encode_student(encoder, batch), with_regions)
        outs = [x for x in _tensors(encoded) if x.is_floating_point()]
        views, total = _views(encoded, batch), outs[0].new_zeros(())
        for out, grad, rows in zip(outs, cached, views, strict=True):
            if grad is not None and out.requires_grad:
                total = total + (out * _part(grad, batches, index, rows)).sum()
        return total

    return body


def _backward(engine: Any, loss: Tensor) -> None:
    # A tensor of its own: on the engine's very output DeepSpeed's stage 0 divides by the accumulation steps anyway
    # (its hook on the output fires before the one that says the loss is scaled already).
    engine.backward(loss * 1.0, scale_wrt_gas=False)


@contextlib.contextmanager
def _one_reduction(engine: Any) -> Iterator[Callable[..., None]]:
    """Gradients stay on the rank until the last backward: coalesced by ZeRO, by the boundary flag at stage 0."""
    engine.set_gradient_accumulation_boundary(True)
    if engine.zero_optimization_stage() == 0:
        yield lambda last: engine.set_gradient_accumulation_boundary(last)
        return
    with engine.coalesce_grad_reduction():
        yield lambda last: None


# -- whole batches out of micro-batches ------------------------------------------------------------------------------
# Rows are view-major everywhere: (V_r * b, ...) of each micro-batch become (V_r * B, ...), B = all their samples.


def _slim(encoded: Encoded, with_regions: bool) -> Encoded:
    return encoded if with_regions else dataclasses.replace(encoded, regions=[])


def _rows(x: Tensor, batch: Batch) -> Tensor:
    return x.unflatten(0, (-1, len(batch.sample_ids)))


def _join(xs: list[Tensor], batches: list[Batch]) -> Tensor:
    return torch.cat([_rows(x, b) for x, b in zip(xs, batches, strict=True)], 1).flatten(0, 1)


def _part(x: Tensor, batches: list[Batch], index: int, views: list[int]) -> Tensor:
    """The rows of micro-batch ``index`` in a whole-batch tensor of ``views`` views a resolution."""
    sizes = [len(b.sample_ids) for b in batches]
    start, total = sum(sizes[:index]), sum(sizes)
    return x.unflatten(0, (sum(views), total))[:, start : start + sizes[index]].flatten(0, 1)


def _views(encoded: Encoded, batch: Batch) -> list[list[int]]:
    return [[len(x) // len(batch.sample_ids)] for x in _tensors(encoded) if x.is_floating_point()]


def _tensors(encoded: Encoded) -> Iterator[Tensor]:
    yield encoded.features
    yield from encoded.regions
    for layers in encoded.routing:
        for routing in layers:
            yield from (v for f in dataclasses.fields(routing) if isinstance(v := getattr(routing, f.name), Tensor))


def _merge(parts: list[Encoded], batches: list[Batch]) -> Encoded:
    """One Encoded of all samples, without graph."""

    def routing(many: tuple[Routing, ...]) -> Routing:
        values = {f.name: [getattr(r, f.name) for r in many] for f in dataclasses.fields(many[0])}
        joined = {n: _join(v, batches) if isinstance(v[0], Tensor) else v[0] for n, v in values.items()}
        return Routing(**{**joined, "sent": sum(values["sent"])})

    layers = [[routing(many) for many in zip(*r, strict=True)] for r in zip(*(p.routing for p in parts), strict=True)]
    regions = [_join(list(r), batches) for r in zip(*(p.regions for p in parts), strict=True)]
    return Encoded(_join([p.features for p in parts], batches), regions, layers)


def _whole(batches: list[Batch]) -> Batch:
    """The samples of all micro-batches; the images stay where they are (views have their shapes and no memory)."""
    first, total = batches[0], sum(len(b.sample_ids) for b in batches)
    views = [x.new_zeros(()).expand(len(x) // len(first.sample_ids) * total, *x.shape[1:]) for x in first.views]
    keys = None if first.keys is None else _join([b.keys for b in batches], batches)
    per_sample = [torch.cat([getattr(b, n) for b in batches]) for n in ("sample_ids", "labels", "positions")]
    return Batch(views, torch.cat([b.boxes for b in batches], 1), *per_sample, keys=keys)
