"""Positions in, micro-batches out: what a loading process does. A function of (seed, epoch, position), nothing drawn.

A slot whose sample is broken gets the substitute that the order names for it; the views stay those of the position.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from moe_cl.config import ConfigError, DataConfig
from moe_cl.data import faults
from moe_cl.data.decode import BadImage, TooManyPixels, decode
from moe_cl.data.faults import DataStop, SampleFault, SourceLost, TooManyFaults
from moe_cl.data.index import Dataset
from moe_cl.data.order import Order
from moe_cl.data.reader import Reader
from moe_cl.data.rows import Rows
from moe_cl.views.augment import make_views
from moe_cl.views.spec import Batch, ViewSpec

_KINDS: dict[str, type[Exception]] = {k.__name__: k for k in (SourceLost, TooManyFaults, ConfigError)}


@dataclass
class Made:
    """A micro-batch with its fault events, or (kind, text) of the error that ends the run, which must not be lost on
    its way between processes."""

    epoch: int
    batch: Any = None
    events: list[dict[str, Any]] = field(default_factory=list)
    stop: tuple[str, str] | None = None

    def pin_memory(self) -> Made:
        """Called by torch's DataLoader in its pinning thread."""
        if isinstance(self.batch, Batch):
            self.batch.views = [v.pin_memory() for v in self.batch.views]
        return self

    def check(self) -> None:
        """Raise the error that ended the making of this batch."""
        if self.stop:
            raise _KINDS[self.stop[0]](self.stop[1])


def smallest_side(spec: ViewSpec) -> int:
    """Shorter side, pixels, above which even the smallest crop of the spec is not enlarged: bigger JPEGs may be decoded
    smaller. A crop of area a*W*H and aspect r has a side of at least sqrt(a * min(r, 1/r)) times the shorter one."""
    return max(
        math.ceil(crop.size / math.sqrt(crop.scale[0] * min(crop.ratio[0], 1 / crop.ratio[1]))) for crop in spec.crops
    )


class Images:
    """Decoded samples by id. Its reader opens files in the process that first uses it."""

    def __init__(self, dataset: Dataset, cfg: DataConfig, shorter: int):
        self.dataset, self.cfg, self.shorter = dataset, cfg, shorter
        self._reader: Reader | None = None

    @property
    def reader(self) -> Reader:
        if self._reader is None:
            self._reader = Reader(self.dataset, self.cfg)
        return self._reader

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_reader": None}

    def decode(self, data: bytes | SampleFault) -> np.ndarray:
        """(H, W, 3) uint8 RGB of what the reader gave. Raises SampleFault."""
        if isinstance(data, SampleFault):
            raise data
        try:
            return decode(data, max_pixels=self.cfg.max_pixels, shorter=self.shorter, decoder=self.cfg.decoder)
        except TooManyPixels as error:
            raise SampleFault(faults.TOO_MANY_PIXELS, str(error)) from None
        except BadImage as error:
            raise SampleFault(faults.CORRUPT_IMAGE, str(error)) from None

    def fault_event(self, fault: SampleFault, epoch: int, position: int, bad: int) -> dict[str, Any]:
        """The journal's event of a bad sample."""
        shard = self.dataset.shards[self.dataset.locate(bad)[0]].url
        return faults.bad_sample(fault.name, fault.detail, epoch, position, bad, self.reader.key(bad), shard)


class BatchMaker(torch.utils.data.Dataset):
    """``maker[epoch, positions]`` is the micro-batch of these positions: the same in every process."""

    def __init__(self, dataset: Dataset, order: Order, spec: ViewSpec, cfg: DataConfig):
        self.images = Images(dataset, cfg, smallest_side(spec))
        self.order, self.spec, self.labels_needed = order, spec, cfg.labels == "required"

    def __getitem__(self, item: tuple[int, np.ndarray]) -> Made:
        events: list[dict[str, Any]] = []
        try:
            batch = self._make(*item, events)
        except (DataStop, ConfigError) as error:
            return Made(item[0], None, events + self.images.reader.patience.drain(), (type(error).__name__, str(error)))
        return Made(item[0], batch, events + self.images.reader.patience.drain())

    def _make(self, epoch: int, positions: np.ndarray, events: list[dict[str, Any]]) -> Batch:
        ids = self.order.epoch(epoch).ids(positions)
        rows = Rows(len(ids))
        for slot, data in enumerate(self.images.reader.read(ids)):
            position = int(positions[slot])
            image, ids[slot] = self._fill(epoch, position, int(ids[slot]), data, events)
            rows.add(*make_views(image, self.spec, self.order.seed, epoch, position))
        views, boxes = rows.finish()
        return Batch(
            views, boxes, torch.from_numpy(ids), self._labels(ids, epoch, events), torch.from_numpy(positions.copy())
        )

    def _fill(
        self, epoch: int, position: int, sample_id: int, data: bytes | SampleFault, events: list[dict[str, Any]]
    ) -> tuple[np.ndarray, int]:
        """The slot's image and the id of the sample it comes from: its own, or the first substitute that is good."""
        failed: list[dict[str, Any]] = []
        try:
            while True:
                try:
                    image = self.images.decode(data)
                    if self.labels_needed and self.images.reader.labels(np.array([sample_id]))[0][0] < 0:
                        raise SampleFault(faults.MISSING_LABEL, "data.labels=required, and it has none")
                    return image, sample_id
                except SampleFault as fault:
                    failed.append(self.images.fault_event(fault, epoch, position, sample_id))
                if len(failed) >= faults.IN_A_ROW:
                    lines = "\n  ".join(faults.describe(e) for e in failed[-20:])
                    raise TooManyFaults(f"{len(failed)} bad samples in a row for one slot; the last ones:\n  {lines}")
                sample_id = self.order.epoch(epoch).substitute(position, len(failed))
                (data,) = self.images.reader.read([sample_id])
        finally:
            for event in failed:
                event["substitute"] = sample_id
            events += failed

    def _labels(self, ids: np.ndarray, epoch: int, events: list[dict[str, Any]]) -> torch.Tensor:
        labels, expected = self.images.reader.labels(ids)
        missing = ids[expected & (labels < 0)]
        if len(missing):
            events.append(
                {"name": "missing_label", "fault": faults.MISSING_LABEL, "epoch": epoch, "bad": int(missing[0]),
                 "count": len(missing)}
            )  # fmt: skip
        return torch.from_numpy(labels)
