"""What ranks say to each other: gather, reduce, broadcast, uneven all-to-all; with and without gradient.

Gradient convention of every ``*_grad`` collective: the backward gives the gradient of the *sum over ranks* of the
ranks' losses. Averaging over data-parallel ranks (DeepSpeed, or ``mean_gradients``) then gives that of the mean.

Three kinds: ``LocalComm`` (one rank, no process group needed), ``DistComm`` (a torch.distributed group) and ``SimComm``
(several ranks as threads of one process: property tests of routing and losses without starting processes).
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor


class Comm:
    """Interface. ``rank`` in [0, world); tensors are gathered, split and concatenated along dim 0."""

    rank: int = 0
    world: int = 1
    watch: Callable[[str], None] | None = None  # told the name of every collective before it starts

    # -- primitives a subclass gives -----------------------------------------------------------------------------
    def _gather(self, x: Tensor) -> list[Tensor]:
        """Every rank's ``x`` in rank order (equal shapes)."""
        return [x]

    def _sum(self, x: Tensor, op: str) -> Tensor:
        """A new tensor, reduced over ranks; ``op`` in sum, max, min."""
        return x.clone()

    def _exchange(self, x: Tensor, send: list[int], recv: list[int]) -> Tensor:
        """Rows ``send[r]`` go to rank r, ``recv[r]`` come from rank r; one message a pair."""
        return x.clone()

    def broadcast(self, x: Tensor, src: int = 0) -> Tensor:
        """``x`` of rank ``src`` on every rank, written in place and returned."""
        return x

    def barrier(self) -> None:
        """Returns once every rank has called it."""

    # -- without gradient ----------------------------------------------------------------------------------------
    def all_gather(self, x: Tensor) -> Tensor:
        """(n, ...) on each rank -> (world*n, ...) in rank order, no gradient."""
        return x.detach() if self.world == 1 else torch.cat(self._gather(x.detach().contiguous()))

    def all_reduce(self, x: Tensor, op: str = "sum") -> Tensor:
        """A new tensor of the same shape, reduced over ranks with ``op`` (sum, max, min, mean), no gradient."""
        x = x.detach()
        if op == "mean":
            return self._sum(x, "sum") / self.world
        return self._sum(x, op)

    def all_to_all(self, x: Tensor, send: Sequence[int], recv: Sequence[int]) -> Tensor:
        """Uneven exchange of rows, no gradient. ``send``/``recv``: rows to / from each rank, zeros allowed."""
        return self._exchange(x.detach().contiguous(), list(send), list(recv))

    # -- with gradient (of the sum over ranks) -------------------------------------------------------------------
    def all_gather_grad(self, x: Tensor) -> Tensor:
        """As ``all_gather``; the backward sums over ranks the gradients of this rank's rows."""
        return x if self.world == 1 else _GatherGrad.apply(x, self)

    def all_reduce_grad(self, x: Tensor) -> Tensor:
        """Sum over ranks; the backward is the sum over ranks of the gradients."""
        return x if self.world == 1 else _SumGrad.apply(x, self)

    def all_to_all_grad(self, x: Tensor, send: Sequence[int], recv: Sequence[int]) -> Tensor:
        """As ``all_to_all``; the backward sends gradients the way back."""
        if self.world == 1:
            return x
        return _ExchangeGrad.apply(x, self, list(send), list(recv))

    # -- objects -------------------------------------------------------------------------------------------------
    def gather_objects(self, value: Any) -> list[Any]:
        """Every rank's small picklable ``value`` in rank order (between ranks of one job only, never from files)."""
        return [value]


class LocalComm(Comm):
    """One rank, no process group."""


class DistComm(Comm):
    """A torch.distributed process group (the default one unless ``group`` is given)."""

    def __init__(self, group: Any = None):
        import torch.distributed as dist

        self._dist, self.group = dist, group
        self.rank, self.world = dist.get_rank(group), dist.get_world_size(group)

    def _global(self, rank: int) -> int:
        return rank if self.group is None else self._dist.get_global_rank(self.group, rank)

    def _note(self, what: str) -> None:
        if self.watch is not None:
            self.watch(what)

    def _gather(self, x: Tensor) -> list[Tensor]:
        self._note("all_gather")
        parts = [torch.empty_like(x) for _ in range(self.world)]
        self._dist.all_gather(parts, x, group=self.group)
        return parts

    def _sum(self, x: Tensor, op: str) -> Tensor:
        self._note("all_reduce")
        out = x.contiguous().clone()
        kind = {"sum": self._dist.ReduceOp.SUM, "max": self._dist.ReduceOp.MAX, "min": self._dist.ReduceOp.MIN}[op]
        self._dist.all_reduce(out, op=kind, group=self.group)
        return out

    def _exchange(self, x: Tensor, send: list[int], recv: list[int]) -> Tensor:
        self._note("all_to_all")
        out = x.new_empty((sum(recv), *x.shape[1:]))
        self._dist.all_to_all_single(out, x, recv, send, group=self.group)
        return out

    def broadcast(self, x: Tensor, src: int = 0) -> Tensor:
        self._note("broadcast")
        self._dist.broadcast(x, self._global(src), group=self.group)
        return x

    def barrier(self) -> None:
        self._note("barrier")
        # A sum of one number: unlike dist.barrier it needs no device to be named, on any backend.
        self._dist.all_reduce(torch.zeros(1, device=self.device), group=self.group)

    @property
    def device(self) -> torch.device:
        """Where this group's collectives take their tensors."""
        backend = self._dist.get_backend(self.group)
        if backend != "nccl":
            return torch.device("cpu")
        return torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))

    def gather_objects(self, value: Any) -> list[Any]:
        self._note("gather_objects")
        out: list[Any] = [None] * self.world
        self._dist.all_gather_object(out, value, group=self.group)
        return out


