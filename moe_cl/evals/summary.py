"""The table at the end of a run: kNN of pixels, of the untrained and the trained network, and a linear probe; with
``--shots`` few-shot transfer, and with ``--full`` all of it for every row. Features are computed once."""

from __future__ import annotations

import argparse
import statistics
from pathlib import Path
from typing import Any

import torch

from moe_cl import config
from moe_cl.arguments import whole
from moe_cl.evals import pretrained
from moe_cl.evals.context import Context, class_count
from moe_cl.evals.features import Encode, frozen
from moe_cl.evals.fewshot import few_shot
from moe_cl.evals.knn import knn, say_all_vote
from moe_cl.evals.linear import linear_probe
from moe_cl.evals.record import record, write_json
from moe_cl.evals.sets import metric_of
from moe_cl.tracking import redact
from moe_cl.tracking.tail import read
from moe_cl.views.spec import NORMALIZE

HELP = "kNN of pixels, untrained and trained network, and a linear probe, in one table; writes summary.json"
ROWS = ("pixels", "untrained", "trained")
PARTS = ((True, "bank"), (False, "test set"))


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of this protocol."""
    parser.add_argument("--k", type=whole(1), help="neighbours (default: the run's eval.k)")
    parser.add_argument("--rows", nargs="+", choices=ROWS, default=list(ROWS), help="default: all three")
    parser.add_argument("--shots", type=whole(1), nargs="+", default=[], help="few-shot transfer: images a class")
    parser.add_argument("--draws", type=whole(1), default=5, help="of the few-shot images (default: 5)")
    parser.add_argument("--full", action="store_true", help="probe and few-shot of pixels and untrained network too")


def pixels(ctx: Context) -> Encode:
    """Images back to [0, 1] and flat; of a grey set one channel (nothing is lost)."""
    mean, std = (torch.tensor(v)[:, None, None] for v in NORMALIZE[ctx.normalize])
    first = next(iter(ctx.loader(True)), None)
    x = first[0] * std + mean if first is not None else torch.zeros(1, 1, 1, 1)
    channels = 1 if all(ctx.comm.gather_objects(bool((x - x[:, :1]).abs().max() < 1e-5))) else None
    return lambda images: (images * std + mean)[:, :channels].flatten(1)


def training(out: Path) -> dict[str, Any]:
    """What the run said at its (last) start: batch, ranks, precision, length; empty without a journal."""
    try:
        starts = [line for line in read(out / "journal.jsonl") if line["kind"] == "event" and line["name"] == "start"]
    except OSError:
        return {}
    return {k: v for k, v in starts[-1].items() if k not in ("kind", "time", "name", "step")} if starts else {}


def speed(out: Path) -> dict[str, float]:
    """``images_per_second`` (mean over the steps' time) and ``seconds`` of training, pauses between lives left out."""
    try:
        lines = read(out / "journal.jsonl")
    except OSError:
        return {}
    rates, seconds, last = [], 0.0, None
    for line in lines:
        if line["kind"] == "event" and line["name"] in ("start", "resume"):
            last = line["time"]
        elif line["kind"] == "step":
            rates.append(float(line["values"].get("images_per_second", 0.0)))
            seconds += line["time"] - last if last is not None else 0.0
            last = line["time"]
    return {"images_per_second": statistics.harmonic_mean(rates), "seconds": seconds} if rates else {}


def run(ctx: Context) -> dict[str, float]:
    """The table, ``evals/summary.json`` and ``summary.json`` in the run's directory."""
    args = ctx.args
    ctx.one_label()
    k, temperature = args.k or ctx.cfg.eval.k, ctx.cfg.eval.temperature
    rows: list[list[Any]] = []
    values: dict[str, float] = {}
    sizes: dict[str, int] = {}
    metric = metric_of(ctx.source(False))
    shown = {"top1": "top-1", "top5": "top-5"} | ({metric: metric} if metric == "per_class" else {})

    def add(key: str, text: str, figures: dict[str, Any]) -> None:
        values[key] = figures["top1"]
        if metric in figures:
            values[f"{key}/{metric}"] = figures[metric]
        rows.append([text, *(figures.get(figure, "") for figure in shown)])

    def measure(name: str, encode: Encode, text: str = "") -> None:
        text = text or name
        bank, test = (ctx.features(train, encode, what=f"{name}, {part}") for train, part in PARTS)
        if not sizes:  # the same bank for every row
            say_all_vote(k, len(bank[0]), ctx.comm)
        sizes.update(bank=len(bank[0]), tested=len(test[0]))
        classes = class_count(bank[1], test[1])
        found = knn(*bank, *test, classes, k, temperature, comm=ctx.comm, name=metric)
        add(f"knn_{name}", f"kNN (k {k}), {text}", found)
        if name != "trained" and not args.full:
            return
        probe = linear_probe(*bank, *test, classes, comm=ctx.comm, seed=args.seed, name=metric)
        add(f"linear_{name}", f"linear probe (lr {probe['lr']:.3g}), {text}", probe)
        if args.shots:
            draws = few_shot(*bank, *test, shots=args.shots, seeds=args.draws, comm=ctx.comm, name=metric)
            means = {protocol: statistics.mean(accuracies) for protocol, accuracies in draws.items()}
            for protocol in (p for p in means if not p.endswith(metric)):
                beside = {metric: means[f"{protocol}/{metric}"]} if f"{protocol}/{metric}" in means else {}
                add(f"{protocol}_{name}", f"{protocol}, {text}", {"top1": means[protocol], **beside})

    if "pixels" in args.rows:
        measure("pixels", pixels(ctx))
    if "untrained" in args.rows:
        untrained = pretrained.backbone(ctx.cfg).to(ctx.device)
        with frozen(untrained):
            measure("untrained", ctx.encode(untrained))
    if "trained" in args.rows:
        with ctx.untouched():
            measure("trained", ctx.encode(), f"trained ({ctx.which})")
    values |= speed(ctx.out)
    if ctx.comm.rank == 0:
        setting = ctx.setting("train", "test", k=k, temperature=temperature, **sizes)
        record(ctx.out, ctx.name, ctx.step, values, setting, columns=("", *shown.values()), rows=rows)
        about = {"training": training(ctx.out), "evaluation": setting, "run": config.to_tree(ctx.cfg)}
        write_json(ctx.out / "summary.json", {**values, "step": ctx.step, "setting": redact.value("setting", about)})
    return values
