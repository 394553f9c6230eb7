"""A CR-MoE run, batch norm and statistics over all ranks, saved at one layout: twenty steps at any other, and back."""

import random

import numpy as np
import pytest
import torch

from moe_cl.config import CheckpointConfig
from moe_cl.engine.checkpoint import Checkpointer, latest_complete
from moe_cl.engine.step import step
from tests.engine.runs import batch_of, build_run, config

pytestmark = pytest.mark.processes
SAVED, STEPS, BATCH = 2, 20, 32  # the mean over a batch of 32 keeps fp32's rounding of the logits below 1e-6
AGAIN, BACK = 5, 4  # where other layouts save, and the steps after it at the first one


def go(comm, out, stage, ep, statistics, load, save, last):
    """From the saved step (or 0) to ``last``, with a save at ``save``. Of each step: the loss; what is equal at any
    world (sums over ranks of the samples' digest and random keys); what is equal at the same one (every figure of the
    journal, those of the routing included, and draws of the generators that a checkpoint keeps)."""
    cfg = config(out, ep=ep, stage=stage, optim="adamw", batch=BATCH, noise_std=1.0)
    cfg.engine.statistics, cfg.optim.base_lr, cfg.model.drop_path = statistics, 1e-4, 0.1
    parts = build_run(comm, cfg).parts
    keep = CheckpointConfig(keep_last=9)
    saver = Checkpointer(out, keep, comm, parts.engine, parts.student, parts.teacher, parts.method)
    first = saver.load(load)["cursor"] // BATCH if load else 0
    history = []
    for number in range(first, last):
        parts.method.progress.step = number
        batch = batch_of(comm.rank, comm.world, BATCH, seed=number)
        agreed = step(parts, [batch], number, 0.99)
        figures = {name: value.tolist() for name, value in agreed.metrics.items()}
        samples = agreed.digest.tolist(), comm.all_reduce(batch.keys.sum()).item()
        draws = torch.rand(2).tolist(), np.random.rand(2).tolist(), random.gauss(0, 1)
        history.append((figures["loss"], samples, (figures, draws)))
        if number + 1 == save:
            saver.save(save, {"cursor": save * BATCH})
    saver.close()
    return history


def same_run(history, straight, layout):
    """Same samples and keys in every global batch, losses within 1e-6 relative (fp32)."""
    losses, samples, _ = zip(*history, strict=True)
    want, want_samples, _ = zip(*straight, strict=True)
    assert samples == want_samples, layout
    assert losses == pytest.approx(want, rel=1e-6), layout


@pytest.mark.parametrize("statistics", ["global", "group: 4"])
def test_twenty_steps_at_other_worlds(pool, tmp_path, statistics):
    """And from what those worlds save back to the first one. The same layout: every bit, on each rank."""
    first, others = (2, 2, 1), ((1, 1, 0), (2, 1, 2), (4, 4, 1))

    def run(layout, name, load, save, last):
        (world, ep, stage), out = layout, tmp_path / name
        histories = pool.run(world, go, str(out), stage, ep, statistics, load and str(load), save, last)
        return histories, latest_complete(out)

    whole, path = run(first, "straight", None, SAVED, SAVED + STEPS)
    figures, _ = whole[0][0][2]
    assert {"moe/L0/load", "moe/L0/importance", "grad_norm"} <= set(figures)
    straight = whole[0][SAVED:]

    assert run(first, "same", path, None, SAVED + STEPS)[0] == [history[SAVED:] for history in whole]
    for layout in others:
        histories, saved = run(layout, f"other-{layout}", path, AGAIN, SAVED + STEPS)
        for history in histories:
            same_run(history, straight, layout)
        if layout[0] != first[0]:
            for history in run(first, f"back-{layout}", saved, None, AGAIN + BACK)[0]:
                same_run(history, whole[0][AGAIN : AGAIN + BACK], f"back from {layout}")
