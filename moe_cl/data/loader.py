"""The loader: one optimizer step's micro-batches at a time, in the order of ``moe_cl.data.order``, resumable at once.

Loading processes only turn positions into batches (``moe_cl.data.samples``): their number changes nothing. The cursor
counts positions used by optimizer steps (``used()``), never what was prefetched.
"""

from __future__ import annotations

import hashlib
import itertools
import logging
import math
import time
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Sampler

from moe_cl.config import ConfigError, DataConfig
from moe_cl.data import worker
from moe_cl.data.decode import check_decoder
from moe_cl.data.faults import DataStop, SourceLost, Tally, TooManyFaults
from moe_cl.data.index import Dataset, resolve
from moe_cl.data.labelled import LabelledLoader
from moe_cl.data.order import Order, share
from moe_cl.data.remote import Patience, patiently
from moe_cl.data.samples import BatchMaker, Made
from moe_cl.views.spec import Batch, ViewSpec

__all__ = ["DataStop", "LabelledLoader", "Loader", "SourceLost", "TooManyFaults"]
log = logging.getLogger("moe_cl.data")


class Loader:
    """Iterates over optimizer steps, epoch after epoch, without end: each a list of this rank's micro-batches.

    In step s of an epoch, rank r of ``world`` takes the positions p in [sB, (s+1)B) with p mod world = r, ascending,
    cut into micro-batches. Call ``used()`` after each optimizer step.

    Attributes:
        steps_per_epoch: whole global batches an epoch.
        epoch: epoch of the step that was handed out last.
        wait_seconds: how long the last ``next()`` waited for data.
        counts: faults so far on this rank, by name.

    Raises:
        ConfigError: settings that cannot work, at construction.
        DataStop: from ``next()``: the run must save and stop (``SourceLost``, ``TooManyFaults``).
    """

    def __init__(
        self, cfg: DataConfig, spec: ViewSpec, *, seed: int, global_batch: int, micro_batch: int, rank: int = 0,
        world: int = 1, pin: bool = False,
    ):  # fmt: skip
        _check(cfg, global_batch, micro_batch, world)
        self.cfg, self.spec, self.global_batch, self.micro_batch = cfg, spec, global_batch, micro_batch
        self.rank, self.world, self.pin = rank, world, pin
        self.accumulation = global_batch // (micro_batch * world)
        patience = Patience(cfg.retry_seconds)
        self.dataset: Dataset = patiently(lambda: resolve(cfg.train), cfg.train, patience)
        self._make_order(seed)
        self.steps_per_epoch = self.order.length // global_batch
        if cfg.streams > self.order.total:
            raise ConfigError(
                f"data.streams {cfg.streams} is more than the {self.order.total} samples of {cfg.train}; lower it"
            )
        if not self.steps_per_epoch:
            raise ConfigError(
                f"{cfg.train}: {self.order.total} samples in {cfg.streams} streams give {self.order.length} positions "
                f"an epoch, less than one global batch of {global_batch}; lower data.streams or the batch"
            )
        self._tally = Tally(cfg.max_bad_fraction)
        self.counts, self.epoch, self.wait_seconds = self._tally.counts, 0, 0.0
        self._epoch, self._cursor = 0, 0  # used, over all ranks
        self._processes: DataLoader | None = None
        self._made: Iterator[Made] | None = None
        self._events: list[dict[str, Any]] = patience.drain()
        self._tell()
        if cfg.workers:
            self._start()  # now, so that what the caller builds later (model, CUDA) is not forked

    def __iter__(self) -> Loader:
        return self

    def __next__(self) -> list[Batch]:
        start = time.perf_counter()
        if self._made is None:
            self._start()
        out = []
        for _ in range(self.accumulation):
            made = self._next_made()
            self._events += made.events
            self._tally.add(made.batch.positions.tolist() if made.batch else [], made.events)
            made.check()
            out.append(made.batch)
        self.epoch = made.epoch
        self.wait_seconds = time.perf_counter() - start
        return out

    def used(self) -> None:
        """One optimizer step has used one global batch: move the cursor."""
        epoch, cursor = self.order.advance(self._epoch, self._cursor, self.global_batch)
        self._epoch, self._cursor = self.order.advance(epoch, cursor + self.global_batch, self.global_batch)

    def state_dict(self) -> dict[str, Any]:
        """The cursor and what the order depends on: plain numbers and one string, the same on every rank."""
        return {
            "seed": self.order.seed, "epoch": self._epoch, "cursor": self._cursor, "samples": self.order.total,
            "streams": self.cfg.streams, "window": self.cfg.window, "data": self._fingerprint(),
        }  # fmt: skip

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue at the cursor of ``state``, at any batch size and number of ranks.

        Raises:
            ConfigError: in the middle of an epoch, if data, streams or window are not those of ``state``.
        """
        same = {"streams": self.cfg.streams, "window": self.cfg.window, "samples": self.order.total}
        for key, value in {**same, "data": self._fingerprint()}.items():
            if state[key] != value:
                what = f"data.{key}" if key in ("streams", "window") else "the data set (data.train, data.repeat)"
                text = f"{what} changed since the checkpoint ({key}: {state[key]}, now {value})"
                if state["cursor"]:
                    raise ConfigError(f"{text}; in the middle of an epoch it must stay as it was")
                log.warning("%s; the next epoch starts with it", text)
        self._made = None
        if int(state["seed"]) != self.order.seed:
            self.close()
            self._make_order(int(state["seed"]))
        self._epoch, self._cursor = int(state["epoch"]), int(state["cursor"])

    def drain_events(self) -> list[dict[str, Any]]:
        """Events for the journal since the last call: each has ``name`` and the fields of ``faults.bad_sample``,
        of a transient fault (url, fault, count), or of the order (``data_order``)."""
        out, self._events = self._events, []
        return out

    def close(self) -> None:
        """Stop the loading processes; the next ``next()`` starts again at the cursor."""
        self._made = self._processes = None

    def _make_order(self, seed: int) -> None:
        shards = self.dataset.shards
        repeat = np.ones(len(shards), dtype=np.int64)
        given = self.cfg.repeat if len(self.cfg.repeat) > 1 else self.cfg.repeat * len(self.dataset.sources)
        if len(given) != len(self.dataset.sources):
            raise ConfigError(f"data.repeat: {len(given)} numbers for {len(self.dataset.sources)} sources")
        for source, times in zip(self.dataset.sources, given, strict=True):
            repeat[source.start : source.stop] = times
        self.order = Order([s.samples for s in shards], seed, self.cfg.streams, self.cfg.window, repeat.tolist())

    def _start(self) -> None:
        """(Re)start at the cursor; processes that run already stay, what they had prefetched is dropped."""
        if self._processes is None:
            workers, more = self.cfg.workers, {}
            if workers:
                ahead = max(self.cfg.prefetch, self.accumulation if self.cfg.prefetch else 1)
                more = {"prefetch_factor": math.ceil(ahead / workers), "multiprocessing_context": "fork",
                        "persistent_workers": True}  # fmt: skip
            self._plan = _Plan(self.order, self.global_batch, self.micro_batch, self.rank, self.world)
            maker = BatchMaker(self.dataset, self.order, self.spec, self.cfg)
            self._processes = DataLoader(
                maker, batch_size=None, sampler=self._plan, num_workers=workers, collate_fn=_as_it_is,
                worker_init_fn=worker.begin, pin_memory=self.pin,
                generator=torch.Generator(),  # of the workers' seeds, which nothing reads: not a draw of the run's own
                **more,
            )  # fmt: skip
        self._plan.start = self._epoch, self._cursor
        self._made = iter(self._processes)

    def _next_made(self) -> Made:
        try:
            return next(self._made)
        except (RuntimeError, OSError, EOFError) as error:  # a batch is on its way through a socket when its maker dies
            if isinstance(error, RuntimeError) and "DataLoader worker" not in str(error):
                raise
            self.close()
            text = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
            raise DataStop(
                f"a loading process died ({text}); out of memory? lower data.workers or data.prefetch"
            ) from None

    def _fingerprint(self) -> str:
        text = f"{self.order.counts.tolist()}{self.order.repeat.tolist()}{[s.sha256 for s in self.dataset.shards]}"
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    def _tell(self) -> None:
        used = self.steps_per_epoch * self.global_batch
        fields = {"samples": self.order.total, "shards": len(self.dataset.shards), "streams": self.cfg.streams,
                  "steps_per_epoch": self.steps_per_epoch, "dropped": self.order.total - used}  # fmt: skip
        if self.rank == 0:
            self._events.append({"name": "data_order", **fields})
            log.info(
                "%d samples an epoch in %d shards: %d steps of %d, %d samples left out of each epoch",
                *(fields[k] for k in ("samples", "shards", "steps_per_epoch")), self.global_batch, fields["dropped"],
            )  # fmt: skip
            for source in self.dataset.sources:
                if source.shuffled is False:
                    log.warning(
                        "%s was sharded with --keep-order: a window of %d samples may hold few classes; shard it again "
                        "without that option", source.pattern, self.cfg.window,
                    )  # fmt: skip


class _Plan(Sampler):
    """(epoch, positions) of every micro-batch of a rank from the cursor on, without end."""

    def __init__(self, order: Order, batch: int, micro: int, rank: int, world: int):
        self.order, self.batch, self.micro, self.rank, self.world = order, batch, micro, rank, world
        self.start = (0, 0)

    def __iter__(self) -> Iterator[tuple[int, np.ndarray]]:
        for epoch, first in self.order.steps(*self.start, self.batch):
            positions = share(first, self.batch, self.rank, self.world)
            for at in itertools.count(0, self.micro):
                if at >= len(positions):
                    break
                yield epoch, positions[at : at + self.micro]


def _as_it_is(made: Made) -> Made:
    return made


def _check(cfg: DataConfig, global_batch: int, micro_batch: int, world: int) -> None:
    if micro_batch < 1 or world < 1 or global_batch < 1 or global_batch % (micro_batch * world):
        raise ConfigError(f"global batch {global_batch} is not a multiple of micro batch {micro_batch} x {world} ranks")
    for name, least in (("streams", 1), ("window", 1), ("workers", 0), ("prefetch", 0), ("retry_seconds", 0)):
        if getattr(cfg, name) < least:
            raise ConfigError(f"data.{name} is at least {least}, found {getattr(cfg, name)}")
    if min(cfg.repeat, default=0) < 1:
        raise ConfigError(f"data.repeat lists whole passes, at least 1 each, found {cfg.repeat}")
    if not 0 <= cfg.max_bad_fraction <= 1:
        raise ConfigError(f"data.max_bad_fraction lies between 0 and 1, found {cfg.max_bad_fraction}")
    check_decoder(cfg.decoder)
