"""Sparse upcycling: a ViT with experts that starts from a dense checkpoint (Komatsuzaki et al. 2023).

Every tensor that both networks have is copied. A block that has got experts makes them from the dense MLP: expert e of
width h takes the hidden units (e*h, e*h + 1, ...) mod H of the dense width H, so experts narrower than the MLP are cuts
that cover it together, and wider ones repeat units, each repeat with its share of the output weights. The router stays
as it was made. Experts of a multiple of H with renormalised weights give the dense network's function exactly.
"""

from __future__ import annotations

from collections.abc import Container
from dataclasses import dataclass, field

import torch
from torch import Tensor

from moe_cl.config import ConfigError
from moe_cl.models.vit import Mlp, ViT

_DENSE = ("fc1.weight", "fc1.bias", "fc2.weight", "fc2.bias")


@dataclass
class Report:
    """Names: ``copied`` as they were, ``experts`` made from a dense MLP, ``fresh`` as initialised."""

    copied: list[str] = field(default_factory=list)
    experts: list[str] = field(default_factory=list)
    fresh: list[str] = field(default_factory=list)


def units(expert: int, hidden: int, dense: int) -> tuple[Tensor, Tensor]:
    """Dense hidden units of an expert (hidden,) and each one's share of its output weights (hidden,)."""
    index = (expert * hidden + torch.arange(hidden)) % dense
    return index, 1.0 / torch.bincount(index, minlength=dense)[index]


def can_upcycle(vit: ViT, names: Container[str]) -> bool:
    """True if a state dict of these ``names`` has a dense MLP where ``vit`` has experts."""
    blocks = enumerate(vit.blocks)
    return any(not isinstance(b.mlp, Mlp) and f"blocks.{i}.mlp.fc1.weight" in names for i, b in blocks)


@torch.no_grad()
def upcycle(vit: ViT, state: dict[str, Tensor]) -> Report:
    """Fill ``vit`` in place from a dense network's state dict (the names of ``ViT``); experts of this rank only.

    Raises:
        ConfigError: a tensor is missing, left over or of another shape.
    """
    report, left, own = Report(), dict(state), dict(vit.state_dict())
    for i, block in enumerate(vit.blocks):
        name = f"blocks.{i}.mlp."
        if isinstance(block.mlp, Mlp) or name + _DENSE[0] not in left:
            continue
        missing = [name + part for part in _DENSE if name + part not in left]
        if missing:
            raise ConfigError(f"upcycling: the checkpoint has no {missing[0]}")
        fc1, bias1, fc2, bias2 = (left.pop(name + part) for part in _DENSE)
        experts = block.mlp.experts
        local, hidden, dim = experts.w1.shape
        if fc1.shape[1] != dim:
            raise ConfigError(
                f"upcycling: the checkpoint is {fc1.shape[1]} wide, the model {dim}; set model.options.dim"
            )
        for e in range(local):
            index, share = units(experts.first + e, hidden, len(fc1))
            experts.w1[e].copy_(fc1[index])
            experts.b1[e].copy_(bias1[index])
            experts.w2[e].copy_(fc2[:, index] * share.to(fc2))
            experts.b2[e].copy_(bias2)
        made = [n for n in own if n.startswith(name)]
        report.experts += [n for n in made if ".experts." in n]
        report.fresh += [n for n in made if ".experts." not in n]
        for n in made:
            own.pop(n)
    for n, value in own.items():
        if n not in left:
            raise ConfigError(f"upcycling: the checkpoint has no {n}")
        source = left.pop(n)
        if source.shape != value.shape:
            raise ConfigError(
                f"upcycling: {n} is {tuple(source.shape)} in the checkpoint and {tuple(value.shape)} in the model"
            )
        value.copy_(source)
        report.copied.append(n)
    if left:
        raise ConfigError(f"upcycling: the model has no place for {next(iter(left))} ({len(left)} tensors left over)")
    return report
