"""``accuracy.md`` from the cells measured so far."""

from __future__ import annotations

import datetime
import os
import statistics
from collections.abc import Iterable, Sequence
from typing import Any

from benchmarks._cells import BASELINES, METHODS, SETS, SPARSE, Budget

MEASURES = ("knn", "linear", "4-shot/ridge", "10-shot/ridge")
HEAD = """# Accuracy

Written by `python -m benchmarks.accuracy{options}`
after every cell, {date}, {cores} CPU cores. A cell is `pretrain` of a `*_fmnist` recipe and
`eval summary --full --shots 4 10`, as a user runs them{launcher}.{settings}

Budget, equal for all methods: {images:,} images seen (each gives all views of the method), global batch {batch},
warm-up over the first tenth. The networks are small ViTs of equal active FLOPs: width 128, 4 blocks, 4 heads, 16
patches; the sparse ones have 8 experts of half the dense width in every second block, top-2. What the authors evaluate
is evaluated: the student, of EsViT and DINO the teacher. This says how the code learns in minutes on small images; it
is no ranking of the methods at the papers' scale, where each was tuned and trained a thousand times longer.

kNN: k 20, T 0.07, the bank is all training images. Linear: protocol `fast`, its rate chosen on a tenth held out of
training. 4- and 10-shot: ridge regression, mean of five draws. All are top-1 in percent on the whole test set, mean and
standard deviation over the seeds. FLOPs are those of matrix products and convolutions, a multiply-add as two: of a
training step an image, and of the backbone's forward a view.
"""


def write(
    budget: Budget,
    cells: dict[str, dict[str, Any]],
    sizes: dict[str, dict[str, int]],
    flops: dict[str, Sequence[float]],
    options: str,
    methods: Iterable[str],
) -> str:
    """The page. ``cells``: results by key; ``flops``: (step, forward) by ``set/method``."""
    launcher = f", on {budget.ranks} ranks through the DeepSpeed launcher" if budget.ranks else ""
    settings = f" Settings of all cells: `{' '.join(budget.overrides)}`." if budget.overrides else ""
    head = HEAD.format(
        options=options, date=datetime.date.today(), cores=os.cpu_count(), launcher=launcher, settings=settings,
        images=budget.images, batch=budget.batch,
    )  # fmt: skip
    out = [head]
    for name in SETS:
        mine = {key: value for key, value in cells.items() if key.startswith(f"{name}/")}
        if mine:
            out += _section(name, mine, sizes[name], flops, list(methods))
    return "\n".join(out)


def rows_of(cells: dict[str, dict[str, Any]], method: str, row: str) -> list[dict[str, float]]:
    """One dictionary of figures a seed."""
    found = [value for key, value in cells.items() if key.split("/")[1] == method]
    return [value["figures"][row] for value in found if row in value["figures"]]


def _section(
    name: str,
    cells: dict[str, dict[str, Any]],
    sizes: dict[str, int],
    flops: dict[str, Sequence[float]],
    methods: Sequence[str],
) -> list[str]:
    out = [f"\n## {name}\n", SETS[name].about.format(**sizes) + ".\n"]
    out.append("| | MFLOP step | MFLOP view | seeds | kNN | linear | 4-shot | 10-shot |")
    out.append("|---|---|---|---|---|---|---|---|")
    out += _row("raw pixels", rows_of(cells, BASELINES["dense"], "pixels"), None)
    for kind, text in (("dense", "untrained ViT"), ("sparse", "untrained V-MoE")):
        out += _row(text, rows_of(cells, BASELINES[kind], "untrained"), None)
    for method in methods:
        out += _row(method, rows_of(cells, method, "trained"), flops.get(f"{name}/{method}"))
    below = [m for m in methods if (r := ratio(cells, m)) is not None and r <= 1]
    if any(ratio(cells, m) is not None for m in methods):
        said = f"not of {', '.join(below)}" if below else "of every method"
        out.append(f"\nMean kNN is above the untrained network's {said}.")
    health = {m: value["health"] for m in methods for key, value in cells.items() if key.split("/")[1:] == [m, "0"]}
    if health:
        names = list(dict.fromkeys(n for values in health.values() for n in values))
        out.append("\nHealth of seed 0, first step -> last:\n")
        out.append("| | " + " | ".join(names) + " |")
        out.append("|---|" + "---|" * len(names))
        for method, values in health.items():
            ends = [f"{values[n][0]:.3g} -> {values[n][1]:.3g}" if n in values else "" for n in names]
            out.append(f"| {method} | " + " | ".join(ends) + " |")
    return out


def ratio(cells: dict[str, dict[str, Any]], method: str) -> float | None:
    """Mean kNN of a method over its untrained network's; None while one of them is missing."""
    base = rows_of(cells, BASELINES["sparse" if method in SPARSE else "dense"], "untrained")
    mine = rows_of(cells, method, "trained")
    if not base or not mine:
        return None
    return statistics.mean(r["knn"] for r in mine) / statistics.mean(r["knn"] for r in base)


def _row(text: str, figures: list[dict[str, float]], flops: Sequence[float] | None) -> list[str]:
    if not figures:
        return []
    cost = [f"{flops[0] / 1e6:.0f}", f"{flops[1] / 1e6:.1f}"] if flops else ["", ""]
    shown = [percent([f[m] for f in figures if m in f]) for m in MEASURES]
    return [f"| {text} | " + " | ".join([*cost, str(len(figures)), *shown]) + " |"]


def percent(values: Sequence[float]) -> str:
    """``82.31 +- 0.20``; without the deviation of a single value."""
    if not values:
        return ""
    mean = 100 * statistics.mean(values)
    return f"{mean:.1f}" + (f" +- {100 * statistics.stdev(values):.1f}" if len(values) > 1 else "")


def order(methods: Iterable[str]) -> list[str]:
    """Methods in the table's order."""
    asked = set(methods)
    return [m for m in METHODS if m in asked]
