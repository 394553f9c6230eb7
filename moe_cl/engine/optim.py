"""Optimizers with the papers' parameter groups: SGD, LARS, AdamW (torch's own but for LARS).

A group carries ``name`` (DeepSpeed's MoE needs one), ``decayed`` and ``frozen``; learning rate and decay are set a step
by ``set_hyper``. Optimizers skip a frozen group whole: no decay, no moments, no step count. That is what a gradient of
None means in plain PyTorch; DeepSpeed's stage 0 makes zeros of it, and a flat ZeRO partition has no None.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from moe_cl.config import OptimConfig

Groups = list[dict[str, Any]]


def is_expert(name: str, p: Tensor) -> bool:
    """True for a stack of experts' parameters, dim 0 = expert (marked by DeepSpeed, or by its name without it)."""
    return not getattr(p, "allreduce", True) or ".experts." in f".{name}"


def matrix(name: str, p: Tensor) -> bool:
    """True if one tensor of the model is a matrix: ndim > 1, an expert of a stack counted alone."""
    return p.dim() - is_expert(name, p) > 1


def decayed(name: str, p: Tensor, rule: str) -> bool:
    """``all``: everything (MoCo v1-v3, CR-MoE). ``matrices``: ndim > 1 and no bias (EsViT's get_params_groups)."""
    return rule == "all" or (matrix(name, p) and not name.rsplit(".", 1)[-1].startswith("bias"))


def param_groups(
    model: nn.Module, optim: OptimConfig, separate: Sequence[str] = ("last_layer",), fresh: Iterable[str] = ()
) -> Groups:
    """Groups of the trainable parameters of ``model``; frozen ones are left out.

    Args:
        model: the student; parameters shared under two names count once.
        optim: weight decay and its rule.
        separate: parameters whose name contains one of these strings get groups of their own (they can be frozen).
        fresh: names of parameters without a past when others go on (``init_from``): their groups count their own steps.

    Returns:
        dicts with ``params``, ``name``, ``weight_decay``, ``decayed``, ``frozen``; empty groups are left out.
    """
    new, groups = set(fresh), {}
    for name, p in model.named_parameters():
        if not p.requires_grad:
            continue
        decay = decayed(name, p, optim.decay)
        parts = ["decay" if decay else "no_decay", *(s for s in separate if s in name), *(["fresh"] * (name in new))]
        # LARS asks a tensor's rank, which a flat partition has lost: one rank-rule a group keeps the answer with it.
        if optim.name == "lars":
            parts.append("matrix" if matrix(name, p) else "vector")
        group = groups.setdefault(
            "/".join(parts),
            {"params": [], "name": "/".join(parts), "weight_decay": optim.weight_decay if decay else 0.0},
        )
        # DeepSpeed's MoE renames the groups it splits off; ``origin`` keeps what they were.
        group.update(origin=group["name"], decayed=decay, frozen=False)
        if optim.name == "lars":
            group["adapt"] = parts[-1] == "matrix"
        group["params"].append(p)
    return list(groups.values())


def build(groups: Groups, optim: OptimConfig, lr: float) -> torch.optim.Optimizer:
    """The optimizer over ``param_groups`` (or their expert-split form)."""
    if optim.name == "adamw":
        # Fused: one pass over memory instead of about ten, also on the CPU.
        betas = (optim.betas[0], optim.betas[1])
        return AdamW(groups, lr=lr, betas=betas, eps=optim.eps, weight_decay=optim.weight_decay, fused=True)
    if optim.name == "sgd":
        return SGD(groups, lr=lr, momentum=optim.momentum, weight_decay=optim.weight_decay)
    return LARS(groups, lr, optim.weight_decay, optim.momentum, optim.trust_coefficient)


def set_hyper(optimizer: Any, lr: float, weight_decay: float | None = None) -> None:
    """Learning rate of every group, and the decay of the decayed ones (None = leave)."""
    for group in optimizer.param_groups:
        group["lr"] = lr
        if weight_decay is not None and group.get("decayed", True):
            group["weight_decay"] = weight_decay


def freeze(optimizer: Any, pattern: str, frozen: bool) -> None:
    """Freeze (or thaw) the groups set apart for ``pattern`` (``separate`` of ``param_groups``)."""
    for group in optimizer.param_groups:
        if pattern in group["origin"].split("/"):
            group["frozen"] = frozen


class _Freezing:
    """Runs ``step`` on the groups that are not frozen."""

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        groups = self.param_groups
        self.param_groups = [g for g in groups if not g.get("frozen")]
        try:
            return super().step(closure) if self.param_groups else None
        finally:
            self.param_groups = groups


class AdamW(_Freezing, torch.optim.AdamW):
    """torch's AdamW that skips frozen groups."""


class SGD(_Freezing, torch.optim.SGD):
    """torch's SGD that skips frozen groups."""


class _LARS(torch.optim.Optimizer):
    """Layer-wise adaptive rate scaling (You et al. 2017, arXiv:1708.03888) as in moco-v3 ``moco/optimizer.py``.

    Tensors with ndim > 1: g <- g + wd p; g <- g trust ||p|| / ||g|| (factor 1 if a norm is 0). Others: no decay, no
    scaling. Then mu <- momentum mu + g; p <- p - lr mu.

    ``pieces[p]``: for a flat ZeRO partition, [start, stop, factor] of every tensor in it; the factors come from norms
    summed over ranks (``moe_cl.engine.clip``). ``units[p]``: a stack of that many experts, each with its own norms.
    """

    def __init__(
        self, params: Groups, lr: float, weight_decay: float = 0.0, momentum: float = 0.9, trust: float = 1e-3
    ):
        super().__init__(params, dict(lr=lr, weight_decay=weight_decay, momentum=momentum, trust=trust))
        self.pieces: dict[Tensor, list[tuple[int, int, Tensor]]] = {}
        self.units: dict[Tensor, int] = {}

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> None:
        """One update of every parameter that has a gradient."""
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None:
                    continue
                update = p.grad
                if group.get("adapt", p.dim() > 1):
                    update = p.grad.add(p, alpha=group["weight_decay"])
                    if p in self.pieces:
                        for start, stop, factor in self.pieces[p]:
                            update[start:stop].mul_(factor)
                    else:
                        for mine, theirs in zip(
                            _rows(update, self.units.get(p)), _rows(p, self.units.get(p)), strict=True
                        ):
                            mine.mul_(trust_factor(theirs.norm(), mine.norm(), group["trust"]))
                state = self.state[p]
                if "mu" not in state:
                    state["mu"] = torch.zeros_like(p)
                state["mu"].mul_(group["momentum"]).add_(update)
                p.add_(state["mu"], alpha=-group["lr"])


class LARS(_Freezing, _LARS):
    """LARS that skips frozen groups."""


def trust_factor(weight_norm: Tensor, update_norm: Tensor, trust: float) -> Tensor:
    """trust ||p|| / ||g + wd p||, 1 where either norm is 0."""
    ratio = trust * weight_norm / update_norm
    return torch.where((weight_norm > 0) & (update_norm > 0), ratio, torch.ones_like(ratio))


def _rows(x: Tensor, units: int | None) -> list[Tensor]:
    return [x] if units is None else list(x.chunk(units))
