"""The table at the end of a run: kNN of pixels, of the untrained and the trained network, and a linear probe."""

from __future__ import annotations

import argparse
import statistics
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from moe_cl import config
from moe_cl.evals import pretrained
from moe_cl.evals.context import Context, class_count
from moe_cl.evals.features import Encode, extract, frozen
from moe_cl.evals.knn import knn
from moe_cl.evals.linear import linear_probe
from moe_cl.evals.record import record, write_json
from moe_cl.tracking.tail import read
from moe_cl.views.spec import NORMALIZE

HELP = "kNN of pixels, untrained and trained network, and a linear probe, in one table; writes summary.json"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of this protocol."""
    parser.add_argument("--k", type=int, help="neighbours (default: the run's eval.k)")


def pixels(normalize: str) -> Encode:
    """Images back to [0, 1] and flat; one channel of grey images (their kNN is the same)."""
    mean, std = (torch.tensor(v)[:, None, None] for v in NORMALIZE[normalize])

    def encode(images: Tensor) -> Tensor:
        x = images * std + mean
        grey = bool((x - x[:, :1]).abs().max() < 1e-5)
        return (x[:, :1] if grey else x).flatten(1)

    return encode


def speed(out: Path) -> dict[str, float]:
    """``images_per_second`` (median over the journal) and ``seconds`` of training, pauses between lives left out."""
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
    return {"images_per_second": statistics.median(rates), "seconds": seconds} if rates else {}


def run(ctx: Context) -> dict[str, float]:
    """The table, ``evals/summary.json`` and ``summary.json`` in the run's directory."""
    k, temperature = ctx.args.k or ctx.cfg.eval.k, ctx.cfg.eval.temperature
    untrained = pretrained.backbone(ctx.cfg).to(ctx.device)
    rows: list[list[Any]] = []
    values: dict[str, float] = {}

    def near(name: str, encode: Encode) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
        bank, test = (extract(encode, ctx.loader(train), ctx.comm) for train in (True, False))
        found = knn(*bank, *test, class_count(bank[1], test[1]), k, temperature, comm=ctx.comm)
        values[f"knn_{name}"] = found["top1"]
        rows.append([f"kNN (k {k}), {name}", found["top1"], found["top5"]])
        return bank, test

    near("pixels", pixels(ctx.normalize))
    with frozen(untrained):
        near("untrained", ctx.encode(untrained))
    with ctx.untouched():
        bank, test = near("trained", ctx.encode())
    probe = linear_probe(*bank, *test, class_count(bank[1], test[1]), comm=ctx.comm, seed=ctx.args.seed)
    values["linear_trained"] = float(probe["top1"])
    rows.append([f"linear probe (lr {probe['lr']:.3g}), trained", probe["top1"], probe["top5"]])
    values |= speed(ctx.out)
    if ctx.comm.rank == 0:
        setting = ctx.setting(k=k, temperature=temperature, bank=len(bank[0]), tested=len(test[0]))
        record(ctx.out, "summary", ctx.step, values, setting, columns=("", "top-1", "top-5"), rows=rows)
        write_json(
            ctx.out / "summary.json", {**values, "step": ctx.step, "setting": setting, "run": config.to_tree(ctx.cfg)}
        )
    return values
