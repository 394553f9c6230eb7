"""JCL's analysis: how the views of one image lie in feature space, beside how different images lie.

M views of each image are drawn by the run's own recipe and encoded, rows normalised. Reported: the distribution of
similarities of positive pairs (two views of an image) and of negative pairs (views of two images), and of the spread of
an image's keys, tr(Sigma_i) = 1 - |mu_i|^2 with mu_i, Sigma_i mean and covariance of its M keys (moco_jcl.md 1.4). JCL
should show larger positive similarities and smaller spreads than MoCo v2: give both with ``--against``.
"""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moe_cl.arguments import whole
from moe_cl.evals.features import extract, frozen

if TYPE_CHECKING:
    from moe_cl.evals.context import Context

BINS = 64


def similarities(keys: Tensor, chunk: int = 256) -> dict[str, Tensor]:
    """``positive`` (n * M(M-1)/2,), ``negative`` (n-1,) and ``spread`` (n,) of keys (n, M, D).

    Negative pairs: view 0 of image i with view 1 of image i+1, n - 1 pairs, images in the order given (shuffled sets).
    """
    keys = F.normalize(keys.float(), dim=2)
    m = keys.shape[1]
    upper = torch.triu_indices(m, m, 1)
    positive = [(part @ part.transpose(1, 2))[:, upper[0], upper[1]].flatten() for part in keys.split(chunk)]
    negative = (keys[:-1, 0] * keys[1:, -1]).sum(1)
    return {"positive": torch.cat(positive), "negative": negative, "spread": 1.0 - keys.mean(1).square().sum(1)}


def describe(values: Tensor) -> dict[str, float]:
    """Mean, deviation and quartiles."""
    low, middle, high = np.quantile(values.cpu().numpy(), [0.25, 0.5, 0.75]).tolist()
    return {"mean": float(values.mean()), "std": float(values.std()), "q25": low, "median": middle, "q75": high}


def histogram(values: Tensor, low: float, high: float) -> list[float]:
    """Shares in ``BINS`` equal bins from ``low`` to ``high``."""
    counts = np.histogram(values.cpu().numpy(), bins=BINS, range=(low, high))[0]
    return (counts / max(counts.sum(), 1)).tolist()


HELP = "JCL's analysis: similarity of positive and negative pairs, spread of an image's keys"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of ``eval statistics``."""
    parser.add_argument("--keys", type=whole(1), default=5, help="views an image (default: 5)")
    parser.add_argument("--spec", default="mocov2", help="recipe of the views (default: mocov2, which JCL uses)")
    parser.add_argument("--against", help="a second run, measured on the same views")


def run(ctx: Context) -> dict[str, Any]:
    """Table and JSON of ``eval statistics`` on the test set."""
    from moe_cl.config import ViewsConfig
    from moe_cl.evals import pretrained
    from moe_cl.evals.record import record
    from moe_cl.views.augment import make_views
    from moe_cl.views.spec import build_spec

    args = ctx.args
    spec = build_spec(ViewsConfig(spec=args.spec, size=ctx.size, normalize=ctx.normalize))
    spec = replace(spec, crops=(spec.crops[0],) * args.keys, global_views=args.keys, implementation="fast")

    def view(image: np.ndarray, sample_id: int) -> Tensor:
        return torch.stack(make_views(image, spec, args.seed, 0, sample_id)[0])

    def measure(backbone: nn.Module) -> dict[str, Tensor]:
        encode = ctx.encode(backbone)
        flat = extract(lambda x: encode(x.flatten(0, 1)).unflatten(0, x.shape[:2]).flatten(1), loader(), ctx.comm)[0]
        return similarities(flat.unflatten(1, (args.keys, -1)))

    def loader() -> Any:
        return ctx.loader(False, view)

    with ctx.untouched():
        found = {"run": measure(ctx.backbone)}
    if args.against:
        other, _, _ = pretrained.load(Path(args.against), args.which)
        with frozen(other):
            found["against"] = measure(other.to(ctx.device))
    values, rows, histograms = {}, [], {}
    for name, parts in found.items():
        for what, numbers in parts.items():
            figures = describe(numbers)
            values |= {f"{name}/{what}/{k}": v for k, v in figures.items()}
            rows.append([name, what, *figures.values()])
            histograms[f"{name}/{what}"] = histogram(numbers, 0.0 if what == "spread" else -1.0, 1.0)
    if ctx.comm.rank == 0:
        columns = ("of", "figure", "mean", "std", "q25", "median", "q75")
        more = {"histograms": histograms, "bins": BINS}
        record(ctx.out, ctx.name, ctx.step, values, ctx.setting("test"), columns=columns, rows=rows, more=more)
    return values
