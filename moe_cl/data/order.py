"""Whose place a sample has: the order of an epoch as a function of (seed, epoch, position), read from counts alone.

With N samples an epoch (whole passes of each source counted), C streams and L = floor(N / C):

    q = shuffled(seed, epoch)           the sequence of all samples, shards in shuffled order, N long
    stream c = q[cL : (c+1)L]           a contiguous 1/C of it; the last N - CL samples (fewer than C) are dropped
    position p                          belongs to stream c = p mod C, as its j-th sample, j = floor(p / C)
    sample(p) = q[cL + bW + perm(seed, epoch, c, b)[j - bW]],   b = floor(j / W)     (W = window)

Step s of an epoch uses positions [sB, (s+1)B), rank r of R those with p mod R = r; the last CL mod B positions (fewer
than B) are dropped. Permutations come from Philox's raw 64-bit words, which NumPy keeps stable between versions.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

_SHARDS, _WINDOW, _SUBSTITUTE = 1, 2, 3  # counter word 1; views use 0 there (moe_cl.rng.generator)
NEAR_TRIES = 8  # substitutes first come from the slot's own window, later from its whole stream
_MASK = (1 << 64) - 1


def _words(seed: int, epoch: int, purpose: int, a: int, b: int, n: int) -> np.ndarray:
    """``n`` 64-bit words that belong to this key."""
    return np.random.Philox(key=[seed, epoch], counter=[0, purpose, a, b]).random_raw(n)


def _permutation(seed: int, epoch: int, purpose: int, a: int, b: int, n: int) -> np.ndarray:
    return np.argsort(_words(seed, epoch, purpose, a, b, n), kind="stable")


class EpochOrder:
    """One epoch's order. ``length`` positions; ``ids`` maps positions to global sample ids."""

    def __init__(self, counts: np.ndarray, repeat: np.ndarray, seed: int, epoch: int, streams: int, window: int):
        self.seed, self.epoch, self.streams, self.window = seed, epoch, streams, window
        units = np.repeat(np.arange(len(counts)), repeat)  # one entry a pass of a shard
        units = units[_permutation(seed, epoch, _SHARDS, 0, 0, len(units))]
        first = np.concatenate([[0], np.cumsum(counts)[:-1]])
        sizes = counts[units]
        self._ends = np.cumsum(sizes)
        self._shift = first[units] - (self._ends - sizes)  # id = place in the sequence + shift of its unit
        self.total = int(sizes.sum())
        self.stream_length = self.total // streams
        self.length = self.stream_length * streams
        self._permutations: OrderedDict[tuple[int, int], np.ndarray] = OrderedDict()

    def ids(self, positions: np.ndarray) -> np.ndarray:
        """Global sample ids (n,) int64 of positions (n,) in [0, length)."""
        positions = np.asarray(positions, dtype=np.int64)
        if len(positions) and not (0 <= positions.min() and positions.max() < self.length):
            raise IndexError(f"positions of this epoch are in [0, {self.length})")
        stream, place = positions % self.streams, positions // self.streams
        block = place // self.window
        sequence = np.empty(len(positions), dtype=np.int64)
        groups = stream * (self.stream_length // self.window + 1) + block
        for group in np.unique(groups):  # one permutation a window
            rows = np.flatnonzero(groups == group)
            c, b = int(stream[rows[0]]), int(block[rows[0]])
            start = b * self.window
            sequence[rows] = c * self.stream_length + start + self._permutation(c, b)[place[rows] - start]
        return self._id(sequence)

    def substitute(self, position: int, attempt: int) -> int:
        """Sample id that fills the slot after ``attempt`` failures (1, 2, ...): any sample of the same span."""
        stream, place = position % self.streams, position // self.streams
        low, high = 0, self.stream_length
        if attempt <= NEAR_TRIES:
            low = place // self.window * self.window
            high = min(low + self.window, high)
        word = int(_words(self.seed, self.epoch, _SUBSTITUTE, attempt, position, 1)[0])
        return int(self._id(np.array([stream * self.stream_length + low + (word * (high - low) >> 64)]))[0])

    def _id(self, sequence: np.ndarray) -> np.ndarray:
        return sequence + self._shift[np.searchsorted(self._ends, sequence, side="right")]

    def _permutation(self, stream: int, block: int) -> np.ndarray:
        """The window's permutation, kept for the two windows a stream that can be in use."""
        key = (stream, block)
        if key not in self._permutations:
            n = min(self.window, self.stream_length - block * self.window)
            made = _permutation(self.seed, self.epoch, _WINDOW, stream, block, n)
            self._permutations[key] = made.astype(np.uint16 if n <= 1 << 16 else np.int64)
            if len(self._permutations) > 2 * self.streams:
                self._permutations.popitem(last=False)
        return self._permutations[key].astype(np.int64, copy=False)


class Order:
    """The order of every epoch of one data set: ``counts`` samples a shard, each shard ``repeat`` times an epoch."""

    def __init__(
        self, counts: Sequence[int], seed: int, streams: int, window: int, repeat: Sequence[int] | None = None
    ):
        self.counts = np.asarray(counts, dtype=np.int64)
        self.repeat = np.ones_like(self.counts) if repeat is None else np.asarray(repeat, dtype=np.int64)
        self.seed, self.streams, self.window = seed, streams, window
        self.total = int((self.counts * self.repeat).sum())
        self.length = self.total // streams * streams  # positions an epoch
        self._epochs: OrderedDict[int, EpochOrder] = OrderedDict()

    def epoch(self, number: int) -> EpochOrder:
        """Order of epoch ``number``; the last two are kept (prefetching runs ahead over the boundary)."""
        if number not in self._epochs:
            self._epochs[number] = EpochOrder(self.counts, self.repeat, self.seed, number, self.streams, self.window)
            if len(self._epochs) > 2:
                self._epochs.popitem(last=False)
        return self._epochs[number]

    def advance(self, epoch: int, cursor: int, batch: int) -> tuple[int, int]:
        """(epoch, cursor) moved into the next epoch if fewer than ``batch`` positions are left in this one."""
        return (epoch, cursor) if cursor + batch <= self.length else (epoch + 1, 0)

    def steps(self, epoch: int, cursor: int, batch: int) -> Iterator[tuple[int, int]]:
        """(epoch, first position) of every step from the cursor on, without end."""
        while True:
            epoch, cursor = self.advance(epoch, cursor, batch)
            yield epoch, cursor
            cursor += batch


def share(start: int, batch: int, rank: int, world: int) -> np.ndarray:
    """Rank's positions of the step that uses [start, start + batch): those with p mod world = rank, ascending."""
    return np.arange(start + (rank - start) % world, start + batch, world, dtype=np.int64)


# -- digest: which samples a global batch held, however ranks share them ----------------------------------------------


def _hash(ids: np.ndarray) -> np.ndarray:
    """splitmix64's finaliser of each id."""
    x = ids.astype(np.uint64) + np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def digest_parts(ids: Tensor | np.ndarray) -> Tensor:
    """Four float64 sums of 16-bit limbs; add the ranks' parts (exact below 2**37 samples), then ``digest_hex``."""
    hashed = _hash(np.asarray(ids.cpu() if isinstance(ids, Tensor) else ids, dtype=np.int64))
    limbs = [(hashed >> np.uint64(16 * i)) & np.uint64(0xFFFF) for i in range(4)]
    return torch.tensor([float(limb.sum()) for limb in limbs], dtype=torch.float64)


def digest_hex(parts: Tensor) -> str:
    """16 hexadecimal digits of summed ``digest_parts``."""
    return f"{sum(int(p) << (16 * i) for i, p in enumerate(parts.tolist())) & _MASK:016x}"


def digest(ids: Tensor | np.ndarray) -> int:
    """Sum of the hashed ids modulo 2**64: independent of order and of how a batch is cut into parts."""
    return int(digest_hex(digest_parts(ids)), 16)