class SimComm(Comm):
    """``world`` ranks as threads of one process: ``SimComm.run(world, fn)`` calls ``fn(comm)`` on each.

    Backwards run in the calling thread on the CPU, so collectives with gradient work too. An exception in one rank
    breaks the others' barrier and is raised from ``run``.
    """

    def __init__(self, rank: int, world: int, shared: dict[str, Any]):
        self.rank, self.world, self._shared = rank, world, shared

    @staticmethod
    def run(world: int, fn: Callable[[SimComm], Any]) -> list[Any]:
        """The ranks' results in rank order."""
        shared: dict[str, Any] = {"slots": [None] * world, "barrier": threading.Barrier(world)}
        results: list[Any] = [None] * world
        errors: list[BaseException] = []

        def one(rank: int) -> None:
            try:
                results[rank] = fn(SimComm(rank, world, shared))
            except threading.BrokenBarrierError:
                pass
            except BaseException as error:  # handed to the caller below
                errors.append(error)
                shared["barrier"].abort()

        threads = [threading.Thread(target=one, args=(rank,)) for rank in range(world)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        if errors:
            raise errors[0]
        return results

    def _swap(self, value: Any) -> list[Any]:
        self._shared["slots"][self.rank] = value
        self._shared["barrier"].wait()
        out = list(self._shared["slots"])
        self._shared["barrier"].wait()
        return out

    def _gather(self, x: Tensor) -> list[Tensor]:
        return [part.clone() for part in self._swap(x)]

    def _sum(self, x: Tensor, op: str) -> Tensor:
        parts = torch.stack(self._swap(x))
        return {"sum": parts.sum, "max": parts.amax, "min": parts.amin}[op](0)

    def _exchange(self, x: Tensor, send: list[int], recv: list[int]) -> Tensor:
        rows = self._swap(x.split(send))
        out = torch.cat([rows[r][self.rank] for r in range(self.world)])
        assert len(out) == sum(recv), f"rank {self.rank} expected {sum(recv)} rows, got {len(out)}"
        return out

    def broadcast(self, x: Tensor, src: int = 0) -> Tensor:
        return x.copy_(self._swap(x.clone())[src])

    def barrier(self) -> None:
        self._swap(None)

    def gather_objects(self, value: Any) -> list[Any]:
        return self._swap(value)


class _GatherGrad(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, comm: Comm) -> Tensor:
        ctx.comm, ctx.n = comm, len(x)
        return torch.cat(comm._gather(x.contiguous()))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        start = ctx.comm.rank * ctx.n
        return ctx.comm._sum(grad.contiguous(), "sum")[start : start + ctx.n], None


class _SumGrad(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, comm: Comm) -> Tensor:
        ctx.comm = comm
        return comm._sum(x, "sum")

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return ctx.comm._sum(grad.contiguous(), "sum"), None


class _ExchangeGrad(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, comm: Comm, send: list[int], recv: list[int]) -> Tensor:
        ctx.comm, ctx.send, ctx.recv = comm, send, recv
        return comm._exchange(x.contiguous(), send, recv)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        return ctx.comm._exchange(grad.contiguous(), ctx.recv, ctx.send), None, None, None


def mean_gradients(parameters: Sequence[Tensor], comm: Comm) -> None:
    """Average ``.grad`` over ranks in place, in one message (data parallelism without an engine: tests, probes)."""
    grads = [p.grad if p.grad is not None else torch.zeros_like(p) for p in parameters]
    if comm.world == 1 or not grads:
        return
    flat = comm.all_reduce(torch.cat([g.reshape(-1) for g in grads]), "mean")
    for p, part in zip(parameters, flat.split([g.numel() for g in grads]), strict=True):
        p.grad = part.view_as(p)
