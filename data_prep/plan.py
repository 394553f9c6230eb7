"""Which sample goes into which shard, decided before any is read: every number of workers writes the same bytes."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import cached_property

import numpy as np

from data_prep.sources import Item
from moe_cl.config import ConfigError

OVERHEAD = 4 * 512 + 512  # three headers, the small members' blocks, half a block of padding
LAYOUT = 1  # of shards and members; a change of it makes an unfinished run of an older version start afresh


@dataclass(frozen=True)
class Settings:
    """Everything that the shards' bytes depend on, besides the source."""

    name: str
    split: str
    max_count: int = 10_000
    max_size: int = 256_000_000
    shuffle_seed: int | None = 0  # None keeps the source's order
    resize_shorter: int | None = None
    quality: int = 90


@dataclass(frozen=True)
class Plan:
    """Shard ``s`` takes the items ``order[cuts[s]:cuts[s + 1]]``."""

    settings: Settings
    items: Sequence[Item]
    order: np.ndarray
    cuts: tuple[int, ...]

    @property
    def shards(self) -> int:
        return len(self.cuts) - 1

    def file(self, shard: int) -> str:
        """Name of a shard's tar."""
        return f"{self.settings.name}-{self.settings.split}-{shard:06d}.tar"

    def slots(self, shard: int) -> range:
        """Places of a shard's samples in the whole order; the keys of its members are these numbers."""
        return range(self.cuts[shard], self.cuts[shard + 1])

    def item(self, slot: int) -> Item:
        return self.items[self.order[slot]]

    def class_counts(self) -> Counter[int]:
        return Counter(item.label for item in self.items)

    @cached_property
    def fingerprint(self) -> str:
        """Hash of settings and listing: what a run must share with an unfinished one to continue it."""
        digest = hashlib.sha256(json.dumps([LAYOUT, asdict(self.settings)]).encode())
        for item in self.items:
            digest.update(f"{item.name}\0{item.label}\0{item.size}\n".encode(errors="surrogateescape"))
        return digest.hexdigest()


def make_plan(items: Sequence[Item], settings: Settings) -> Plan:
    """Order and cuts. A shard holds at most ``max_count`` samples and about ``max_size`` bytes, but one at least.

    With re-encoding the sizes of the source's files are what is counted: the plan must not wait for the encoder.
    """
    if settings.max_count < 1 or settings.max_size < 1:
        raise ConfigError("--max-count and --max-size must be positive")
    if settings.shuffle_seed is None:
        order = np.arange(len(items))
    else:
        # Philox's raw bits are the same in every numpy; a permutation of its Generator need not be.
        order = np.argsort(np.random.Philox(key=settings.shuffle_seed).random_raw(len(items)), kind="stable")
    cuts, count, size = [0], 0, 0
    for slot, i in enumerate(order):
        need = items[i].size + OVERHEAD
        if count and (count == settings.max_count or size + need > settings.max_size):
            cuts.append(slot)
            count, size = 0, 0
        count, size = count + 1, size + need
    return Plan(settings, items, order, (*cuts, len(order)))
