"""A CR-MoE run, batch norm and statistics over all ranks, saved at one layout: twenty more steps at any other."""

import pytest

from moe_cl.config import CheckpointConfig
from moe_cl.engine.checkpoint import Checkpointer, latest_complete
from moe_cl.engine.step import step
from tests.engine.runs import batch_of, build_run, config

pytestmark = pytest.mark.processes
SAVED, STEPS, BATCH = 2, 20, 32  # the mean over a batch of 32 keeps fp32's rounding of the logits below 1e-6


def go(comm, out, stage, ep, statistics, load, last):
    """Losses and digests of the samples from the saved step (or 0) to ``last``; saves at ``SAVED`` on the way."""
    cfg = config(out, ep=ep, stage=stage, optim="adamw", batch=BATCH, noise_std=1.0)
    cfg.engine.statistics, cfg.optim.base_lr = statistics, 1e-4
    parts = build_run(comm, cfg).parts
    keep = CheckpointConfig(keep_last=9)
    saver = Checkpointer(out, keep, comm, parts.engine, parts.student, parts.teacher, parts.method)
    first = saver.load(load)["cursor"] // BATCH if load else 0
    history = []
    for number in range(first, last):
        parts.method.progress.step = number
        agreed = step(parts, [batch_of(comm.rank, comm.world, BATCH, seed=number)], number, 0.99)
        history.append((agreed.metrics["loss"].item(), agreed.digest.tolist()))
        if number + 1 == SAVED and not load:
            saver.save(SAVED, {"cursor": SAVED * BATCH})
    saver.close()
    return history


@pytest.mark.parametrize("statistics", ["global", "group: 4"])
def test_twenty_steps_at_other_worlds(pool, tmp_path, statistics):
    """Same samples in every global batch and losses within 1e-6 relative (fp32); the same layout: every bit."""
    out = tmp_path / "run"
    straight = pool.run(2, go, str(out), 1, 2, statistics, None, SAVED + STEPS)[0][SAVED:]
    path = str(latest_complete(out))
    for world, ep, stage in ((2, 2, 1), (1, 1, 0), (2, 1, 2), (4, 4, 1)):
        for history in pool.run(world, go, str(tmp_path / f"{world}-{ep}"), stage, ep, statistics, path, SAVED + STEPS):
            if (world, ep, stage) == (2, 2, 1):
                assert history == straight
            assert [samples for _, samples in history] == [samples for _, samples in straight]
            losses, want = ([loss for loss, _ in h] for h in (history, straight))
            assert losses == pytest.approx(want, rel=1e-6), (world, ep, stage)
