"""The loop. It knows no method, model or data set by name: these come from the config through the contracts."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from moe_cl import config, spans
from moe_cl.allocator import keep_freed_memory
from moe_cl.comm import Comm
from moe_cl.config import ConfigError, RunConfig
from moe_cl.data.ahead import Ahead
from moe_cl.data.faults import DataStop
from moe_cl.data.loader import Loader
from moe_cl.data.order import digest_hex
from moe_cl.engine import checks, large_batch, ranks, schedules, setup, step
from moe_cl.engine.checkpoint import Checkpointer
from moe_cl.engine.flops import count as count_flops
from moe_cl.engine.guard import Guard
from moe_cl.engine.notes import notes
from moe_cl.engine.optim import set_hyper
from moe_cl.engine.preemption import written
from moe_cl.evals.online import knn_steps, online_knn
from moe_cl.evals.record import write_json
from moe_cl.spans import span
from moe_cl.tracking import environment, redact
from moe_cl.tracking.progress import count
from moe_cl.tracking.run import Tracking
from moe_cl.views.device import to_device
from moe_cl.views.spec import Batch, build_spec

EVENTS_EVERY = 50  # steps between looks at the other ranks' events: bad samples, retries


def pretrain(cfg: RunConfig, me: ranks.Ranks) -> int:
    """Run ``cfg`` on this rank to its end; returns the process's exit code."""
    batch = checks.check(cfg, me.world)
    spec, out = build_spec(cfg.views), Path(cfg.out)
    begun = checks.begun(cfg)  # on every rank before rank 0 writes there
    with contextlib.ExitStack() as stack:
        guard = stack.enter_context(Guard(out, me.rank, me.world))
        # The loader first: what is wrong with the data is said before any rank meets another.
        sizes = {"global_batch": batch.global_batch, "micro_batch": batch.micro_batch}
        loader = Loader(cfg.data, spec, seed=cfg.seed, **sizes, rank=me.rank, world=me.world, pin=ranks.pins(me))
        stack.callback(loader.close)
        per_epoch = loader.steps_per_epoch
        total = schedules.total_steps(cfg.schedule, per_epoch)
        comm = ranks.init(me, cfg.engine.collective_timeout)
        torch.set_num_threads(cfg.engine.threads or ranks.threads(comm))
        built = setup.build(cfg, comm)
        if built.device.type == "cpu":
            keep_freed_memory()
        parts, method = built.parts, built.parts.method
        tree = redact.value("config", config.to_tree(cfg))  # what is kept of it: no password, no signed URL
        checkpoints = stack.enter_context(
            Checkpointer(
                out, cfg.checkpoint, comm, parts.engine, parts.student, parts.teacher, method, config=tree,
                patience=cfg.engine.collective_timeout,
            )
        )  # fmt: skip
        guard.watch(comm, parts.engine, parts.student, cfg.engine.collective_timeout)
        state = checkpoints.load() if cfg.resume else None
        if state is not None and state["step"] >= total:  # verified: a damaged last one was passed over
            if me.rank == 0:
                print(f"{out}: all {total} steps are done already; nothing to resume{checks.without_effect(cfg)}")
            return 0
        continues = begun or state is not None  # not a run that begins at another's step: its journal is its own
        state = state or begin_from(cfg, checkpoints, me.rank)
        if state["step"]:
            loader.load_state_dict(state["loader"])
        track = stack.enter_context(tracking(cfg, tree, batch, built, loader, me, state, total, continues))
        method.progress.steps_per_epoch, method.progress.epochs = per_epoch, cfg.schedule.epochs
        save_every = cfg.checkpoint.every_steps or max(1, round(cfg.checkpoint.every_epochs * per_epoch))
        driver = large_batch.step if cfg.batch.exact_large_batch else step.step
        knn_every = knn_steps(cfg, per_epoch)

        ahead = Ahead(loader)
        parts.stop = lambda: guard.requested() or ahead.failed is not None
        code = 0
        if lost := data_lost(ahead, comm, track, state["step"]):  # before the first step: nothing to save
            return lost

        for number in range(state["step"], total):
            begin = time.monotonic()
            lr = schedules.learning_rate(number, per_epoch, built.peak_lr, cfg.schedule)
            decay = schedules.weight_decay(number, per_epoch, cfg.optim, cfg.schedule.epochs)
            momentum = schedules.teacher_momentum(number, per_epoch, cfg.teacher, cfg.schedule.epochs)
            set_hyper(parts.engine.optimizer, lr, decay)
            method.progress.step = number
            with profiling(cfg, number, me.rank), span("step"):
                with span("data"):
                    data = ahead.take(last=number + 1 == total)
                    micro_batches = [to_device(b, built.device, spec, cfg.seed, data.epoch) for b in data.batches]
                guard.at(number, micro_batches)
                agreed = driver(parts, micro_batches, number, momentum)
            loader.used()
            done, seconds = number + 1, time.monotonic() - begin
            values = agreed.metrics | {"lr": lr, "weight_decay": decay, "teacher_momentum": momentum}
            values |= {"images_per_second": batch.global_batch / seconds, "data_wait": data.seconds / seconds}
            more = {"sample_ids": sample_ids(micro_batches, comm)} if cfg.data.log_sample_ids else {}
            track.step(done, values, digest_hex(agreed.digest), **more)
            metrics = {}  # of this very step: checkpoint.keep_best compares checkpoints by them
            if knn_every and (done % knn_every == 0 or done == total):
                metrics = evaluate(cfg, built, track, done)
            saving = done % save_every == 0 or done == total or agreed.stop
            saving = saving or bool(metrics and cfg.checkpoint.keep_best)
            if saving:
                place = {"step": done, "loader": loader.state_dict(), "mlflow_run": track.run_id, "metrics": metrics}
                place["steps_per_epoch"] = per_epoch
                track.journal.sync()  # no checkpoint is newer than the journal, whatever happens to the machine
                checkpoints.save(done, place)
            if saving or done % EVENTS_EVERY == 0:
                for event in sum(comm.gather_objects(loader.drain_events()), checkpoints.drain_events()):
                    track.event(**{"step": done, **event})
            if agreed.stop and done < total:
                checkpoints.wait()
                if lost := data_lost(ahead, comm, track, done):
                    return lost
                code = guard.stopped(done, checkpoints.last, began=state["step"])
                track.killed()
                break
        else:
            checkpoints.wait()
            if unsaved := guard.unsaved(total, checkpoints.last):
                track.failed(unsaved, total)
                code = 1
        for event in checkpoints.drain_events():
            track.event(**event)
    return code


