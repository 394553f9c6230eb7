"""Few-shot transfer: n images a class, several draws, ridge regression in closed form and logistic regression.

A draw of seed s takes the first n of one permutation of each class, so draws of one seed are nested (2 < 4 < 10 shots),
as CR-MoE's published splits are (crmoe.md 3.4). The mean over the draws is given with its 95 % t interval.

Ridge (big_vision's few-shot probe is the model): features and targets centred, W = X' (X X' + l I)^-1 Y. l is chosen by
the exact leave-one-out error of the few images, e_i = (y_i - f_i) / (1 - H_ii), so nothing else is looked at.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from moe_cl.arguments import real, whole
from moe_cl.comm import Comm, LocalComm
from moe_cl.config import ConfigError
from moe_cl.counting import counted
from moe_cl.evals.sweep import per_class

if TYPE_CHECKING:
    from moe_cl.evals.context import Context

PENALTIES = tuple(10.0 ** (e / 2) for e in range(-8, 9))  # times the mean squared norm of the centred features
METHODS = ("ridge", "logistic")


def draw(labels: Tensor, shots: int, seed: int) -> Tensor:
    """Indices of ``shots`` images of every class. Raises ConfigError if a class has fewer."""
    generator, out = torch.Generator().manual_seed(seed), []
    for c in labels.unique().tolist():
        index = (labels.cpu() == c).nonzero().flatten()
        if len(index) < shots:
            raise ConfigError(f"{shots} shots: class {c} has {len(index)} training images only")
        out.append(index[torch.randperm(len(index), generator=generator)[:shots]])
    return torch.cat(out)


def ridge(x: Tensor, y: Tensor, rows: Tensor, classes: int) -> tuple[Tensor, float]:
    """Class scores (m, K) of ``rows`` (m, D) from few images x (n, D), y (n,), and the chosen penalty."""
    x, rows = x.double(), rows.double()
    middle = x.mean(0)
    x, rows = x - middle, rows - middle
    target = torch.nn.functional.one_hot(y, classes).double()
    offset = target.mean(0)
    target = target - offset
    values, vectors = torch.linalg.eigh(x @ x.T)
    values, turned = values.clamp(min=0), vectors.T @ target
    scale = float(values.mean())
    best: tuple[float, float] = (math.inf, PENALTIES[0])
    for penalty in PENALTIES:
        kept = values / (values + penalty * scale)
        # 1/n: the mean is fitted too
        hat = (vectors**2 * kept).sum(1) + 1.0 / len(x)
        error = (target - vectors @ (kept[:, None] * turned)) / (1.0 - hat).clamp(min=1e-6)[:, None]
        best = min(best, (float(error.square().mean()), penalty))
    dual = vectors @ (turned / (values + best[1] * scale)[:, None])
    return rows @ (x.T @ dual) + offset, best[1]


def interval(values: Sequence[float]) -> tuple[float, float]:
    """Mean and half width of its 95 % interval (Student's t; nan for a single value)."""
    from scipy.stats import t

    mean = sum(values) / len(values)
    if len(values) < 2:
        return mean, math.nan
    deviation = math.sqrt(sum((v - mean) ** 2 for v in values) / (len(values) - 1))
    return mean, float(t.ppf(0.975, len(values) - 1)) * deviation / math.sqrt(len(values))


def few_shot(
    train_x: Tensor,
    train_y: Tensor,
    test_x: Tensor,
    test_y: Tensor,
    *,
    shots: Sequence[int] = (4, 10),
    seeds: int = 5,
    methods: Sequence[str] = METHODS,
    penalty: float = 1.0,
    comm: Comm | None = None,
    name: str = "accuracy",
) -> dict[str, list[float]]:
    """Test accuracies ``"4-shot/ridge": [one a seed]``; draws are dealt over ranks.

    Args:
        penalty: logistic's lambda. name: the set's metric (``metrics``); with ``per_class`` the mean over the test
            classes is given beside the accuracies, ``"4-shot/ridge/per_class"``.
    """
    from moe_cl.evals.logistic import fit

    comm = comm or LocalComm()
    classes = int(max(train_y.max(), test_y.max())) + 1
    for n in shots:  # before any rank is at work, so that none waits for one that has left
        draw(train_y, n, 0)
    if "logistic" in methods and len(train_y.unique()) < 2:
        raise ConfigError("logistic regression needs training images of two classes at least; give --methods ridge")
    jobs = [(n, m, s) for n in shots for m in methods for s in range(seeds)]
    right = torch.zeros(len(jobs), 2, dtype=torch.float64, device=train_x.device)
    mine = range(comm.rank, len(jobs), comm.world)
    for j in counted(mine, "few-shot", "draws", show=comm.rank == 0):
        n, method, seed = jobs[j]
        index = draw(train_y, n, seed).to(train_x.device)
        x, y = train_x[index], train_y[index]
        if method == "ridge":
            scores, _ = ridge(x, y, test_x, classes)
        else:
            model = fit(x.double().cpu().numpy(), y.cpu().numpy(), penalty)
            scores = torch.from_numpy(model(test_x.double().cpu().numpy())).to(test_y.device)
        answers = scores.argmax(1)
        right[j, 0] = (answers == test_y).double().mean()
        right[j, 1] = per_class(answers, test_y)
    found = comm.all_reduce(right).tolist()
    out: dict[str, list[float]] = {}
    for (n, method, _), (accuracy, by_class) in zip(jobs, found, strict=True):
        out.setdefault(f"{n}-shot/{method}", []).append(accuracy)
        if name == "per_class":
            out.setdefault(f"{n}-shot/{method}/{name}", []).append(by_class)
    return out


HELP = "few-shot transfer: n images a class, several draws, ridge and logistic regression"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of ``eval fewshot``."""
    parser.add_argument("--shots", type=whole(1), nargs="+", default=[4, 10], help="images a class (default: 4 10)")
    parser.add_argument("--seeds", type=whole(1), default=5, help="draws (default: 5)")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--lambda", dest="penalty", type=real(above=0), default=1.0, help="of the logistic regression")


def run(ctx: Context) -> dict[str, Any]:
    """Table and JSON of ``eval fewshot``."""
    from moe_cl.evals.record import record
    from moe_cl.evals.sets import metric_of

    args, name = ctx.args, metric_of(ctx.source(False))
    ctx.one_label()
    with ctx.untouched():
        train, test = ctx.features(True), ctx.features(False)
    found = few_shot(
        *train, *test, shots=args.shots, seeds=args.seeds, methods=args.methods, penalty=args.penalty, comm=ctx.comm,
        name=name,
    )  # fmt: skip
    values, rows = {}, []
    for protocol, accuracies in found.items():
        mean, half = interval(accuracies)
        values |= {protocol: mean} | ({f"{protocol}/interval": half} if len(accuracies) > 1 else {})
        shots, method, *metric = protocol.split("/")
        rows.append([f"{shots}/{method}", *(metric or ["top-1"]), mean, f"+- {half:.4f}", len(accuracies)])
    if ctx.comm.rank == 0:
        setting = ctx.setting("train", "test")
        columns = ("protocol", "metric", "mean", "95 %", "draws")
        record(ctx.out, ctx.name, ctx.step, values, setting, columns=columns, rows=rows, more={"draws": found})
    return values
