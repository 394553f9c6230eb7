"""What the routers of a pretrained encoder do: load, agreement between two views, selectivity for class and position.

Legend: N images, T tokens, E experts, e(t) = a token's first expert. Agreement: share of places of an image and of its
mirror with other colours (``evals.pairs``) that have the same first expert. Selectivity for a property z: mutual
information I(e; z) / H(e), 0 = the expert says nothing about z, 1 = everything.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from moe_cl.arguments import whole
from moe_cl.comm import Comm
from moe_cl.config import ConfigError
from moe_cl.evals.features import opened
from moe_cl.evals.pairs import mirror_index, mirrored

if TYPE_CHECKING:
    from moe_cl.evals.context import Context


def selectivity(counts: Tensor) -> float:
    """I(e; z) / H(e) from joint counts (E, Z); 0 if one expert takes all."""
    p = counts.double() / counts.sum().clamp(min=1)
    expert, other = p.sum(1, keepdim=True), p.sum(0, keepdim=True)
    entropy = -(expert * expert.clamp(min=1e-300).log()).sum()
    information = (p * (p.clamp(min=1e-300) / (expert * other).clamp(min=1e-300)).log()).sum()
    return float(information / entropy) if entropy > 1e-12 else 0.0


class Counts:
    """Running counts of one MoE layer; sums over batches and ranks."""

    def __init__(self, experts: int, grid: int, classes: int):
        self.load = torch.zeros(experts, dtype=torch.float64)
        self.by_class = torch.zeros(experts, classes, dtype=torch.float64)
        self.cls_by_class = torch.zeros(experts, classes, dtype=torch.float64)
        self.by_position = torch.zeros(experts, grid * grid, dtype=torch.float64)
        self.agreed = torch.zeros(2, 2, dtype=torch.float64)  # (cls, patches) x (same, all)
        self.grid, self.mirror = grid, mirror_index(grid)

    def add(self, indices: Tensor, labels: Tensor) -> None:
        """Routing (2*N, T, k) of images and their mirrors, class token first, and labels (N,), -1 where unknown."""
        indices, named = indices.cpu(), labels >= 0
        if len(labels) and int(labels.max()) >= self.by_class.shape[1]:
            raise ConfigError(f"eval routing: a label is {int(labels.max())}; --classes must be above it")
        n = len(labels)
        self.load += torch.bincount(indices[:n].flatten(), minlength=len(self.load)).double()
        first, second = indices[:n, :, 0], indices[n:, :, 0]
        patches = first[:, 1:]
        ones = torch.ones(patches.numel(), dtype=torch.float64)
        known, spread = patches[named].flatten(), labels[named, None].expand_as(patches[named]).flatten()
        self.by_class.index_put_((known, spread), ones[: len(known)], accumulate=True)
        self.cls_by_class.index_put_((first[named, 0], labels[named]), ones[: int(named.sum())], accumulate=True)
        place = torch.arange(patches.shape[1]).expand_as(patches).flatten()
        self.by_position.index_put_((patches.flatten(), place), ones, accumulate=True)
        same = patches == second[:, 1:][:, self.mirror]
        self.agreed[0] += torch.tensor([(first[:, 0] == second[:, 0]).sum(), n], dtype=torch.float64)
        self.agreed[1] += torch.tensor([same.sum(), same.numel()], dtype=torch.float64)

    def figures(self, comm: Comm) -> dict[str, Any]:
        """Load shares (list), dead experts, agreement and selectivity over all ranks."""
        load, by_class, cls_by_class, by_position, agreed = (
            comm.all_reduce(t) for t in (self.load, self.by_class, self.cls_by_class, self.by_position, self.agreed)
        )
        share = load / load.sum()
        cls, patch = (agreed[:, 0] / agreed[:, 1].clamp(min=1)).tolist()
        return {
            "load": share.tolist(),
            "load_max_over_mean": float(share.max() * len(share)),
            "dead": int((load == 0).sum()),
            "agreement_cls": cls,
            "agreement_patches": patch,
            "class_selectivity_cls": selectivity(cls_by_class),
            "class_selectivity_patches": selectivity(by_class),
            "position_selectivity": selectivity(by_position),
        }


@torch.no_grad()
def measure(
    backbone: nn.Module, batches: Iterable[tuple[Tensor, Tensor, Tensor]], classes: int, device: Any, comm: Comm
) -> list[dict[str, Any]]:
    """Figures of every MoE layer from this rank's batches of mirrored pairs (b, 2, C, S, S), labels and ids.

    Raises ConfigError or DataStop, on all ranks, for what one rank meets.
    """

    def count() -> list[Counts]:
        layers: list[Counts] = []
        for images, labels, _ in batches:
            encoded = backbone([images.to(device).transpose(0, 1).flatten(0, 1)])
            if not encoded.routing or not encoded.routing[0]:
                raise ConfigError("eval routing: this encoder has no experts")
            grid = round(encoded.regions[0].shape[1] ** 0.5)
            layers = layers or [Counts(r.experts, grid, classes) for r in encoded.routing[0]]
            for counts, routing in zip(layers, encoded.routing[0], strict=True):
                counts.add(routing.indices, labels)
        return layers

    layers = opened(count, comm)
    shapes = comm.gather_objects([(len(c.load), c.grid, classes) for c in layers])
    if not any(shapes):
        raise ConfigError("eval routing: the data set is empty")
    layers = layers or [Counts(*shape) for shape in next(s for s in shapes if s)]  # a rank without an image adds zeros
    return [counts.figures(comm) for counts in layers]


HELP = "load of the experts, agreement of routing between two views, selectivity for class and position"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of ``eval routing``."""
    parser.add_argument("--classes", type=whole(1), help="number of classes (default: counted in the test set)")


def run(ctx: Context) -> list[dict[str, Any]]:
    """Table and JSON of ``eval routing`` on the test set."""
    from moe_cl.evals.record import record

    view = mirrored(ctx.size, ctx.normalize, ctx.args.seed, ctx.args.interpolation, gray=0.2)
    classes = ctx.args.classes
    if classes is None:
        own = opened(lambda: max((int(labels.max()) for _, labels, _ in ctx.loader(False)), default=-1), ctx.comm)
        classes = max(1, 1 + int(ctx.comm.all_reduce(torch.tensor([own]), "max")))
    with ctx.untouched():
        layers = measure(ctx.backbone, ctx.loader(False, view), classes, ctx.device, ctx.comm)
    if ctx.comm.rank == 0:
        flat = [{k: v for k, v in figures.items() if k != "load"} for figures in layers]
        values = {f"L{i}/{k}": float(v) for i, figures in enumerate(flat) for k, v in figures.items()}
        rows = [[f"L{i}", *figures.values()] for i, figures in enumerate(flat)]
        columns = ("layer", *flat[0])
        record(
            ctx.out,
            ctx.name,
            ctx.step,
            values,
            ctx.setting("test"),
            columns=columns,
            rows=rows,
            more={"layers": layers},
        )
    return layers
