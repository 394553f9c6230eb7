"""Saving and loading a run: ``Checkpointer``.

A save copies this rank's pieces to host memory and returns; a thread writes them. Ranks meet in the file system alone
(a collective in a background thread could overtake one of the step's): each leaves a ``rank-N.json`` in the staging
directory when its files are on the disk, and rank 0's thread, when all are there, merges them into the manifest,
renames the directory and moves the pointer. A rank that cannot write says so in its file, or, without room for that, by
an empty ``rank-N.failed``; rank 0 then drops the checkpoint, and nobody else ever removes the directory.
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import shutil
import sys
import threading
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import nn

from moe_cl.comm import Comm
from moe_cl.config import CheckpointConfig, ConfigError
from moe_cl.engine.checkpoint import restore, snapshot, start, store
from moe_cl.engine.checkpoint.format import (
    MANIFEST,
    Damaged,
    FileEntry,
    Manifest,
    Reader,
    TensorEntry,
    write_bytes,
    write_shard,
)
from moe_cl.engine.flat import FlatView


class Checkpointer:
    """Writes and reads the checkpoints of one run directory, on every rank.

    Args:
        out: the run directory, seen by all hosts.
        cfg: retention and whether to write in the background.
        comm: all ranks.
        engine: DeepSpeed's engine (``optimizer`` is all that is needed of it).
        student: the trained encoder, whose parameter names are the checkpoint's.
        teacher: the teacher (object with ``module``), a module, or None.
        method: its buffers are saved; None without.
        config: the recipe as a plain tree, written beside the tensors.
        patience: seconds that rank 0 waits for the other ranks' files.

    Attributes:
        last: the newest checkpoint known to be good: verified by ``load``, or (rank 0) committed since; None without.
            A directory that is there may be a damaged one of an earlier start.
    """

    def __init__(
        self,
        out: str | Path,
        cfg: CheckpointConfig,
        comm: Comm,
        engine: Any,
        student: nn.Module,
        teacher: Any = None,
        method: nn.Module | None = None,
        config: dict[str, Any] | None = None,
        patience: float = 600.0,
    ):
        self.out, self.cfg, self.comm, self.engine = Path(out), cfg, comm, engine
        self.teacher: nn.Module | None = getattr(teacher, "module", teacher)
        self.method, self.config, self.patience = method, config, patience
        self.view = FlatView(student, engine.optimizer, comm)
        self._hosts, self._thread, self._events = snapshot.HostCopies(), None, []
        self._token = comm.gather_objects(secrets.token_hex(4))[0]
        self.stall_seconds, self._abandoned = 0.0, threading.Event()
        self.last: Path | None = None
        if comm.rank == 0:
            store.remove_leftovers(self.out)

    # -- saving --------------------------------------------------------------------------------------------------
    def save(self, step: int, extra: dict[str, Any], wait: bool = False) -> None:
        """Checkpoint of ``step`` optimizer steps; ``extra`` is JSON (cursor, schedules, ``metrics`` for keep_best).

        Returns once this rank's state is copied (``asynchronous``), else or with ``wait`` once it is on the disk.
        A failure to write never raises: it is an event (``drain_events``) and a line, and the run goes on.
        """
        begin = time.monotonic()
        self.wait()
        parts = snapshot.pieces(self.view, self.teacher, self.method)
        hosts = self._hosts.take(parts)
        job = _Job(
            stage=store.staging(self.out, self._token, step),
            step=step,
            parts=parts,
            hosts=hosts,
            rng=snapshot.rng_state(),
            steps=snapshot.optimizer_steps(self.view),
            texts=self._texts(step, extra) if self.comm.rank == 0 else {},
            metrics={k: float(v) for k, v in extra.get("metrics", {}).items()},
        )
        if self.comm.rank == 0:  # a late rank may have gone on with an earlier save that was dropped
            with contextlib.suppress(OSError):  # the save says what is wrong
                store.remove_leftovers(self.out, but=job.stage)
        self._thread = threading.Thread(target=self._write, args=(job,), name=f"checkpoint-{step}")
        self._thread.start()
        if wait or not self.cfg.asynchronous:
            self.wait()
        self.stall_seconds = time.monotonic() - begin

    def wait(self) -> None:
        """Return when this rank's last save is done (rank 0: committed or given up)."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None

    def close(self) -> None:
        """Finish what is being written."""
        self.wait()

    def __enter__(self) -> Checkpointer:
        return self

    def __exit__(self, kind: type[BaseException] | None, *rest: object) -> None:
        """As ``close``; when the run fails, other ranks' files are not waited for (they may never come)."""
        if kind is not None:
            self._abandoned.set()
        self.wait()

    def drain_events(self) -> list[dict[str, Any]]:
        """What happened since the last call, for the journal: name, step, seconds, bytes, reason."""
        events, self._events = self._events, []
        return events

    def _texts(self, step: int, extra: dict[str, Any]) -> dict[str, str]:
        state = {"step": step, "extra": extra, "engine": snapshot.engine_state(self.engine)}
        state["fresh"] = sorted(self.view.trained("fresh"))  # their groups must be the same when the run goes on
        texts = {"extra.json": json.dumps(state, indent=1)}
        if self.config is not None:
            texts["config.yaml"] = yaml.safe_dump(self.config, sort_keys=False)
        return texts

    def _write(self, job: _Job) -> None:
        begin, rank = time.monotonic(), self.comm.rank
        reason = None
        try:
            job.stage.mkdir(parents=True, exist_ok=True)
            report = job.write(rank)
        except OSError as error:
            reason = f"{error.strerror or error}"
            report = {"error": f"rank {rank}: {reason}"}
            for path in job.stage.glob(f"*-{rank:05d}.safetensors"):
                path.unlink(missing_ok=True)  # room for the word that it failed
        try:
            _leave(job.stage, rank, report)
            if rank == 0:
                size = self._commit(job)
                seconds = time.monotonic() - begin
                event = {"name": "checkpoint", "step": job.step, "seconds": round(seconds, 3), "bytes": size}
                self._events.append(event)
        except (OSError, _Failed) as error:
            reason = reason or str(getattr(error, "strerror", None) or error)
            if rank == 0:
                shutil.rmtree(job.stage, ignore_errors=True)
        if reason is not None:
            self._events.append({"name": "checkpoint_failed", "step": job.step, "reason": reason})
            if rank == 0:
                last = self.last or store.latest_complete(self.out)
                print(
                    f"warning: no checkpoint at step {job.step} ({reason}); the run goes on, the last good one is "
                    f"{last.name if last else 'none'} in {store.root(self.out)}",
                    file=sys.stderr,
                    flush=True,
                )

    def _commit(self, job: _Job) -> int:
        reports = _collect(job.stage, self.comm.world, self.patience, self._abandoned)
        manifest = Manifest(job.step, self.comm.world, metrics=job.metrics, created=time.time())
        manifest.layout = {"zero": self.view.zero, "ranks": self.comm.world}
        steps: dict[str, float | None] = {}
        for report in reports:
            manifest.files.update({name: FileEntry(**entry) for name, entry in report["files"].items()})
            steps.update({name: count for name, count in report["steps"].items() if steps.get(name) is None})
            for name, shape, dtype, piece in report["pieces"]:
                manifest.tensors.setdefault(name, TensorEntry(shape, dtype)).pieces.append(piece)
        for name, text in {**job.texts, "optimizer.json": json.dumps(steps, indent=1, sort_keys=True)}.items():
            manifest.files[name] = write_bytes(job.stage / name, [text.encode()])
        for path in job.stage.glob("rank-*.json"):
            path.unlink()
        write_bytes(job.stage / MANIFEST, [manifest.dump().encode()])
        self.last = store.commit(job.stage, job.step)
        store.retain(self.out, self.cfg, self.last)
        return sum(entry.bytes for entry in manifest.files.values())

    # -- loading -------------------------------------------------------------------------------------------------
    def load(self, path: str | Path | None = None) -> dict[str, Any] | None:
        """Put the newest complete checkpoint (or ``path``) into the run; returns its ``extra``, None without one.

        A damaged one is passed over for the one before it, with a line, and set aside (``store.set_aside``). Raises
        ConfigError if ``path`` is damaged, if all are, or if the checkpoint is of another model.
        """
        candidates = [Path(path)] if path is not None else store.complete(self.out)
        candidates = [Path(p) for p in self.comm.gather_objects([str(c) for c in candidates])[0]]
        reasons: dict[Path, str] = {}
        for candidate in candidates:
            try:
                reader = restore.open_verified(candidate, self.comm)
                extra = restore.agreed(lambda reader=reader: self._restore(reader), self.comm)
            except Damaged as error:
                reasons[candidate] = str(error)
                continue
            if self.comm.rank == 0:
                self._set_aside(reasons, candidate)
            self.last = candidate
            return extra
        if reasons:
            first = next(iter(reasons.values()))
            raise ConfigError(f"no checkpoint can be read: {first}; start in another out dir or repair the file")
        return None

    def _set_aside(self, reasons: dict[Path, str], good: Path) -> None:
        for path, reason in reasons.items():
            kept = path
            try:
                kept = store.set_aside(path, good)
            except OSError as error:  # it only was in the way: the next start finds it again
                print(f"warning: {store.root(self.out)}: {error.strerror}", file=sys.stderr, flush=True)
            print(
                f"warning: checkpoint {reason}; trying the one before it (the damaged one stays as {kept.name})",
                file=sys.stderr,
                flush=True,
            )

    def init_from(self, path: str | Path) -> start.Report:
        """Start from another run's checkpoint or a file of weights (``moe_cl.engine.checkpoint.start``)."""
        return start.init_from(path, self.view, self.teacher, self.method)

    def _restore(self, reader: Reader) -> dict[str, Any]:
        restore.load_student(reader, self.view)
        restore.load_optimizer(reader, self.view)
        if self.teacher is not None:
            restore.load_teacher(reader, self.teacher, self.view)
        if self.method is not None:
            restore.load_method(reader, self.method)
        prefix = f"{self.comm.rank:05d}/"
        state = {n.removeprefix(prefix): reader.tensor(f"rng/{n}") for n in reader.names("rng") if n.startswith(prefix)}
        if state:  # a rank the checkpoint did not have keeps its own start
            try:
                snapshot.set_rng_state(state)
            except (KeyError, TypeError, ValueError, RuntimeError, OverflowError) as error:
                raise Damaged(f"{reader.path.name}: generators of rank {self.comm.rank}: {error}") from None
        tree = reader.state()
        restore.load_engine(self.engine, tree["engine"])
        return tree["extra"]


