"""The teacher: a second model whose parameters are an exponential moving average of the student's, in fp32."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn


def ema_(teacher: list[Tensor], student: list[Tensor], momentum: float) -> None:
    """theta_k <- m theta_k + (1 - m) theta_q in place (MoCo eq. 2); all tensors fp32 or fp64.

    As theta_k + (1 - m)(theta_q - theta_k): one pass over memory, and the rounding falls on the small term.
    """
    for tensor in teacher[:1]:
        if tensor.dtype in (torch.bfloat16, torch.float16):
            raise TypeError("an EMA in 16 bits never moves at m = 0.999; keep the teacher in fp32")
    if teacher:
        torch._foreach_lerp_(teacher, student, 1.0 - momentum)


def held(p: nn.Parameter) -> Tensor:
    """What this rank keeps of a parameter: all of it, or with ZeRO 3 its shard.

    Student and teacher are cut alike, so the average of shards is the shard of the average; nothing is gathered for it.
    """
    return p.ds_tensor.detach() if hasattr(p, "ds_tensor") else p.detach()


class Teacher:
    """Callable like the student (same forward, same precision context), never trained, never inside the engine.

    Its parameters are those of the student that share a name. Frozen ones (position embedding, patch projection) are
    equal for ever and left alone: m p + (1 - m) p would round. Buffers (batch-norm statistics) are each side's own.
    """

    def __init__(self, module: nn.Module, student: nn.Module, precision: Any):
        """``precision()`` opens the context in which the student's forward runs too."""
        self.module, self._precision = module.requires_grad_(False), precision
        source = dict(student.named_parameters())
        missing = [name for name, _ in module.named_parameters() if name not in source]
        if missing:
            raise ValueError(f"teacher parameters the student lacks: {missing[:3]}")
        self._pairs = [(p, source[name]) for name, p in module.named_parameters()]
        self.copy_student()

    @torch.no_grad()
    def copy_student(self) -> None:
        """Start as an exact copy (parameters; buffers of the two fresh models are equal already)."""
        for mine, theirs in self._pairs:
            held(mine).copy_(held(theirs))

    @torch.no_grad()
    def update(self, momentum: float) -> None:
        """One EMA step with the student's present weights; momentum in [0, 1]."""
        moving = [pair for pair in self._pairs if pair[1].requires_grad]
        ema_([held(mine) for mine, _ in moving], [held(theirs) for _, theirs in moving], momentum)
        for mine, _ in moving:
            if hasattr(mine, "ds_tensor") and mine.numel() == mine.ds_numel:
                mine.partition()  # a gathered copy is stale now

    @torch.no_grad()
    def __call__(self, *args: Any) -> Any:
        context: AbstractContextManager = self._precision()
        with context:
            return self.module(*args)