def evaluate(cfg: RunConfig, built: setup.Built, track: Tracking, done: int) -> dict[str, float]:
    """The online kNN's figures by name; none, and an event, if its data cannot be read: that does not end a run."""
    try:
        found = online_knn(cfg, built.evaluated, built.parts.comm, built.device, built.dtype)
    except (DataStop, ConfigError) as error:  # every rank has the same one
        track.evaluation_failed("knn", done, str(error))
        return {}
    track.evaluation("knn", done, found)
    return {f"knn/{name}": float(value) for name, value in found.items()}


def data_lost(ahead: Ahead, comm: Comm, track: Tracking, done: int) -> int:
    """Exit code 1 on every rank, and the reason once, if some rank's data failed; else 0."""
    reasons = [str(reason) for reason in comm.gather_objects(ahead.failed and str(ahead.failed)) if reason]
    if not reasons:
        return 0
    track.failed(f"{reasons[0]} (stopped after step {done}; mend the data and start again with --resume)", done)
    return 1


def sample_ids(batches: list[Batch], comm: Comm) -> list[int]:
    """The ids of the global batch, rank after rank."""
    return sum(comm.gather_objects(torch.cat([batch.sample_ids for batch in batches]).tolist()), [])


def begin_from(cfg: RunConfig, checkpoints: Checkpointer, rank: int) -> dict[str, Any]:
    """Where a run that resumes nothing begins: step 0, or the step of the checkpoint ``model.init_from``."""
    if not cfg.model.init_from:
        return {"step": 0}
    report = checkpoints.init_from(cfg.model.init_from)
    if rank == 0:
        with written(Path(cfg.out)):
            path = report.write(Path(cfg.out), cfg.model.init_from)
        print(f"init_from {cfg.model.init_from}: {report}; every key: {path}")
    return {"step": 0, **(report.extra or {}), "mlflow_run": None}


