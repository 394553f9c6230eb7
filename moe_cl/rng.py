"""Counter-based random numbers: a value is a function of its key alone, never of who asks or in what order.

``generator`` (NumPy Philox) draws the parameters of a view; ``uniform``/``normal`` draw per-sample tensors inside a
network (router noise, drop-path) from 64-bit keys, the same numbers for any split of the batch over ranks,
micro-batches or replays. The mixer is splitmix64 (Steele, Lea, Flood 2014), its finaliser applied twice over key and
counter.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

_MASK = (1 << 64) - 1
_own = threading.local()  # a generator a thread, for ``uniforms``


def _signed(value: int) -> int:
    value &= _MASK
    return value - (1 << 64) if value >> 63 else value


_GOLDEN, _MIX1, _MIX2 = (_signed(v) for v in (0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB))


def generator(seed: int, epoch: int, position: int, view: int) -> np.random.Generator:
    """The stream of random numbers of one view of one sample (non-negative integers below 2**63)."""
    return np.random.Generator(np.random.Philox(key=[seed, epoch], counter=[0, 0, view, position]))


def uniforms(seed: int, epoch: int, position: int, views: int, count: int) -> np.ndarray:
    """(views, count) float64: row v is ``generator(seed, epoch, position, v).random(count)``, for one set-up."""
    if not hasattr(_own, "bits"):
        _own.bits = np.random.Philox(0)
        _own.draw, _own.state = np.random.Generator(_own.bits), _own.bits.state
    # setting the state takes a tenth of the time of a new generator; the buffer in it is an empty one
    _own.state["state"]["key"][:] = seed, epoch
    counter = _own.state["state"]["counter"]
    out = np.empty((views, count))
    for view in range(views):
        counter[:] = 0, 0, view, position
        _own.bits.state = _own.state
        _own.draw.random(out=out[view])
    return out


def _shift(x: Tensor, bits: int) -> Tensor:
    """Logical right shift of int64 (torch's is arithmetic)."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def _mix(x: Tensor) -> Tensor:
    x = (x ^ _shift(x, 30)) * _MIX1
    x = (x ^ _shift(x, 27)) * _MIX2
    return x ^ _shift(x, 31)


def fold(keys: Tensor, *numbers: int) -> Tensor:
    """New int64 keys from ``keys`` and integers: one for each use (layer, view, purpose)."""
    for number in numbers:
        keys = _mix(keys * _signed(0xD1342543DE82EF95) + _signed((number + 1) * 0x9E3779B97F4A7C15))
    return keys


def sample_keys(seed: int, step: int, positions: Tensor) -> Tensor:
    """int64 keys (B,) of a step's samples from their positions in the epoch's order (B,)."""
    return fold(positions.long(), seed, step)


def uniform(keys: Tensor, shape: Sequence[int], dtype: torch.dtype = torch.float32) -> Tensor:
    """U[0, 1) of shape (len(keys), *shape) from int64 ``keys`` (n,)."""
    count = math.prod(shape)
    counter = torch.arange(1, count + 1, device=keys.device, dtype=torch.int64) * _GOLDEN
    bits = _shift(_mix(_mix(keys[:, None]) + counter[None]), 11)  # 53 bits
    if dtype == torch.float64:
        return (bits.to(dtype) * 2.0**-53).view(len(keys), *shape)
    return (_shift(bits, 29).to(torch.float32) * 2.0**-24).to(dtype).view(len(keys), *shape)


def normal(keys: Tensor, shape: Sequence[int], dtype: torch.dtype = torch.float32) -> Tensor:
    """N(0, 1) of shape (len(keys), *shape), Box-Muller on two uniforms a value."""
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    u, v = uniform(keys, (2, *shape), wide).unbind(1)
    return (torch.sqrt(-2.0 * torch.log1p(-u)) * torch.cos(2.0 * math.pi * v)).to(dtype)
