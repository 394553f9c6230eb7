"""Methods on given outputs: the networks' outputs are a file's arrays, everything after them runs as in training."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from moe_cl.methods.base import Encoder, Method, StepOutput
from moe_cl.models.build import Encoded
from tests.plain import batch_of


class Rows(nn.Module):
    """A backbone whose features are its input rows."""

    def __init__(self, dim: int):
        super().__init__()
        self.dim = dim

    def forward(self, views: list[Tensor], keys: Tensor | None = None, counts: list[int] | None = None) -> Encoded:
        return Encoded(torch.cat(views))


class Same(nn.Module):
    """A head whose output is its input."""

    def forward(self, x: Tensor, *_: Any) -> Tensor:
        return x


class Logits(nn.Module):
    """A head with given logits (n, K) for given rows (n, D)."""

    def __init__(self, rows: Tensor, logits: Tensor):
        super().__init__()
        self.rows, self.logits = rows, logits

    def forward(self, x: Tensor, views: int = 1, project: bool = True) -> Any:
        if not torch.equal(x, self.rows):
            raise AssertionError("the head was asked for other rows than the file has logits of")
        return self.logits if project else (self.logits, torch.eye(self.logits.shape[1], dtype=x.dtype))


def networks(method: Method, dim: int) -> list[Encoder | None]:
    """Student and teacher of ``method``, bound to it, whose outputs of width ``dim`` are their inputs."""
    nets = [build(Rows(dim)) for build in (method.build_student, method.build_teacher)]
    for net in nets:
        for name in net.heads if net is not None else ():
            net.heads[name] = Same()
    method.bind(*nets)
    return nets


def on_views(method: Method, nets: list[Encoder | None], rows: Tensor, views: int) -> StepOutput:
    """Loss of a batch whose "images" are the networks' outputs (views * N, C), view-major."""
    batch = batch_of([rows], count=views)
    teacher = None if nets[1] is None else method.encode_teacher(nets[1], batch)
    return method.loss(method.encode_student(nets[0], batch), teacher, batch, method.comm)


def spied(owner: Any, name: str) -> list[tuple[tuple[Any, ...], Any]]:
    """(arguments, result) of every call of the method ``name`` of ``owner`` from now on."""
    seen: list[tuple[tuple[Any, ...], Any]] = []
    plain = getattr(owner, name)

    def call(*args: Any, **more: Any) -> Any:
        seen.append((args, plain(*args, **more)))
        return seen[-1][1]

    setattr(owner, name, call)
    return seen


def module_of(state: Mapping[str, Any]) -> nn.Module:
    """Modules, parameters and batch-norm buffers by the names of a state dict."""
    root = nn.Module()
    for name, value in state.items():
        *path, leaf = name.split(".")
        at = root
        for part in path:
            if part not in at._modules:
                at.add_module(part, nn.Module())
            at = at._modules[part]
        tensor = torch.from_numpy(np.array(value))
        if leaf.startswith(("running_", "num_batches_")):
            at.register_buffer(leaf, tensor)
        else:
            at.register_parameter(leaf, nn.Parameter(tensor))
    return root


def ranks_of(size: int, most: int = 13) -> int:
    """Ranks that share ``size`` rows or experts evenly: the fewest above one, or one."""
    return next((n for n in range(2, min(size, most) + 1) if size % n == 0), 1)