@contextlib.contextmanager
def profiling(cfg: RunConfig, number: int, rank: int) -> Iterator[None]:
    """Named spans of the steps ``engine.profile: [from, to]`` as a Chrome trace in the out dir, one file a rank."""
    first, last = cfg.engine.profile or (-1, -1)
    if number == first:
        spans.start(Path(cfg.out) / f"trace-{rank:05d}.json", rank)
    yield
    if number == last:
        try:
            spans.stop()
        except OSError as error:
            print(f"warning: no trace of the steps ({error.strerror}); the run goes on", file=sys.stderr, flush=True)


def tracking(
    cfg: RunConfig, tree: dict[str, Any], batch: checks.BatchIdentity, built: setup.Built, loader: Loader,
    me: ranks.Ranks, state: dict[str, Any], total: int, continues: bool,
) -> Tracking:  # fmt: skip
    """Journal, console and MLflow of this run, opened with what matters about it."""
    out, comm, student = Path(cfg.out), built.parts.comm, built.parts.student
    if me.rank == 0:
        with written(out):
            config.save(tree, out / "config.yaml")
            write_json(out / "ds_config.json", checks.ds_config(cfg, comm.world, built.device.type == "cpu"))
        print("== resolved config ==", (out / "config.yaml").read_text(), sep="\n", flush=True)
    everything, active = parameter_counts(student, cfg, comm)
    show = {
        "method": f"{cfg.method} ({cfg.recipe})",
        "model": f"{cfg.model.backbone}, {count(everything)} parameters, {count(active)} active a token",
        "batch": str(batch),
        "learning rate": f"{built.peak_lr:.3g} at its peak ({cfg.optim.name}, {cfg.optim.lr_scaling} scaling)",
        "data": f"{cfg.data.train}: {len(loader.dataset):,} samples, {loader.steps_per_epoch} steps an epoch",
        "length": f"{cfg.schedule.epochs:g} epochs, {total} steps" + (f", from {state['step']}" * bool(state["step"])),
        "ranks": f"{comm.world}, experts over {cfg.moe.ep_size}, {cfg.engine.ds_config}",
        "precision": f"{built.precision} on {built.device.type}, {torch.get_num_threads()} threads a rank",
        "init": f"experts and gates {cfg.moe.init}" if checks.has_moe(cfg) else "dense",
    }
    data = {"name": Path(cfg.data.train).name, "digest": loader.state_dict()["data"][:36], "source": cfg.data.train}
    data["profile"] = {"samples": len(loader.dataset), "shards": len(loader.dataset.shards)}
    for number, note in enumerate(notes(cfg, batch, built.parts.method, student, len(loader.dataset)), 1):
        show["note" if number == 1 else f"note {number}"] = note
    resumed = f"step {state['step']}" if state["step"] or continues else None
    tags = environment.tags(cfg.method, cfg.model.backbone, comm.world, cfg.moe.ep_size, resumed)
    flops = None
    if me.rank == 0:
        flops = count_flops(cfg, comm.world)
        tags["active_gflops_per_image"] = f"{flops.image / 1e9:.6g}"
        show["arithmetic"] = str(flops)
    with written(out):
        return Tracking(
            out, cfg.track, tree, rank=me.rank, node=me.local_rank == 0, resume_step=state["step"],
            total=total, tags=tags, datasets=[data], show=show, run_id=state.get("mlflow_run"), flops=flops,
            continues=continues,
        )  # fmt: skip


def parameter_counts(student: torch.nn.Module, cfg: RunConfig, comm: Comm) -> tuple[int, int]:
    """Parameters of the whole backbone, and those that one token uses (top_k of the experts)."""
    dense = experts = 0
    for name, p in student.backbone.named_parameters():
        if ".experts." in name:
            experts += p.numel() * cfg.moe.ep_size
        else:
            dense += getattr(p, "ds_numel", p.numel())  # ZeRO 3 leaves an empty tensor here
    return dense + experts, dense + experts * cfg.moe.top_k // max(1, cfg.moe.experts)
