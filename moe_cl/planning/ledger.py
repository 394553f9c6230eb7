"""What a traced step does: operations by phase with FLOPs and bytes, tensors alive by part, messages between ranks."""

from __future__ import annotations

import contextlib
import math
import weakref
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from moe_cl.comm import Comm

# Operations that give memory without touching it.
_UNTOUCHED = {"empty", "new_empty", "empty_like", "empty_strided", "new_empty_strided"}
# What batch norms read once more: the input for its statistics, in the backward the gradient too.
_AGAIN = {"native_batch_norm": 1, "_native_batch_norm_legit": 1, "native_batch_norm_backward": 2}
_CONV = {"convolution", "convolution_backward"}


class Op(NamedTuple):
    """kind: matmul, batched (many small products), conv, attention, experts (their compiled MLP) or rest. size: bytes
    read and written, each tensor once. low: its matrix products take 16-bit numbers. fresh: bytes of large blocks that
    it is the first to write."""

    kind: str
    flops: int
    size: int
    low: bool
    fresh: int = 0


@dataclass(frozen=True)
class Message:
    """A collective: kind is all_gather, all_reduce or all_to_all; group is world or expert; size is the bytes that a
    rank gives; times, how often in an optimizer step."""

    kind: str
    group: str
    size: int
    times: int = 1


class Pool:
    """Bytes alive by part, now and at the worst moment."""

    def __init__(self) -> None:
        self.parts: Counter[str] = Counter()
        self.now = self.most = 0
        self.peak: dict[str, int] = {}

    def add(self, part: str, size: int) -> None:
        """``size`` bytes more (or fewer)."""
        self.parts[part] += size
        self.now += size
        if self.now > self.most:
            self.most, self.peak = self.now, {name: held for name, held in self.parts.items() if held}


