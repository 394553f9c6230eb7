"""JCL's analysis: how the views of one image lie in feature space, beside how different images lie.

M views of each image are drawn as the run drew its own (its ``views``, overrides included; ``--spec`` names others) and
become keys: outputs of the key encoder's projector, of length 1. Reported: the distribution of similarities of positive
pairs (two views of an image) and of negative pairs (views of two images, other images drawn by ``--seed``), and of the
spread of an image's keys, tr(Sigma_i) = 1 - |mu_i|^2 with mu_i, Sigma_i mean and covariance of its M keys (moco_jcl.md
1.4). JCL should show larger positive similarities and smaller spreads than MoCo v2: give both with ``--against``.
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
from moe_cl.config import ConfigError
from moe_cl.engine.checkpoint.format import Reader
from moe_cl.evals import pretrained
from moe_cl.evals.features import Encode, extract
from moe_cl.models import folder

if TYPE_CHECKING:
    from moe_cl.evals.context import Context

BINS = 64
OTHERS = 64  # other images that each image is compared with


def similarities(keys: Tensor, chunk: int = 256, others: int = OTHERS, seed: int = 0) -> dict[str, Tensor]:
    """``positive`` (n * M(M-1)/2,), ``negative`` (n * min(n-1, others),) and ``spread`` (n,) of keys (n, M, D).

    Negative pairs: a view of each image with a view of every other one, or of ``others`` of them, drawn by ``seed``.
    Raises ConfigError for a single image.
    """
    keys = F.normalize(keys.float(), dim=2)
    n, m = keys.shape[:2]
    if n < 2:
        raise ConfigError("eval statistics compares images: the test set needs two at least")
    generator = torch.Generator().manual_seed(seed)
    count = min(n - 1, others)
    # image i and image (i + o) mod n: never itself
    drawn = torch.randint(1, n, (n, count), generator=generator)
    offsets = torch.arange(1, n).expand(n, -1) if count == n - 1 else drawn
    other = (torch.arange(n)[:, None] + offsets) % n
    mine, theirs = torch.randint(m, (2, n, count), generator=generator)
    row = torch.arange(n)
    negative = [(keys[row, mine[:, j]] * keys[other[:, j], theirs[:, j]]).sum(1) for j in range(count)]
    upper = torch.triu_indices(m, m, 1)
    positive = [(part @ part.transpose(1, 2))[:, upper[0], upper[1]].flatten() for part in keys.split(chunk)]
    spread = 1.0 - keys.mean(1).square().sum(1)
    return {"positive": torch.cat(positive), "negative": torch.cat(negative), "spread": spread}


def describe(values: Tensor) -> dict[str, float]:
    """Mean, deviation and quartiles."""
    low, middle, high = np.quantile(values.cpu().numpy(), [0.25, 0.5, 0.75]).tolist()
    return {"mean": float(values.mean()), "std": float(values.std()), "q25": low, "median": middle, "q75": high}


def histogram(values: Tensor, low: float, high: float) -> list[float]:
    """Shares in ``BINS`` equal bins from ``low`` to ``high``."""
    counts = np.histogram(values.cpu().numpy(), bins=BINS, range=(low, high))[0]
    return (counts / max(counts.sum(), 1)).tolist()


def encoder_of(run: Path, which: str, of: str, ctx: Context) -> tuple[nn.Module, Encode, str]:
    """Network, ``images -> keys`` (or features) and side. Keys are the teacher's where ``which`` leaves it open."""
    if of == "features":
        module, _, _ = pretrained.load(run, which)
        return module, ctx.encode(module), pretrained.side(run, which)
    if which == "auto" and not folder.is_folder(run):
        which = "teacher" if Reader(pretrained.checkpoint_of(run)).names("teacher") else "student"
    module, head = pretrained.contrasted(run, which)
    encode = ctx.encode(module.backbone)
    return module, lambda x: module("heads", head, encode(x)).float(), which


HELP = "JCL's analysis: similarity of positive and negative pairs, spread of an image's keys"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of ``eval statistics``."""
    parser.add_argument("--keys", type=whole(2), default=5, help="views an image (default: 5)")
    parser.add_argument("--spec", help="views by name, such as mocov2 (default: the run's own; of a folder, mocov2)")
    of = "projector's outputs of the key encoder (the teacher, unless --which says otherwise), or pooled features"
    parser.add_argument("--of", choices=("keys", "features"), default="keys", help=of)
    parser.add_argument("--others", type=whole(1), default=OTHERS, help="images to compare each with (default: 64)")
    parser.add_argument("--against", help="a second run, measured on the same views")


def run(ctx: Context) -> dict[str, Any]:
    """Table and JSON of ``eval statistics`` on the test set."""
    from moe_cl.config import ViewsConfig
    from moe_cl.evals.record import record
    from moe_cl.views.augment import make_views
    from moe_cl.views.spec import build_spec

    args = ctx.args
    views = ctx.cfg.views
    if args.spec or folder.is_folder(Path(args.checkpoint)):  # a folder does not know its run's views
        views = ViewsConfig(spec=args.spec or "mocov2")
    spec = build_spec(replace(views, size=ctx.size, normalize=ctx.normalize))
    spec = replace(spec, crops=(spec.crops[0],) * args.keys, global_views=args.keys, implementation="fast")

    def view(image: np.ndarray, sample_id: int) -> Tensor:
        return torch.stack(make_views(image, spec, args.seed, 0, sample_id)[0])

    def measure(run: str) -> tuple[dict[str, Tensor], str]:
        module, encode, which = encoder_of(Path(run), args.which, args.of, ctx)
        with ctx.untouched(module.to(ctx.device)):
            keys = lambda x: encode(x.flatten(0, 1)).unflatten(0, x.shape[:2]).flatten(1)  # noqa: E731
            flat, _ = extract(keys, ctx.loader(False, view), ctx.comm)
        return similarities(flat.unflatten(1, (args.keys, -1)), others=args.others, seed=args.seed), which

    runs = {"run": args.checkpoint} | ({"against": args.against} if args.against else {})
    measured = {name: measure(run) for name, run in runs.items()}
    found = {name: parts for name, (parts, _) in measured.items()}
    sides = {"which": measured["run"][1], "spec": views.spec} | (
        {"which_against": measured["against"][1]} if args.against else {}
    )
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
        record(ctx.out, ctx.name, ctx.step, values, ctx.setting("test", **sides), columns=columns, rows=rows, more=more)
    return values
