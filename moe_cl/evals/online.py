"""kNN of the running encoder, between two steps, all ranks together."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from moe_cl.comm import Comm
from moe_cl.config import ConfigError, RunConfig
from moe_cl.data.loader import LabelledLoader
from moe_cl.evals.classes import places
from moe_cl.evals.features import encoder, extract, frozen, opened
from moe_cl.evals.knn import knn
from moe_cl.models.norm import batch_norms

BATCH = 256
FIGURES = ("top1", "top5")


def check_best(cfg: RunConfig) -> None:
    """``checkpoint.keep_best`` is a figure that this run measures. Raises ConfigError."""
    best = cfg.checkpoint.keep_best
    if best is None:
        return
    known = [f"knn/{name}" for name in FIGURES]
    if best.removeprefix("-") not in known:
        raise ConfigError(
            f"checkpoint.keep_best={best} is no figure of a run: take {' or '.join(known)}, - for the lowest"
        )
    if not cfg.eval.knn_every:
        raise ConfigError(f"checkpoint.keep_best={best} is never measured: set eval.knn_every, or leave it out")


def knn_steps(cfg: RunConfig, per_epoch: int) -> int:
    """Steps from one measurement to the next; 0 without ``eval.knn_every``, and never so with it, however small."""
    return max(1, round(cfg.eval.knn_every * per_epoch)) if cfg.eval.knn_every else 0


def sets(cfg: RunConfig, rank: int = 0, world: int = 1) -> tuple[LabelledLoader, LabelledLoader]:
    """Bank and test set of the config, this rank's part of each. Raises ConfigError if one is missing."""
    size = cfg.eval.size or cfg.views.size
    bank, test = (
        LabelledLoader(pattern, size, cfg.views.normalize, BATCH, rank, world, data=cfg.data)
        for pattern in (cfg.eval.bank, cfg.eval.test)
    )
    return bank, test


@torch.no_grad()
def share_running(module: nn.Module, comm: Comm) -> None:
    """Give every rank rank 0's running statistics of batch norm. Those of a rank's own batches (MoCo v1, v2, JCL)
    differ between ranks; a checkpoint holds rank 0's, and no training step reads them."""
    if comm.world > 1:
        for norm in batch_norms(module):
            for value in (norm.running_mean, norm.running_var):
                comm.broadcast(value)


def features(
    encode: Callable[[Tensor], Tensor], cfg: RunConfig, comm: Comm
) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """(features, labels) of bank and test set. Raises DataStop or ConfigError, on all ranks, if one cannot read."""
    bank, test = opened(lambda: sets(cfg, comm.rank, comm.world), comm)
    to = places(bank.class_names, test.class_names)
    found, (x, y) = extract(encode, bank, comm), extract(encode, test, comm)
    return found, (x, y if to is None else torch.tensor(to, device=y.device)[y])


def online_knn(
    cfg: RunConfig, module: nn.Module, comm: Comm, device: torch.device, dtype: torch.dtype | None
) -> dict[str, float]:
    """kNN top-1 and top-5 of ``module.backbone`` with the config's bank, test set, k and temperature.

    Raises DataStop or ConfigError, on every rank, if the sets cannot be read on one.
    """
    share_running(module, comm)
    with frozen(module):
        encode = encoder(module.backbone, device, dtype=dtype)
        (bank, bank_labels), (test, test_labels) = features(encode, cfg, comm)
    classes = int(max(bank_labels.max(), test_labels.max())) + 1
    return knn(bank, bank_labels, test, test_labels, classes, cfg.eval.k, cfg.eval.temperature, comm=comm)
