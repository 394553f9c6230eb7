"""Linear probes on frozen features: the papers' protocols, with the choice of the head on a held-out split."""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence
from dataclasses import asdict, replace
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from moe_cl.arguments import real, whole
from moe_cl.comm import Comm, LocalComm
from moe_cl.config import ConfigError
from moe_cl.counting import counted
from moe_cl.evals import subset
from moe_cl.evals.sweep import PROTOCOLS, Protocol, Sweep, per_class, split

if TYPE_CHECKING:
    from moe_cl.evals.context import Context


def train_sweep(
    protocol: Protocol, x: Tensor, y: Tensor, classes: int, *, seed: int = 0, comm: Comm | None = None
) -> Sweep:
    """All heads of ``protocol`` trained on cached features (N, D)."""
    protocol = protocol.on(len(x))
    sweep = Sweep(
        protocol, x.shape[1], classes, math.ceil(len(x) / protocol.batch), comm or LocalComm(), x.device, seed
    )
    generator = torch.Generator().manual_seed(seed)
    for _ in counted(range(protocol.epochs), "linear probe", "epochs", show=comm is None or comm.rank == 0):
        sweep.epoch(x, y, generator)
    return sweep


def linear_probe(
    train_x: Tensor,
    train_y: Tensor,
    test_x: Tensor,
    test_y: Tensor,
    classes: int,
    *,
    protocol: str | Protocol = "fast",
    held_out: float = 0.1,
    select: Literal["held_out", "test"] = "held_out",
    seed: int = 0,
    comm: Comm | None = None,
    epochs: int | None = None,
    lrs: Sequence[float] | None = None,
    name: str = "accuracy",
) -> dict[str, float | str]:
    """Test accuracy of a linear classifier on frozen features.

    A sweep is trained on all but ``held_out`` of the training set, its best setting is chosen there and trained again
    on the whole of it, and the test set is looked at once. ``select="test"``: the papers' way, best of the sweep on the
    test set (the result says so).

    Args:
        name: the set's metric (``metrics``); ``per_class`` is given beside the others.

    Returns:
        ``top1``, ``top5`` in [0, 1], the chosen ``lr`` and ``weight_decay``, ``held_out_top1``, ``selection``.
    """
    if isinstance(protocol, str):
        if protocol not in PROTOCOLS:
            raise ConfigError(f"unknown linear protocol {protocol!r}; use one of {', '.join(PROTOCOLS)}")
        protocol = PROTOCOLS[protocol]
    changes = {
        "epochs": epochs,
        "least_steps": 0 if epochs is not None else None,
        "lrs": None if lrs is None else tuple(lrs),
    }
    protocol = replace(protocol, **{k: v for k, v in changes.items() if v is not None})
    train_x, test_x = train_x.float(), test_x.float()
    train_y, test_y = train_y.to(train_x.device), test_y.to(test_x.device)
    if select == "test":
        sweep = train_sweep(protocol, train_x, train_y, classes, seed=seed, comm=comm)
        accuracy = sweep.correct(test_x, test_y) / len(test_x)
        best = int(accuracy[:, 0].argmax())
        out = _result(accuracy[best], sweep.settings[best], None, "best on test (as published)")
        return out | _more(name, sweep, best, test_x, test_y)
    best_setting, held_top1, how = (protocol.lrs[0], protocol.weight_decays[0]), None, "no choice to make"
    if len(protocol.lrs) * len(protocol.weight_decays) > 1:
        fit, held, how = _parts(train_y, held_out, seed)
        sweep = train_sweep(protocol, train_x[fit], train_y[fit], classes, seed=seed, comm=comm)
        accuracy = sweep.correct(train_x[held], train_y[held]) / len(held)
        best = int(accuracy[:, 0].argmax())
        best_setting, held_top1 = sweep.settings[best], float(accuracy[best, 0])
    one = replace(protocol, lrs=best_setting[:1], weight_decays=best_setting[1:])
    final = train_sweep(one, train_x, train_y, classes, seed=seed, comm=comm)
    out = _result(final.correct(test_x, test_y)[0] / len(test_x), best_setting, held_top1, how)
    return out | _more(name, final, 0, test_x, test_y)


