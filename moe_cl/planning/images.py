"""What a plan knows of the images: how many, how large; of the data set itself where it is at hand."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from moe_cl.config import ConfigError, RunConfig
from moe_cl.data.faults import SourceLost
from moe_cl.data.index import Dataset, resolve
from moe_cl.data.remote import Patience, patiently

HEADER = 512  # bytes of tar before each image, read with it
LOOKED_AT = 8  # shards whose index is read for the mean sizes


@dataclass(frozen=True)
class Images:
    """number: of an epoch. bytes: of one in its shard. pixels: of one. source: where the figures are from.

    The defaults are ImageNet-1k's: 138 GiB in 1,281,167 JPEGs, most kept below 500 px.
    """

    number: int = 1_281_167
    bytes: float = 110_000
    pixels: float = 500 * 375
    source: str = "ImageNet-1k's"

    def steps_per_epoch(self, cfg: RunConfig, batch: int) -> int:
        """Whole global batches an epoch, as the loader counts them. Raises ConfigError where that is none."""
        streams = cfg.data.streams
        if streams > self.number:
            raise ConfigError(f"data.streams {streams} is more than the {self.number} images; lower it")
        positions = self.number // streams * streams
        if positions < batch:
            raise ConfigError(
                f"{self.number} images in {streams} streams give {positions} positions an epoch, less than one global "
                f"batch of {batch}; lower data.streams or the batch"
            )
        return positions // batch


def find(cfg: RunConfig, given: bool, number: int | None = None, size: int | None = None) -> Images:
    """Those of ``data.train`` if it is here, else ImageNet-1k's; ``number`` and ``size`` (bytes) go before both.

    Args:
        given: the user named ``data.train``, so it must be here unless ``number`` says what it holds.

    Raises:
        ConfigError: a data set that was given is not here, or its indexes are not.
    """
    found = Images()
    try:
        dataset = patiently(lambda: resolve(cfg.data.train), cfg.data.train, Patience(0))
    except (ConfigError, SourceLost, OSError) as error:
        if given and number is None:
            raise ConfigError(f"{error}; to plan without it, say --images N") from None
    else:
        found = measured(cfg, dataset)
    source = found.source if number is None else "as told"
    return Images(number or found.number, size or found.bytes, found.pixels, source)


def measured(cfg: RunConfig, dataset: Dataset) -> Images:
    """Number with ``data.repeat``, mean bytes and pixels from the indexes of up to eight shards."""
    repeat = cfg.data.repeat if len(cfg.data.repeat) > 1 else cfg.data.repeat * len(dataset.sources)
    if len(repeat) != len(dataset.sources):
        raise ConfigError(f"data.repeat: {len(repeat)} numbers for {len(dataset.sources)} sources")
    number = sum(
        int(dataset.starts[source.stop] - dataset.starts[source.start]) * times
        for source, times in zip(dataset.sources, repeat, strict=True)
    )
    chosen = np.unique(np.linspace(0, len(dataset.shards) - 1, LOOKED_AT).astype(int)).tolist()
    indexes = [dataset.index(shard) for shard in chosen]
    sizes = np.concatenate([index.size for index in indexes])
    pixels = np.concatenate([index.width.astype(np.int64) * index.height for index in indexes])
    plain = Images()
    return Images(
        number,
        float(sizes[sizes > 0].mean()) + HEADER if (sizes > 0).any() else plain.bytes,
        float(pixels[pixels > 0].mean()) if (pixels > 0).any() else plain.pixels,
        f"of {cfg.data.train}",
    )
