"""Heads of a learning-rate and weight-decay sweep, all trained at once on the same frozen features.

Legend: S settings of the sweep on this rank, B batch, D feature width, K classes. Settings are dealt out over ranks and
batches are whole on each, so no gradient is exchanged and the result does not depend on the number of ranks.

Softmax regression has its gradient in closed form, G = (softmax(x W + b) - onehot) / B, dW = x' G: two matrix products
a batch for all settings together, no graph.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from typing import Literal

import torch
from torch import Tensor

from moe_cl.comm import Comm, LocalComm
from moe_cl.evals.knn import hits


@dataclass(frozen=True)
class Protocol:
    """A published way of training the probe. ``lrs`` are multiplied by B/256 where ``scale`` says so."""

    lrs: tuple[float, ...]
    weight_decays: tuple[float, ...] = (0.0,)
    momentum: float = 0.9
    epochs: int = 100
    batch: int = 256
    schedule: Literal["cosine", "step"] = "cosine"
    per: Literal["epoch", "iteration"] = "epoch"
    milestones: tuple[float, ...] = (0.6, 0.8)  # of the epochs, x0.1 each
    scale: bool = True
    blocks: int = 1  # features of the last blocks
    augment: bool = True  # random-resized crops and flips, as published; features are then computed every epoch
    least_steps: int = 0  # a small set is passed over more often, until there are so many

    def on(self, images: int) -> Protocol:
        """With the epochs that a training set of this size gets."""
        steps = math.ceil(images / self.batch)
        return replace(self, epochs=max(self.epochs, math.ceil(self.least_steps / steps)))


_DECADES = tuple(m * 10.0**e for e in range(-5, 2) for m in (1, 3, 5, 7, 9))
PROTOCOLS: dict[str, Protocol] = {
    # moco_jcl.md section 3; esvit.md section 3; crmoe.md 3.2 (35 rates x 2 decays, plain SGD)
    "mocov2": Protocol(lrs=(30.0,), schedule="step", scale=False),
    "mocov3_resnet": Protocol(lrs=(0.1,), epochs=90, batch=1024),
    "mocov3_vit": Protocol(lrs=(3.0,), epochs=90, batch=1024),
    "esvit": Protocol(lrs=(0.001,), batch=1024, blocks=4),
    "crmoe": Protocol(lrs=_DECADES, weight_decays=(0.0, 1e-6), momentum=0.0, epochs=90, batch=1024),
    # ours: features computed once, a short sweep, for small sets and for monitoring
    "fast": Protocol(
        lrs=tuple(10.0 ** (e / 2) for e in range(-5, 4)),
        epochs=30,
        batch=512,
        per="iteration",
        augment=False,
        least_steps=1000,
    ),
}


@dataclass
class Sweep:
    """The heads of a protocol's settings on this rank and their optimizer.

    Args:
        protocol: settings. width: D. classes: K. total_steps, steps_per_epoch: of the schedule.
        comm: ranks over which settings are dealt. device: where the heads live.
    """

    protocol: Protocol
    width: int
    classes: int
    steps_per_epoch: int
    comm: Comm = field(default_factory=LocalComm)
    device: torch.device | str = "cpu"
    seed: int = 0

    def __post_init__(self) -> None:
        everything = [(lr, wd) for lr in self.protocol.lrs for wd in self.protocol.weight_decays]
        self.mine = list(range(self.comm.rank, len(everything), self.comm.world))
        self.settings, self.step_number = everything, 0
        scale = self.protocol.batch / 256 if self.protocol.scale else 1.0
        column = lambda i: torch.tensor([everything[s][i] for s in self.mine], device=self.device)[:, None]  # noqa: E731
        self.lr, self.wd = column(0) * scale, column(1)
        # N(0, .01) weights, 0 biases; a setting's start depends on its number alone
        weights = [
            torch.randn(self.width, self.classes, generator=torch.Generator().manual_seed(self.seed * 1_000_003 + s))
            for s in self.mine
        ]
        shape = (self.width, len(self.mine), self.classes)
        self.w = (torch.stack(weights, 1) * 0.01).to(self.device) if weights else torch.zeros(shape, device=self.device)
        self.b = torch.zeros(shape[1:], device=self.device)
        self.vw, self.vb = torch.zeros_like(self.w), torch.zeros_like(self.b)

    def factor(self) -> float:
        """Learning rate of this step as a part of the base one."""
        epoch = self.step_number / self.steps_per_epoch
        if self.protocol.per == "epoch":
            epoch = math.floor(epoch)
        if self.protocol.schedule == "step":
            return 0.1 ** sum(epoch >= m * self.protocol.epochs for m in self.protocol.milestones)
        return 0.5 * (1 + math.cos(math.pi * epoch / self.protocol.epochs))

    def logits(self, x: Tensor) -> Tensor:
        """(B, D) -> (B, S, K)."""
        return (x @ self.w.flatten(1)).unflatten(1, self.b.shape) + self.b

    @torch.no_grad()
    def step(self, x: Tensor, y: Tensor) -> None:
        """One SGD step of every head on features (B, D) and labels (B,)."""
        if self.mine:
            g = self.logits(x).softmax(2)
            g[torch.arange(len(x), device=x.device), :, y] -= 1.0
            g /= len(x)
            lr, momentum = self.lr * self.factor(), self.protocol.momentum
            for value, velocity, grad, decay in (
                (self.w, self.vw, (x.T @ g.flatten(1)).view_as(self.w), self.wd),
                (self.b, self.vb, g.sum(0), self.wd),
            ):
                velocity.mul_(momentum).add_(grad).add_(decay * value)
                value.sub_(lr * velocity)
        self.step_number += 1

    def epoch(self, x: Tensor, y: Tensor, generator: torch.Generator) -> None:
        """One pass over features (N, D) in a new order."""
        order = torch.randperm(len(x), generator=generator).to(x.device)
        for index in order.split(self.protocol.batch):
            self.step(x[index], y[index])

    @torch.no_grad()
    def correct(self, x: Tensor, y: Tensor, chunk: int = 4096) -> Tensor:
        """Right answers among the best 1 and the best 5 of every setting of all ranks, (settings, 2)."""
        out = torch.zeros(len(self.settings), 2, dtype=torch.float64, device=self.device)
        for start in range(0, len(x), chunk):
            labels = y[start : start + chunk]
            for s, scores in zip(self.mine, self.logits(x[start : start + chunk]).unbind(1), strict=True):
                for j, top in enumerate((1, 5)):
                    out[s, j] += hits(scores.nan_to_num(nan=-1e30), labels, top).sum()
        return self.comm.all_reduce(out)

    @torch.no_grad()
    def predict(self, x: Tensor, setting: int, chunk: int = 4096) -> Tensor:
        """Classes (N,) that the head of one setting gives, on every rank."""
        out = torch.zeros(len(x), dtype=torch.float64, device=self.device)
        if setting in self.mine:
            head = self.mine.index(setting)
            out = torch.cat([self.logits(part)[:, head].argmax(1) for part in x.split(chunk)]).double()
        return self.comm.all_reduce(out).long()


def per_class(found: Tensor, labels: Tensor) -> float:
    """Mean over the classes present of each one's accuracy; both (N,)."""
    right = (found == labels).double()
    return float(torch.stack([right[labels == c].mean() for c in labels.unique()]).mean())


def split(labels: Tensor, fraction: float, seed: int) -> tuple[Tensor, Tensor]:
    """Indices of a training and a held-out part, the same fraction of every class (at least one stays)."""
    generator = torch.Generator().manual_seed(seed)
    train, held = [], []
    for c in labels.unique().tolist():
        index = (labels.cpu() == c).nonzero().flatten()
        index = index[torch.randperm(len(index), generator=generator)]
        cut = min(max(1, round(len(index) * fraction)), len(index) - 1)
        held.append(index[:cut])
        train.append(index[cut:])
    return torch.cat(train).sort().values, torch.cat(held).sort().values