def _parts(labels: Tensor, held_out: float, seed: int) -> tuple[Tensor, Tensor, str]:
    """Indices that a sweep trains on, those that choose, and what the table says of the choice.

    With one image a class nothing can be held out: then the training images choose, and the table says that.
    """
    fit, held = (i.to(labels.device) for i in split(labels, held_out, seed))
    return (fit, held, "held out of training") if len(held) else (fit, fit, "on the training images: one a class")


def _result(
    accuracy: Tensor, setting: tuple[float, float], held_out: float | None, selection: str
) -> dict[str, float | str]:
    top1, top5 = accuracy.tolist()
    out: dict[str, float | str] = {"top1": top1, "top5": top5, "lr": setting[0], "weight_decay": setting[1]}
    return out | ({} if held_out is None else {"held_out_top1": held_out}) | {"selection": selection}


def _more(name: str, sweep: Sweep, setting: int, x: Tensor, y: Tensor) -> dict[str, float]:
    """The set's own metric where it is not plain accuracy."""
    return {name: per_class(sweep.predict(x, setting), y)} if name == "per_class" else {}


HELP = "linear probe on frozen features: MoCo's, MoCo v3's, EsViT's and CR-MoE's protocols, or a fast one"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of ``eval linear``."""
    parser.add_argument("--protocol", dest="probe", choices=tuple(PROTOCOLS), default="fast", help="default: fast")
    parser.add_argument("--epochs", type=whole(1), help="instead of the protocol's")
    parser.add_argument("--lr", type=real(above=0), nargs="+", help="rates of the sweep instead of the protocol's")
    parser.add_argument("--probe-batch", type=whole(1), help="images a step of the probe instead of the protocol's")
    parser.add_argument("--blocks", type=whole(1), help="features of the last blocks instead of the protocol's")
    parser.add_argument("--patches", action="store_true", help="with the mean patch token beside the class token")
    parser.add_argument("--no-augment", action="store_true", help="plain views: features are computed once")
    subset.add_arguments(parser)
    parser.add_argument(
        "--held-out", type=real(low=0, below=1), default=0.1, help="part of the training set that chooses the head"
    )
    parser.add_argument(
        "--select-on-test", action="store_true", help="the papers' way: best head and epoch on the test set"
    )


def run(ctx: Context) -> dict[str, Any]:
    """Table and JSON of ``eval linear``."""
    from moe_cl.evals.context import class_count
    from moe_cl.evals.record import record
    from moe_cl.evals.sets import metric_of

    ctx.one_label()
    args, protocol = ctx.args, PROTOCOLS[ctx.args.probe]
    asked = {
        "epochs": args.epochs,
        "least_steps": 0 if args.epochs else None,
        "lrs": tuple(args.lr) if args.lr else None,
        "batch": args.probe_batch,
        "blocks": args.blocks,
        "augment": False if args.no_augment else None,
    }
    protocol = replace(protocol, **{k: v for k, v in asked.items() if v is not None})
    encode = ctx.encode(blocks=protocol.blocks, patches=args.patches)
    with ctx.untouched():
        train, test = ctx.features(True, encode), ctx.features(False, encode)
        classes = class_count(train[1], test[1])
        if protocol.augment:
            out = _augmented(ctx, protocol, encode, train, test, classes)
        else:
            out = linear_probe(
                *train,
                *test,
                classes,
                protocol=protocol,
                held_out=args.held_out,
                select="test" if args.select_on_test else "held_out",
                seed=args.seed,
                comm=ctx.comm,
                name=metric_of(ctx.source(False)),
            )
    if ctx.comm.rank == 0:
        figures = {k: v for k, v in out.items() if isinstance(v, float)}
        images = len(train[1])
        sweep = asdict(protocol.on(images))
        setting = ctx.setting("train", "test", sweep=sweep, classes=classes, images=images)
        shown = {"protocol": args.probe, "images": images, "lr": out["lr"], "top-1": out["top1"], "top-5": out["top5"]}
        shown |= {k: out[k] for k in ("per_class",) if k in out} | {"chosen": out["selection"]}
        columns, rows = tuple(shown), [list(shown.values())]
        more = {"selection": out["selection"]}
        record(ctx.out, ctx.name, ctx.step, figures, setting, columns=columns, rows=rows, more=more)
    return out


def _augmented(
    ctx: Context,
    protocol: Protocol,
    encode: Any,
    train: tuple[Tensor, Tensor],
    test: tuple[Tensor, Tensor],
    classes: int,
) -> dict[str, Any]:
    """Random-resized crops (scale .08 to 1) and flips, new every epoch; the held-out part is left out of training.

    The encoder is frozen, so an epoch's features do not depend on the order of its batches: they are computed once an
    epoch, in data order, and every head of the sweep trains on them.
    """
    from moe_cl.evals.sets import metric_of

    several = len(protocol.lrs) * len(protocol.weight_decays) > 1 and not ctx.args.select_on_test
    labels = train[1]
    held: Tensor | None = None
    fit, how = torch.arange(len(labels), device=labels.device), "no choice to make"
    if several:
        fit, held, how = _parts(labels, ctx.args.held_out, ctx.args.seed)
    protocol = protocol.on(len(fit))
    steps = math.ceil(len(fit) / protocol.batch)
    sweep = Sweep(protocol, train[0].shape[1], classes, steps, ctx.comm, train[0].device, ctx.args.seed)
    generator = torch.Generator().manual_seed(ctx.args.seed)
    best: Tensor | None = None
    name = metric_of(ctx.source(False))
    more: dict[str, float] = {}  # of the best epoch
    for epoch in counted(range(protocol.epochs), "linear probe", "epochs", show=ctx.comm.rank == 0):
        x, y = ctx.features(True, encode, view=crop_and_flip(ctx, epoch))
        x, y = x[y >= 0], y[y >= 0]  # as the plain view's loader has it
        if not torch.equal(y, labels):
            raise RuntimeError("the training set changed between two passes over it")
        sweep.epoch(x[fit], y[fit], generator)
        if ctx.args.select_on_test:
            accuracy = sweep.correct(*test) / len(test[1])
            if best is None or accuracy[:, 0].max() > best[:, 0].max():
                best, more = accuracy, _more(name, sweep, int(accuracy[:, 0].argmax()), *test)
    if best is not None:
        chosen = int(best[:, 0].argmax())
        out = _result(best[chosen], sweep.settings[chosen], None, "best head and epoch on test (as published)")
        return out | more
    chosen, score = 0, None
    if held is not None:
        scores = sweep.correct(train[0][held], labels[held])[:, 0] / len(held)
        chosen, score = int(scores.argmax()), float(scores.max())
    accuracy = sweep.correct(*test)[chosen] / len(test[1])
    return _result(accuracy, sweep.settings[chosen], score, how) | _more(name, sweep, chosen, *test)


def crop_and_flip(ctx: Context, epoch: int) -> Any:
    """The papers' training view of a probe: random-resized crop and flip by (seed, epoch, id)."""
    from moe_cl.views.augment import make_views
    from moe_cl.views.spec import NORMALIZE, CropSpec, ViewSpec

    crop = CropSpec(size=ctx.size, order=[])  # bilinear in all of them; --interpolation is of the test's resize
    spec = ViewSpec("probe", (crop,), 1, *NORMALIZE[ctx.normalize])
    return lambda image, sample_id: make_views(image, spec, ctx.args.seed, epoch, sample_id)[0][0]
