"""The loop. It knows no method, model or data set by name: these come from the config through the contracts."""

from __future__ import annotations

import contextlib
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from moe_cl import config
from moe_cl.config import RunConfig
from moe_cl.data.loader import Loader
from moe_cl.data.order import digest_hex
from moe_cl.engine import checks, ranks, schedules, setup
from moe_cl.engine.checkpoint import Checkpointer
from moe_cl.engine.optim import set_hyper
from moe_cl.engine.step import step as plain_step
from moe_cl.evals.online import online_knn
from moe_cl.tracking.run import Tracking
from moe_cl.views.spec import build_spec


@dataclass
class Clock:
    """Where the time of the last steps went."""

    started: float = field(default_factory=time.monotonic)
    images: int = 0
    waited: float = 0.0

    def read(self) -> dict[str, float]:
        """images/s and data_wait % since the last reading."""
        seconds = max(time.monotonic() - self.started, 1e-9)
        out = {"images_per_second": self.images / seconds, "data_wait": 100 * self.waited / seconds}
        self.started, self.images, self.waited = time.monotonic(), 0, 0.0
        return out


def pretrain(cfg: RunConfig, me: ranks.Ranks) -> int:
    """Run ``cfg`` on this rank to its end; returns the process's exit code."""
    batch = checks.check(cfg, me.world)
    torch.set_num_threads(cfg.engine.threads or max(1, (torch.get_num_threads() // me.local_world)))
    out = Path(cfg.out)
    spec = build_spec(cfg.views)
    with contextlib.ExitStack() as stack:
        loader = stack.enter_context(
            contextlib.closing(
                Loader(
                    cfg.data,
                    spec,
                    seed=cfg.seed,
                    global_batch=batch.global_batch,
                    micro_batch=batch.micro_batch,
                    rank=me.rank,
                    world=me.world,
                )  # fmt: skip
            )
        )
        comm = ranks.init(me, cfg.engine.collective_timeout)
        built = setup.build(cfg, comm)
        parts, method = built.parts, built.parts.method
        checkpointer = stack.enter_context(
            contextlib.closing(
                Checkpointer(out, cfg.checkpoint, comm, parts.engine, parts.student, parts.teacher, method)
            )
        )
        state = (checkpointer.load() if cfg.resume else None) or {"step": 0}
        if "loader" in state:
            loader.load_state_dict(state["loader"])
        per_epoch = loader.steps_per_epoch
        total = cfg.schedule.max_steps or round(cfg.schedule.epochs * per_epoch)
        track = stack.enter_context(Tracking(cfg, batch, built, comm, resume_step=state["step"], total=total))
        method.progress.steps_per_epoch, method.progress.epochs = per_epoch, cfg.schedule.epochs
        save_every = cfg.checkpoint.every_steps or max(1, round(cfg.checkpoint.every_epochs * per_epoch))
        knn_every = round(cfg.eval.knn_every * per_epoch)
        clock, batches = Clock(), iter(())

        for number in range(state["step"], total):
            if (micro := next(batches, None)) is None:
                batches = iter(loader)  # the next epoch
                micro = next(batches)
            clock.waited += loader.wait_seconds
            lr = schedules.learning_rate(number, per_epoch, built.peak_lr, cfg.schedule)
            decay = schedules.weight_decay(number, per_epoch, cfg.optim, cfg.schedule.epochs)
            momentum = schedules.teacher_momentum(number, per_epoch, cfg.teacher, cfg.schedule.epochs)
            set_hyper(parts.engine.optimizer, lr, decay)
            method.progress.step = number
            agreed = plain_step(parts, micro, number, momentum)
            loader.used()
            clock.images += batch.global_batch
            done = number + 1
            values: dict[str, Any] = {**agreed.metrics, "lr": lr, "teacher_momentum": momentum, **clock.read()}
            track.step(done, values, samples=digest_hex(agreed.digest), faults=loader.drain_events())
            if knn_every and (done % knn_every == 0 or done == total):
                track.evaluation("knn", done, online_knn(cfg, built, comm))
            if done % save_every == 0 or done == total:
                checkpointer.save(done, {"step": done, "loader": loader.state_dict(), "config": config.to_tree(cfg)})
        checkpointer.wait()
        track.finished(total)
    return 0
