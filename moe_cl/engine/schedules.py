"""What changes over a run, each a pure function of the step: learning rate, EMA momentum, weight decay.

A step is an optimizer step from 0. MoCo v3's curves take the fractional epoch step / steps_per_epoch; EsViT's are
arrays over iterations whose warm-up includes both ends; MoCo v1/v2 and JCL take the whole epoch (``per: epoch``).
"""

from __future__ import annotations

import math

from moe_cl.config import OptimConfig, ScheduleConfig, TeacherConfig


def scaled_lr(optim: OptimConfig, global_batch: int) -> float:
    """Peak learning rate: base_lr * B/256 (linear, Goyal et al. 2017), base_lr * sqrt(B) (SimCLR) or base_lr."""
    factor = {"linear": global_batch / 256, "sqrt": math.sqrt(global_batch), "none": 1.0}[optim.lr_scaling]
    return optim.base_lr * factor


def cosine(start: float, end: float, fraction: float) -> float:
    """From ``start`` at fraction 0 to ``end`` at 1: end + (start - end) (1 + cos(pi f)) / 2."""
    return end + (start - end) * 0.5 * (1 + math.cos(math.pi * fraction))


def dino(
    step: int,
    steps_per_epoch: int,
    base: float,
    end: float,
    epochs: float,
    warmup_epochs: float = 0,
    start: float = 0,
) -> float:
    """EsViT's cosine: linspace(start, base, W*n) with both ends, then a cosine that stays short of ``end``."""
    warmup = round(warmup_epochs * steps_per_epoch)
    if step < warmup:
        return start + (base - start) * step / (warmup - 1) if warmup > 1 else start
    return cosine(base, end, (step - warmup) / max(round(epochs * steps_per_epoch) - warmup, 1))


def total_steps(schedule: ScheduleConfig, steps_per_epoch: int) -> int:
    """Optimizer steps of the whole run, whatever it started from."""
    epochs = min(schedule.epochs, schedule.stop_epochs or schedule.epochs)
    return min(schedule.max_steps or 2**62, round(epochs * steps_per_epoch))


def learning_rate(step: int, steps_per_epoch: int, peak: float, schedule: ScheduleConfig) -> float:
    """Learning rate of optimizer step ``step``.

    ``cosine``: linear warm-up from 0 over ``warmup_epochs``, then cosine to ``min_lr`` (MoCo v3; per epoch and without
    warm-up: MoCo v2). ``step``: times ``gamma`` at each milestone passed. ``dino``: see above.
    """
    if schedule.kind == "dino":
        return dino(step, steps_per_epoch, peak, schedule.min_lr, schedule.epochs, schedule.warmup_epochs)
    epoch = step // steps_per_epoch if schedule.per == "epoch" else step / steps_per_epoch
    if epoch < schedule.warmup_epochs:
        return peak * epoch / schedule.warmup_epochs
    if schedule.kind == "cosine":
        rest = schedule.epochs - schedule.warmup_epochs
        return cosine(peak, schedule.min_lr, (epoch - schedule.warmup_epochs) / rest if rest > 0 else 1.0)
    if schedule.kind == "step":
        return peak * schedule.gamma ** sum(epoch >= m for m in schedule.milestones)
    return peak


def teacher_momentum(step: int, steps_per_epoch: int, teacher: TeacherConfig, epochs: float) -> float:
    """EMA coefficient m of theta_t <- m theta_t + (1 - m) theta_s at this step.

    ``cosine``: 1 - (1 + cos(pi e/E))/2 * (1 - m0) with the fractional epoch e (MoCo v3). ``dino``: the same curve over
    iterations.
    """
    if teacher.schedule == "constant":
        return teacher.momentum
    if teacher.schedule == "dino":
        return dino(step, steps_per_epoch, teacher.momentum, teacher.momentum_end, epochs)
    return cosine(teacher.momentum, teacher.momentum_end, step / steps_per_epoch / epochs)


def weight_decay(step: int, steps_per_epoch: int, optim: OptimConfig, epochs: float) -> float:
    """Weight decay of the decayed groups: constant, or a cosine over iterations to ``weight_decay_end`` (EsViT)."""
    if optim.weight_decay_end is None:
        return optim.weight_decay
    return dino(step, steps_per_epoch, optim.weight_decay, optim.weight_decay_end, epochs)
