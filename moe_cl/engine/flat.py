"""One per-tensor view of what the engine keeps flat: gradients, fp32 masters and optimizer state of every rank.

ZeRO 1 and 2 lay a group's parameters end to end and give each data-parallel rank one contiguous partition; experts have
a data-parallel group of their own. ZeRO 3 cuts every parameter by itself. A ``Fragment`` is the part of one parameter
that this rank's partition holds. At stage 0 (or without an engine) it is the whole parameter, held by ``copies`` ranks.

Everything per tensor (global norm, EsViT's clip, LARS, checkpoints) is written on fragments, once. DeepSpeed's own
``safe_get_full_*`` helpers know no expert optimizer state, and its norms are wrong with experts (issues 8475, 8613).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from moe_cl.comm import Comm, LocalComm
from moe_cl.engine.optim import is_expert


@dataclass(frozen=True)
class Placement:
    """Where a parameter's local tensor lies in the model's full one, and who else holds it.

    shape: of the full tensor (all experts). start: first flat element of the local tensor in the full one.
    copies: ranks that hold the same elements (before ZeRO splits them). copy: this rank's number among them.
    experts: experts in the local stack, 0 for a dense parameter. first: global id of the first of them.
    """

    shape: tuple[int, ...]
    start: int
    copies: int
    copy: int
    experts: int = 0
    first: int = 0


@dataclass(frozen=True)
class Fragment:
    """Elements [start, stop) of the local flat parameter ``name``, at ``offset`` of partition ``group``."""

    name: str
    param: nn.Parameter
    place: Placement
    group: int
    start: int
    stop: int
    offset: int

    @property
    def size(self) -> int:
        return self.stop - self.start


def placements(module: nn.Module, comm: Comm) -> dict[str, Placement]:
    """Placement of every parameter and buffer-free tensor of ``module`` (student or teacher), by name."""
    out = {}
    for name, p in module.named_parameters():
        shape = tuple(getattr(p, "ds_shape", p.shape))  # ZeRO 3 leaves an empty tensor on the module
        group = getattr(p, "group_name", None)
        if is_expert(name, p) and group is not None and comm.world > 1:
            from deepspeed.utils import groups

            ep, rank = groups._get_expert_parallel_world_size(group), groups._get_expert_parallel_rank(group)
            copies = groups._get_expert_data_parallel_world_size(group)
            copy = groups._get_expert_data_parallel_rank(group)
            full = (shape[0] * ep, *shape[1:])
            out[name] = Placement(full, rank * p.numel(), copies, copy, shape[0], rank * shape[0])
        elif is_expert(name, p):
            out[name] = Placement(shape, 0, comm.world, comm.rank, shape[0], 0)
        else:
            out[name] = Placement(shape, 0, comm.world, comm.rank)
    return out


def local(p: Tensor) -> tuple[int, Tensor]:
    """What this rank holds of its local parameter: first flat element, and a view (ZeRO 3: a shard) of the values."""
    if not hasattr(p, "ds_tensor"):
        return 0, p.detach()
    shard = p.ds_tensor.detach()
    start = min(torch.distributed.get_rank() * shard.numel(), p.ds_numel)
    return start, shard[: max(0, min(shard.numel(), p.ds_numel - start))]


@torch.no_grad()
def fill(p: Tensor, values: Callable[[int, int], Tensor]) -> None:
    """Overwrite a local parameter; ``values(start, stop)`` gives flat elements of it."""
    if not hasattr(p, "ds_tensor"):
        p.copy_(values(0, p.numel()).view(p.shape))
        return
    start, shard = local(p)
    if shard.numel():
        shard.copy_(values(start, start + shard.numel()))
    if p.numel() == p.ds_numel:  # small ones stay gathered between steps
        p.data.copy_(values(0, p.ds_numel).view(p.shape))


class FlatView:
    """Fragments of the optimizer's parameters and the tensors behind them.

    Args:
        module: gives the canonical names (the student's encoder).
        optimizer: the engine's (``DeepSpeedZeroOptimizer`` of stage 1 or 2, ``..._Stage3``, or torch's at stage 0).
        comm: all ranks.
    """

    def __init__(self, module: nn.Module, optimizer: Any, comm: Comm | None = None):
        self.module, self.optimizer, self.comm = module, optimizer, comm or LocalComm()
        self.third = hasattr(optimizer, "fp32_partitioned_groups_flat")
        self.zero = self.third or hasattr(optimizer, "single_partition_of_fp32_groups")
        self.inner: torch.optim.Optimizer = optimizer.optimizer if self.zero else optimizer
        self.places = placements(module, self.comm)
        self._names = {id(p): name for name, p in module.named_parameters()}
        find = self._third_fragments if self.third else self._zero_fragments if self.zero else self._plain_fragments
        self.fragments = list(find())

    # -- the map -------------------------------------------------------------------------------------------------
    def _plain_fragments(self) -> Iterator[Fragment]:
        for index, group in enumerate(self.inner.param_groups):
            for p in group["params"]:
                name = self._names[id(p)]
                yield Fragment(name, p, self.places[name], index, 0, p.numel(), 0)

    def _zero_fragments(self) -> Iterator[Fragment]:
        opt = self.optimizer
        for index, params in enumerate(opt.round_robin_bit16_groups):
            size = int(opt.partition_size[index])
            begin = torch.distributed.get_rank(opt.real_dp_process_group[index]) * size
            for p, at in zip(params, opt.round_robin_bit16_offsets[index], strict=True):
                start, stop = max(at, begin), min(at + p.numel(), begin + size)
                if start < stop:
                    name = self._names[id(p)]
                    yield Fragment(name, p, self.places[name], index, start - at, stop - at, start - begin)

    def _third_fragments(self) -> Iterator[Fragment]:
        opt = self.optimizer
        for index, params in enumerate(opt.fp16_groups):
            for p in params:
                start, shard = local(p)
                if shard.numel():
                    name, offset = self._names[id(p)], int(opt.grad_position[opt.get_param_id(p)][1])
                    yield Fragment(name, p, self.places[name], index, start, start + shard.numel(), offset)

    def trained(self, part: str | None = None) -> set[str]:
        """Names of all parameters of the optimizer, on whatever rank their pieces lie; with ``part`` those alone whose
        groups ``optim.param_groups`` set apart so (``fresh``)."""
        if self.zero:
            groups = self.optimizer.fp16_groups if self.third else self.optimizer.bit16_groups
        else:
            groups = [group["params"] for group in self.inner.param_groups]
        return {
            self._names[id(p)]
            for index, group in enumerate(groups)
            for p in group
            if part is None or part in self._group(index).get("origin", "").split("/")
        }

    # -- the tensors ---------------------------------------------------------------------------------------------
    def holder(self, fragment: Fragment) -> Tensor:
        """The tensor the inner optimizer steps: a flat partition, or the parameter itself."""
        if self.third:
            return self.optimizer.fp32_partitioned_groups_flat[fragment.group]
        return self.optimizer.single_partition_of_fp32_groups[fragment.group] if self.zero else fragment.param

    def settings(self, fragment: Fragment) -> dict[str, Any]:
        """The parameter group (learning rate, decay ...) that the fragment is stepped with."""
        return self._group(fragment.group)

    def _group(self, index: int) -> dict[str, Any]:
        return self.inner.param_groups[self.optimizer.sub_group_to_group_id[index] if self.third else index]

    def master(self, fragment: Fragment) -> Tensor:
        """fp32 weights of a fragment, a 1-D view."""
        return self._cut(self.holder(fragment).detach(), fragment)

    def gradient(self, fragment: Fragment) -> Tensor | None:
        """The reduced gradient of a fragment between the last backward and the optimizer, a writable view."""
        if not self.zero:
            grad = fragment.param.grad
            return None if grad is None else self._cut(grad, fragment)
        parts = self.optimizer.averaged_gradients.get(fragment.group)
        at = 0
        for part in parts or ():
            if at == fragment.offset and part.numel() >= fragment.size:
                return part.detach().reshape(-1)[: fragment.size]
            at += part.numel()
        return None

    def state(self, fragment: Fragment) -> dict[str, Tensor]:
        """Optimizer state of a fragment: 1-D views, and 0-d tensors as they are (a step count is the partition's)."""
        state = self.inner.state.get(self.holder(fragment), {})
        return {
            key: value if value.dim() == 0 else self._cut(value, fragment)
            for key, value in state.items()
            if isinstance(value, Tensor)
        }

    def _cut(self, x: Tensor, fragment: Fragment) -> Tensor:
        if not x.is_contiguous():  # stage 0 with channels-last weights: the whole tensor, so that writes reach it
            return x
        return x.view(-1)[fragment.offset : fragment.offset + fragment.size]

    def frozen(self, fragment: Fragment) -> bool:
        """True if the fragment's group is frozen now."""
        return bool(self.settings(fragment).get("frozen"))
