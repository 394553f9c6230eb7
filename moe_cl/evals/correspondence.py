"""EsViT's analysis: do matching regions of two views have matching features, and how sharp is the attention?

Correspondence (Li et al. 2022, section 4.3; esvit.md section 2): every region of view 1 takes the region of view 2 with
the largest cosine; the ten most similar of an image are kept; their distance is that of the cell centres, in pixels,
between where they were sent and where they are. Attention: entropy in bits, and the share of keys that hold 60 % of the
mass, mean over queries.
"""

from __future__ import annotations

import argparse
import math
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from moe_cl.arguments import whole
from moe_cl.config import ConfigError
from moe_cl.evals.features import depth, extract
from moe_cl.evals.pairs import mirror_index, mirrored

if TYPE_CHECKING:
    from moe_cl.evals.context import Context

KEEP = 10


def correspond(first: Tensor, second: Tensor, cell: float, keep: int = KEEP) -> tuple[Tensor, Tensor]:
    """Pixel distances (B, keep) of the most similar matches and similarities (B, keep + 1), best first.

    Args:
        first, second: regions (B, g*g, D) of an image and of its mirror. cell: side of a region, pixels.
    """
    tokens = first.shape[1]
    grid = math.isqrt(tokens)
    if grid * grid != tokens:
        raise ConfigError(f"correspondence needs square views, found {tokens} regions")
    similarity, found = (F.normalize(first, dim=2) @ F.normalize(second, dim=2).transpose(1, 2)).max(2)
    best = similarity.topk(min(keep + 1, tokens), 1)
    chosen = best.indices[:, :keep]
    there, true = found.gather(1, chosen), mirror_index(grid).to(first.device)[chosen]
    rows, cols = (there // grid - true // grid).float(), (there % grid - true % grid).float()
    return cell * torch.sqrt(rows**2 + cols**2), best.values


def sharpness(weights: Tensor, mass: float = 0.6) -> tuple[Tensor, Tensor]:
    """Entropy in bits and share of keys holding ``mass``, means over queries: (N, h) each of weights (N, h, T, T)."""
    weights = weights.float()
    entropy = -(weights * weights.clamp(min=1e-12).log2()).sum(-1).mean(-1)
    ordered = weights.sort(-1, descending=True).values.cumsum(-1)
    needed = (ordered < mass).sum(-1) + 1
    return entropy, (needed / weights.shape[-1]).mean(-1)


HELP = "EsViT's correspondence of regions between two views, and the entropy of the attention"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of ``eval correspondence``."""
    parser.add_argument("--keep", type=whole(1), default=KEEP, help="matches kept an image (default: 10)")
    parser.add_argument("--attention", type=int, nargs="*", default=[-1], help="blocks whose attention is measured")


def run(ctx: Context) -> dict[str, Any]:
    """Table and JSON of ``eval correspondence`` on the test set."""
    from moe_cl.evals.record import record

    args, backbone = ctx.args, ctx.backbone
    blocks, there = args.attention if hasattr(backbone, "attention") else [], depth(backbone)
    if wrong := [b for b in blocks if not -there <= b < there]:
        raise ConfigError(f"--attention {wrong[0]}: the encoder has {there} blocks, 0 to {there - 1} or -{there} to -1")

    def measure(images: Tensor) -> Tensor:
        first, second = images.to(ctx.device).unbind(1)
        regions = backbone([torch.cat([first, second])]).regions[0].float()
        cell = ctx.size / math.isqrt(regions.shape[1])
        distance, similarity = correspond(*regions.chunk(2), cell, args.keep)
        columns = [(distance == 0).float().mean(1), distance.mean(1), similarity[:, : args.keep].mean(1)]
        columns += [similarity[:, -1]]
        for block in blocks:
            for figure in sharpness(backbone.attention(first, block)):
                columns.append(figure.mean(1).view(len(first), -1).mean(1))  # Swin: mean over an image's windows
        return torch.stack(columns, 1)

    view = mirrored(ctx.size, ctx.normalize, args.seed, args.interpolation)
    with ctx.untouched():
        figures, _ = extract(measure, ctx.loader(False, view), ctx.comm)
    names = ["accuracy", "distance", "similarity", "next_similarity"]
    names += [f"attention/block{b}/{what}" for b in blocks for what in ("entropy_bits", "keys_for_60")]
    values = dict(zip(names, figures.mean(0).tolist(), strict=True))
    if ctx.comm.rank == 0:
        record(ctx.out, ctx.name, ctx.step, values, ctx.setting("test", images=len(figures)))
    return values