class _Failed(Exception):
    """Some rank could not write its part."""


class _Job:
    """One rank's part of one save, complete in host memory."""

    def __init__(self, **fields: Any):
        self.__dict__.update(fields)

    def write(self, rank: int) -> dict[str, Any]:
        """Write the shards; returns what goes into the manifest."""
        shards: dict[str, dict[str, torch.Tensor]] = {}
        table = []
        for part, host in zip(self.parts, self.hosts, strict=True):
            kind = part.kind.split("/")[0]
            file = f"{kind}-{rank:05d}.safetensors"
            key = part.kind.split("/", 1)[1] + "/" + part.key if "/" in part.kind else part.key
            # The whole of a tensor keeps its shape: a shard of one rank is a state dict to any reader.
            shards.setdefault(file, {})[key] = host.view(part.shape) if part.whole else host.view(-1)
            dtype = str(host.dtype).removeprefix("torch.")
            piece = [file, key, part.start, part.start + host.numel()]
            table.append([f"{part.kind}/{part.name}", list(part.shape), dtype, piece])
        file = f"rng-{rank:05d}.safetensors"
        shards[file] = {f"{rank:05d}/{key}": value for key, value in self.rng.items()}
        for key, value in shards[file].items():
            dtype = str(value.dtype).removeprefix("torch.")
            table.append([f"rng/{key}", list(value.shape), dtype, [file, key, 0, value.numel()]])
        files = {name: asdict(write_shard(self.stage / name, tensors)) for name, tensors in shards.items()}
        return {"files": files, "pieces": table, "steps": self.steps}


