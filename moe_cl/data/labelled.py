"""Labelled images for evaluation: the whole set once, in order, one plain view each."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from moe_cl.config import ConfigError, DataConfig
from moe_cl.data import faults
from moe_cl.data.faults import DataStop, LeftOut, SampleFault
from moe_cl.data.index import resolve
from moe_cl.data.remote import Patience, patiently
from moe_cl.data.samples import Images, Made
from moe_cl.views.spec import NORMALIZE, eval_view


class LabelledLoader:
    """Iterates over (images (b, 3, S, S) float32 normalised, labels (b,) int64, ids (b,) int64).

    Rank r of ``world`` takes the samples r, r + world, ... in order. A broken or unlabelled sample is left out, counted
    in ``counts`` and named in the log: an accuracy must not count a substitute.

    Args:
        pattern: as ``moe_cl.data.index.resolve`` takes it.
        size: S. An image of S x S pixels is used as it is, others as ``eval_view`` cuts them.
        normalize: imagenet or half.
        batch: samples a batch on this rank; the last may be smaller.
        workers: decoding processes; 0 = in this process.
        data: pixel gate, decoder, cache and retry settings; None = defaults.
        interpolation: bilinear, or bicubic for EsViT's protocol.

    Raises:
        ConfigError: no such data. From the iteration: DataStop.
    """

    def __init__(
        self, pattern: str, size: int, normalize: str, batch: int, rank: int = 0, world: int = 1, workers: int = 0,
        data: DataConfig | None = None, interpolation: str = "bilinear",
    ):  # fmt: skip
        if normalize not in NORMALIZE:
            raise ConfigError(f"views.normalize: {normalize!r} is not one of {', '.join(NORMALIZE)}")
        if batch < 1 or size < 1:
            raise ConfigError(f"evaluation needs a batch and a size of at least 1, found {batch} and {size}")
        cfg = data or DataConfig()
        dataset = patiently(lambda: resolve(pattern), pattern, Patience(cfg.retry_seconds))
        self.class_names, self.samples = dataset.class_names, len(range(rank, len(dataset), world))
        self.counts: Counter[str] = Counter()
        self._max_bad = cfg.max_bad_fraction
        maker = _Maker(Images(dataset, cfg, round(size * 256 / 224)), size, normalize, interpolation)
        mine = np.arange(rank, len(dataset), world)
        self._batches = [mine[at : at + batch] for at in range(0, len(mine), batch)]
        more = {"prefetch_factor": 2, "multiprocessing_context": "fork"} if workers else {}
        self._loader = DataLoader(
            maker, batch_size=None, sampler=self._batches, num_workers=workers, collate_fn=_as_it_is, **more
        )

    def __len__(self) -> int:
        """Batches of one pass."""
        return len(self._batches)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        left_out = LeftOut(self.samples, self._max_bad)
        self.counts = left_out.counts
        for made in self._loader:
            for event in made.events:
                left_out.add(event["fault"], faults.describe(event))
            made.check()
            if len(made.batch[1]):
                yield made.batch


class _Maker(Dataset):
    """``maker[ids]`` is the batch of these samples."""

    def __init__(self, images: Images, size: int, normalize: str, interpolation: str):
        self.images, self.size, self.normalize, self.interpolation = images, size, normalize, interpolation

    def __getitem__(self, ids: np.ndarray) -> Made:
        events, kept, views, plain = [], [], [], []
        try:
            read, labels = self.images.reader.read(ids), self.images.reader.labels(ids)[0].tolist()
            for sample_id, data, label in zip(ids.tolist(), read, labels, strict=True):
                try:
                    image = self.images.decode(data)
                    if label < 0:
                        raise SampleFault(faults.MISSING_LABEL, "an evaluation needs its label")
                except SampleFault as fault:
                    events.append(self.images.fault_event(fault, 0, sample_id, sample_id))
                    continue
                kept.append((sample_id, label))
                if image.shape[:2] == (self.size, self.size):
                    plain.append(len(views))
                    views.append(image)
                else:
                    views.append(eval_view(image, self.size, self.normalize, self.interpolation))
        except (DataStop, ConfigError) as error:
            return Made(0, None, events, (type(error).__name__, str(error)))
        out = torch.empty(len(views), 3, self.size, self.size)
        if plain:  # what eval_view does with an image of this size, for all of them at once
            mean, std = (torch.tensor(v)[:, None, None] for v in NORMALIZE[self.normalize])
            pixels = torch.from_numpy(np.stack([views[i] for i in plain]))
            out[plain] = (pixels.permute(0, 3, 1, 2) / 255.0).sub_(mean).div_(std)
        for i in set(range(len(views))) - set(plain):
            out[i] = views[i]
        numbers = torch.tensor(kept, dtype=torch.int64).reshape(-1, 2)
        return Made(0, (out, numbers[:, 1].contiguous(), numbers[:, 0].contiguous()), events)


def _as_it_is(made: Made) -> Made:
    return made
