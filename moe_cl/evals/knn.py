"""Weighted nearest-neighbour classification (Wu et al. 2018; EsViT and DINO: esvit.md section 3).

Legend: n test rows, N bank rows, k neighbours, K classes.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from moe_cl.arguments import real, whole
from moe_cl.comm import Comm, LocalComm
from moe_cl.config import ConfigError

if TYPE_CHECKING:
    from moe_cl.evals.context import Context


def neighbours(bank: Tensor, rows: Tensor, k: int, block: int = 65536) -> tuple[Tensor, Tensor]:
    """The k largest dot products of each row with the bank: values and bank indices (n, k), best first.

    The bank is read in blocks, so at most n x ``block`` similarities exist at once.
    """
    best, where = rows.new_full((len(rows), 0), 0.0), torch.zeros(len(rows), 0, dtype=torch.long, device=rows.device)
    for start in range(0, len(bank), block):
        similarity = rows @ bank[start : start + block].T
        value, index = similarity.topk(min(k, similarity.shape[1]), 1)
        best, where = torch.cat([best, value], 1), torch.cat([where, index + start], 1)
        best, kept = best.topk(min(k, best.shape[1]), 1)
        where = where.gather(1, kept)
    return best, where


def vote(similarity_nk: Tensor, labels_nk: Tensor, classes: int, temperature: float) -> Tensor:
    """Class scores (n, K): sum over neighbours of exp(similarity / T) at their class."""
    scores = similarity_nk.new_zeros(len(similarity_nk), classes)
    return scores.scatter_add_(1, labels_nk, (similarity_nk / temperature).exp())


def hits(scores: Tensor, labels: Tensor, top: int) -> Tensor:
    """(n,) bool: the label is among the ``top`` best scores (all classes if there are fewer).

    Equal scores, such as those of classes without a vote, count in class order, as published.
    """
    best = scores.sort(dim=1, descending=True, stable=True).indices[:, :top]
    return (best == labels[:, None]).any(1)


@torch.no_grad()
def knn(
    bank: Tensor,
    bank_labels: Tensor,
    test: Tensor,
    test_labels: Tensor,
    classes: int,
    k: int | Sequence[int] = 20,
    temperature: float = 0.07,
    chunk: int = 1024,
    comm: Comm | None = None,
    name: str = "accuracy",
) -> dict[str, float]:
    """Accuracy of kNN by cosine similarity.

    Args:
        bank, test: features (N, D), (n, D), normalised here. bank_labels, test_labels: (N,), (n,) in [0, classes).
        k: one number, or several at the cost of the largest. temperature: of the votes.
        chunk: test rows at a time. comm: ranks that share the test rows (each holds both sets whole).
        name: the set's metric (``metrics``); ``per_class`` is given beside the others.

    Returns:
        ``top1`` and ``top5`` in [0, 1]; with several k ``k20/top1`` and so on. For a set measured per class also
        ``per_class``: the mean over the test set's classes of each one's top-1.
    """
    comm = comm or LocalComm()
    several = [k] if isinstance(k, int) else sorted(k)
    if not len(bank) or not len(test):
        raise ConfigError("kNN needs a bank and a test set with at least one image each")
    bank = F.normalize(bank.float() if bank.dtype != torch.float64 else bank, dim=1)
    bank_labels, labels = bank_labels.to(bank.device), test_labels.to(bank.device)
    # Right answers by k, by top 1 and 5, by class: sums over ranks give every metric, whoever had which rows.
    counts = torch.zeros(len(several), 2, classes, dtype=torch.float64, device=bank.device)
    for start in range(comm.rank * chunk, len(test), comm.world * chunk):
        rows = F.normalize(test[start : start + chunk].to(bank.device, bank.dtype), dim=1)
        similarity, index = neighbours(bank, rows, several[-1])
        near, truth = bank_labels[index], labels[start : start + chunk]
        for i, count in enumerate(several):
            scores = vote(similarity[:, :count], near[:, :count], classes, temperature)
            for j, top in enumerate((1, 5)):
                counts[i, j] += truth[hits(scores, truth, top)].bincount(minlength=classes)
    right = comm.all_reduce(counts)
    share = dict(zip(("top1", "top5"), (right.sum(2) / len(test)).unbind(1), strict=True))
    if name == "per_class":
        of_class = labels.bincount(minlength=classes)
        share[name] = (right[:, 0] / of_class)[:, of_class > 0].mean(1)
    if isinstance(k, int):
        return {figure: float(values[0]) for figure, values in share.items()}
    return {f"k{c}/{figure}": float(values[i]) for i, c in enumerate(several) for figure, values in share.items()}


HELP = "weighted kNN on frozen features"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of ``eval knn``."""
    parser.add_argument("--k", type=whole(1), nargs="+", help="neighbours, several at once (default: 10 20 100 200)")
    parser.add_argument("--temperature", type=real(above=0), help="of the votes (default: the run's eval.temperature)")


def say_all_vote(k: int, images: int, comm: Comm) -> None:
    """A line, once, if a bank of so many ``images`` has no ``k`` neighbours."""
    if k > images and comm.rank == 0:
        print(f"k {k} is more than the {images} images of the bank: there all of them vote")


def run(ctx: Context) -> dict[str, float]:
    """Table and JSON of ``eval knn``."""
    from moe_cl.evals.context import class_count
    from moe_cl.evals.record import record
    from moe_cl.evals.sets import metric_of

    ctx.one_label()
    ks = ctx.args.k or [10, 20, 100, 200]
    temperature = ctx.args.temperature or ctx.cfg.eval.temperature
    with ctx.untouched():
        bank, test = ctx.features(True), ctx.features(False)
    classes, name = class_count(bank[1], test[1]), metric_of(ctx.source(False))
    say_all_vote(max(ks), len(bank[1]), ctx.comm)
    values = knn(*bank, *test, classes, ks, temperature, comm=ctx.comm, name=name)
    if ctx.comm.rank == 0:
        shown = {"top1": "top-1", "top5": "top-5"} | ({name: name} if name == "per_class" else {})
        rows = [[k, *(values[f"k{k}/{figure}"] for figure in shown)] for k in sorted(ks)]
        setting = ctx.setting("train", "test", k=ks, temperature=temperature, bank=len(bank[1]))
        record(ctx.out, ctx.name, ctx.step, values, setting, columns=("k", *shown.values()), rows=rows)
    return values