class Ledger(TorchDispatchMode):
    """Counts operations under ``phase`` and follows storages under ``part`` from their making to their end.

    Args:
        gradient_share: what counts of a parameter's gradient, once complete, as memory of its own (ZeRO moves it).
        large: bytes from which a block counts in a pool of its own (``large_blocks``) with a worst moment of its own,
            and as fresh: it comes from the system, page by page as it is first written.
    """

    def __init__(self, gradient_share: float = 1.0, large: float = math.inf) -> None:
        super().__init__()
        self.ops: dict[str, Counter[Op]] = {}
        self.messages: Counter[Message] = Counter()
        self.gradient_share = gradient_share
        self.phase, self.part = "student", "heads and loss"
        self.times = 1  # how often in an optimizer step that which is traced now takes place
        self.alive: dict[int, tuple[int, str, Any]] = {}  # storage: bytes, part, what keeps the key valid
        self.limit, self.held, self.large_blocks = large, Pool(), Pool()
        self.routed, self._routed = Pool(), set[int]()  # of those alive, the blocks whose size follows the routing

    @contextlib.contextmanager
    def within(self, part: str, phase: str | None = None) -> Iterator[None]:
        """What is made inside belongs to ``part``."""
        before = self.part, self.phase
        self.part, self.phase = part, phase or self.phase
        yield
        self.part, self.phase = before

    def known(self, tensor: Tensor) -> None:
        """A tensor whose memory is counted elsewhere (weights, images)."""
        storage = tensor.untyped_storage()
        self.alive[storage._cdata] = (0, "", storage)

    def gradient(self, tensor: Tensor) -> None:
        """A temporary has become a parameter's gradient."""
        key = tensor.untyped_storage()._cdata
        if key in self.alive and self.alive[key][1] != "gradients":
            size, old, ref = self.alive[key]
            kept = round(size * self.gradient_share)
            self.alive[key] = kept, "gradients", ref
            pool = self._pool(size)
            pool.add(old, -size)
            pool.add("gradients", kept)

    def follows_routing(self, *tensors: Tensor | None) -> None:
        """Blocks that have another size in every step."""
        for tensor in tensors:
            if tensor is not None and tensor.untyped_storage().nbytes() < self.limit:
                self.routed.add("", tensor.untyped_storage().nbytes())
                self._routed.add(tensor.untyped_storage()._cdata)

    def send(self, kind: str, group: str, x: Tensor) -> None:
        """A message of this rank's ``x``."""
        self.messages[Message(kind, group, x.numel() * x.element_size())] += self.times

    def note(self, op: Op) -> None:
        """An operation that is not torch's."""
        self.ops.setdefault(self.phase, Counter())[op] += self.times

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        if any(r.alias_info is not None and not r.alias_info.is_write for r in func._schema.returns):
            return out  # a view
        outs = [t for t in tree_leaves(out) if isinstance(t, Tensor)]
        ins = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
        fresh = sum(map(self._fresh, outs))
        if func.overloadpacket.__name__ in _UNTOUCHED:
            if fresh:  # whoever writes it first pays; counted here
                self.note(Op("rest", 0, 0, False, fresh))
        elif outs:  # without a tensor: a question (device, size)
            self._count(func, ins, outs, args, kwargs, out, fresh)
        for tensor in outs:
            self._hold(tensor)
        return out

    def _fresh(self, tensor: Tensor) -> int:
        """Its bytes if it is a new block beyond ``limit``."""
        storage = tensor.untyped_storage()
        return storage.nbytes() if storage.nbytes() >= self.limit and storage._cdata not in self.alive else 0

    def _count(
        self, func: Any, ins: list[Tensor], outs: list[Tensor], args: Any, kwargs: Any, out: Any, fresh: int
    ) -> None:
        kind, flops = _work(func, args, kwargs, out)
        if kind == "conv":  # oneDNN's copies in a layout of its own
            fresh += sum(size for size in map(_bytes, [*ins, *outs]) if size >= self.limit)
        low = bool(ins) and ins[-1].dtype in (torch.bfloat16, torch.float16)
        again = ins[: _AGAIN.get(func.overloadpacket.__name__, 0)]
        size = sum(map(_bytes, [*ins, *outs, *again]))
        self.note(Op(kind, flops, size, low, fresh))

    def _hold(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self.alive:
            return
        size = storage.nbytes()
        self.alive[key] = size, self.part, weakref.ref(storage, lambda _: self._drop(key))
        self._pool(size).add(self.part, size)

    def _drop(self, key: int) -> None:
        size, part, _ = self.alive.pop(key)
        self._pool(size).add(part, -size)
        if key in self._routed:
            self._routed.remove(key)
            self.routed.add("", -size)

    def _pool(self, size: int) -> Pool:
        return self.held if size < self.limit else self.large_blocks


def _bytes(tensor: Tensor) -> int:
    return min(tensor.numel() * tensor.element_size(), tensor.untyped_storage().nbytes())


def _work(func: Any, args: Any, kwargs: Any, out: Any) -> tuple[str, int]:
    """Kind and FLOPs (2 a multiply-add) of one operation."""
    packet = func.overloadpacket
    name = packet.__name__
    if "attention" in name and "scaled_dot" in name:  # q k' and weights v, T x T x d each; backward: five products
        back = "backward" in name
        q, k = args[1:3] if back else args[:2]
        return "attention", (10 if back else 4) * q.numel() * k.shape[-2]
    if name == "_grouped_mm":
        a, b = args[:2]
        inner = a.shape[1] if b.ndim == 3 else a.shape[1] // max(1, out.shape[0])  # weight gradient: rows are summed
        return "matmul", 2 * out.numel() * inner
    if packet not in flop_registry:
        return "rest", 0
    flops = flop_registry[packet](*args, **kwargs, out_val=out)
    return "conv" if name in _CONV else "batched" if name in ("bmm", "baddbmm") else "matmul", flops


class PlanComm(Comm):
    """Rank 0 of ``world``: gives tensors of the right shapes and writes down what was sent."""

    def __init__(self, world: int, group: str, ledger: Ledger):
        self.rank, self.world, self.group, self.ledger = 0, world, group, ledger

    def _note(self, kind: str, x: Tensor) -> None:
        if self.world > 1:
            self.ledger.send(kind, self.group, x)

    def _gather(self, x: Tensor) -> list[Tensor]:
        self._note("all_gather", x)
        return [x] * self.world

    def _sum(self, x: Tensor, op: str) -> Tensor:
        self._note("all_reduce", x)
        return x.clone()

    def _exchange(self, x: Tensor, send: list[int], recv: list[int]) -> Tensor:
        self._note("all_to_all", x)
        return x.new_empty((sum(recv), *x.shape[1:]))