def _report(stage: Path, rank: int) -> Path:
    return stage / f"rank-{rank:05d}.json"


def _leave(stage: Path, rank: int, report: dict[str, Any]) -> None:
    """A rank's word to rank 0; there only when complete. Raises OSError, and has then told rank 0 if a name could."""
    path = _report(stage, rank)
    hidden = path.with_name(f".{path.name}")
    try:
        write_bytes(hidden, [json.dumps(report).encode()])
        hidden.rename(path)
    except OSError:
        with contextlib.suppress(OSError):  # nothing can be written there: rank 0 waits until its patience ends
            path.with_suffix(".failed").touch()
        raise


def _collect(stage: Path, world: int, patience: float, abandoned: threading.Event) -> list[dict[str, Any]]:
    """Every rank's report, in rank order. Raises _Failed with a rank's reason, or after ``patience`` seconds."""
    reports: dict[int, dict[str, Any]] = {}
    end = time.monotonic() + patience
    while len(reports) < world:
        try:
            names = set(os.listdir(stage))
        except FileNotFoundError:
            raise _Failed(f"{stage} was removed while it was written") from None
        for rank in set(range(world)) - set(reports):
            path = _report(stage, rank)
            if path.name in names:
                reports[rank] = json.loads(path.read_text())
                if "error" in reports[rank]:
                    raise _Failed(reports[rank]["error"])
            elif path.with_suffix(".failed").name in names:
                raise _Failed(f"rank {rank}: nothing can be written any more, not even why")
        if len(reports) < world:
            if time.monotonic() > end:
                silent = sorted(set(range(world)) - set(reports))
                raise _Failed(
                    f"rank {silent[0]} wrote nothing into {stage.parent} within {patience:.0f} s; "
                    "is the out dir shared by all hosts?"
                )
            if abandoned.wait(0.01):
                raise _Failed("the run ended before all ranks had written")
    return [reports[rank] for rank in range(world)]
