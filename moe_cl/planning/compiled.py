"""The experts' compiled kernels (``moe_cl/moe/kernels.py``) for tracing: their memory, FLOPs and bytes, no values.

Legend as there: R rows, M assignments, F rows filled up by tile, E experts, D width, H hidden width.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from moe_cl.moe import kernels
from moe_cl.planning.ledger import Ledger, Op

AHEAD = 4  # experts whose packed weights there is room for, besides one a thread: queue.h


def shares(total: int, parts: int) -> list[int]:
    """``total`` cut into ``parts`` nearly equal numbers."""
    return [total * (i + 1) // parts - total * i // parts for i in range(parts)]


def filled(assignments: int, experts: int) -> int:
    """F of a balanced routing."""
    return sum(-(-n // kernels.FILL) * kernels.FILL for n in shares(assignments, experts))


class PlannedKernels:
    """``kernels.Kernels`` without values: the same functions give tensors of the same shapes.

    What the library takes for itself (packed weights, operands of the weight gradients) is alive during the call.
    """

    def __init__(self, ledger: Ledger):
        self.ledger = ledger

    def forward(
        self, x: Tensor, token: Tensor, counts: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor, keep: bool,
        last: bool = True,
    ) -> tuple[Tensor | None, Tensor | None]:  # fmt: skip
        experts, hidden, d = w1.shape
        m, f = len(token), filled(len(token), experts)
        h = x.new_empty(f, hidden) if keep else None
        y = x.new_empty(m + 1, d) if last else None
        self.ledger.follows_routing(h)
        own = self._packed(x, w1)
        self._done(2 * f * d * hidden * (1 + last), x, m * d + f * hidden * keep + m * d * last, (w1, w2), own)
        return h, y

    def backward(
        self, x: Tensor, g: Tensor, p: Tensor, token: Tensor, counts: Tensor, w1: Tensor, w2: Tensor, h: Tensor
    ) -> tuple[Tensor, Tensor, list[Tensor]]:
        (experts, hidden, d), m = w1.shape, len(token)
        gx, gp = x.new_empty(m + 1, d), w1.new_empty(m + 1)
        sums = [w1.new_empty(q) for q in (w1.shape, (experts, hidden), w2.shape, (experts, d))]
        own = self._packed(x, w1)
        operands = [x.new_empty(len(h), size) for size in (d, hidden) for _ in range(2)]  # written, then read
        self.ledger.follows_routing(*operands)
        moved = 3 * m * d + h.numel() + 2 * sum(t.numel() for t in operands)
        self._done(8 * h.numel() * d, x, moved, (w1, w2, *sums), own)
        return gx, gp, sums

    def combine(self, values: Tensor, inverse: Tensor, weights: Tensor | None = None) -> Tensor:
        out = values.new_empty(len(inverse), values.shape[1], dtype=torch.float32)
        size = inverse.numel() * (values.shape[1] * values.element_size() + 12) + 4 * out.numel()
        self.ledger.note(Op("rest", 0, size, False))
        return out

    @staticmethod
    def _packed(x: Tensor, w1: Tensor) -> Tensor:
        """Both weights of the experts in the ring."""
        places = min(len(w1), AHEAD + torch.get_num_threads())
        return x.new_empty(places * 2 * w1[0].numel())

    def _done(self, flops: int, x: Tensor, moved: int, whole: tuple[Tensor, ...], own: Tensor) -> None:
        """``moved``: numbers of the products' type that the call reads and writes; ``whole``: fp32 it goes through."""
        size = x.element_size() * moved + sum(4 * t.numel() for t in whole)
        self.ledger.note(Op("experts", flops, size, x.dtype == torch.bfloat16))


@contextlib.contextmanager
def planned(ledger: Ledger) -> Iterator[None]:
    """Inside, the experts' layers use ``PlannedKernels`` where a run on this machine would use ``Kernels``."""
    real, plain, own = kernels.get, torch.empty(0), PlannedKernels(ledger)

    def get(x: Tensor, *asked: Any) -> Any:
        if not isinstance(x, FakeTensor):  # somebody's real rows meanwhile
            return real(x, *asked)
        return own if x.device.type == "cpu" and real(plain, *asked) is not None else None

    kernels.get = get
    try:
        yield
    finally:
        kernels.get = real
