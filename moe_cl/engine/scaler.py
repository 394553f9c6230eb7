"""The fp16 loss scale: one decision a step for all ranks and groups; a step that overflowed is tried again."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable
from typing import Any

import torch

from moe_cl.engine.health import NonFiniteLoss
from moe_cl.models import norm

SMALLEST = 2.0**-14  # a gradient that overflows fp16 here is no matter of scale


class Overflow(Exception):
    """The optimizer did not step: gradients overflowed at the present scale, which is smaller now."""


class StepScaler(torch.amp.GradScaler):
    """torch's dynamic scale, decided once a step by the gradient norm over all ranks (``finite``, engine/clip.py).

    torch looks at the gradients of the rank and changes the scale in every ``update``. DeepSpeed's ZeRO calls ``step``
    and ``update`` for each parameter group, with this rank's partition of it: one rank or group would step where
    another skips, and two groups of one step would be divided by different scales.
    """

    def __init__(self, device: str):
        super().__init__(device)
        self.finite, self._good = True, 0

    def step(self, optimizer: torch.optim.Optimizer, *args: Any, **kwargs: Any) -> Any:
        """The optimizer's step on unscaled gradients, or nothing."""
        if not self.finite:
            return None
        grads = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
        if grads:
            torch._foreach_mul_(grads, 1.0 / self.get_scale())
        return optimizer.step(*args, **kwargs)

    def update(self, new_scale: Any = None) -> None:
        """Nothing: groups of one step share a scale."""

    def finish(self) -> bool:
        """After the last group: smaller after an overflow, larger after many good steps. False if it was skipped."""
        finite, self.finite = self.finite, True
        self._good = self._good + 1 if finite else 0
        if not finite:
            super().update(self.get_scale() * self.get_backoff_factor())
        elif self._good == self.get_growth_interval():
            super().update(self.get_scale() * self.get_growth_factor())
            self._good = 0
        return finite

    def state_dict(self) -> dict[str, Any]:
        """torch's, with our count of good steps."""
        return {**super().state_dict(), "_growth_tracker": self._good}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Put back what ``state_dict`` gave."""
        super().load_state_dict(state_dict)
        self._good = state_dict["_growth_tracker"]


_PLACES = (("engine", "torch_autocast_z0_gradscaler"), ("optimizer", "torch_autocast_gradscaler"))


def install(engine: Any) -> None:
    """Put a ``StepScaler`` where DeepSpeed made a scaler (in the engine at stage 0, in its optimizer with ZeRO)."""
    from deepspeed.accelerator import get_accelerator

    for place, name in _PLACES:
        owner = engine if place == "engine" else getattr(engine, "optimizer", None)
        if getattr(owner, name, None) is not None:
            setattr(owner, name, StepScaler(get_accelerator().device_name()))


def scaler_of(engine: Any) -> StepScaler | None:
    """The engine's scaler, None without fp16."""
    for place, name in _PLACES:
        found = getattr(engine if place == "engine" else getattr(engine, "optimizer", None), name, None)
        if found is not None:
            return found
    return None


def loss_scale(engine: Any) -> float:
    """The factor that gradients carry now; 1 without a scaler."""
    scaler = scaler_of(engine)
    return float(scaler.get_scale()) if scaler is not None else 1.0


def optimizer_step(engine: Any) -> None:
    """``engine.step()``. Raises Overflow, on all ranks together, if the optimizer did not step."""
    engine.step()
    scaler = scaler_of(engine)
    if scaler is None:
        return
    seen = bool(getattr(engine.optimizer, "overflow", False))  # ZeRO looks at the norm too, and counts
    scaler.finite &= not seen
    if not scaler.finish():
        engine.global_steps -= 1  # counts optimizer steps
        engine.global_samples -= engine.train_batch_size()
        engine.skipped_steps += not seen
        raise Overflow


def until_finite(driver: Callable[..., Any]) -> Callable[..., Any]:
    """A driver that tries its step again, with the same samples, until the optimizer has stepped.

    So a step is always one optimizer step: cursor, schedules, queue and teacher never run ahead of the student, and
    batch norms count a batch once. ``parts.again`` tells the driver that the teacher has moved already.
    """

    @functools.wraps(driver)
    def run(parts: Any, batches: Any, number: int, momentum: float) -> Any:
        try:
            while True:
                try:
                    with norm.replay(norm.current_views()) if parts.again else contextlib.nullcontext():
                        return driver(parts, batches, number, momentum)
                except Overflow:
                    parts.again = True
                    if loss_scale(parts.engine) < SMALLEST:
                        raise NonFiniteLoss(
                            f"step {number}: gradients overflow fp16 at every loss scale; set engine.precision=bf16"
                        ) from None
        finally:
            parts.again = False

    return run
