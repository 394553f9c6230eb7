"""Losses are computed in float32 (float64 stays float64), whatever autocast the caller is in."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor

Fn = TypeVar("Fn", bound=Callable[..., Any])
_EPS = 1e-12  # of every row normalisation (moco_jcl.md: nz)


def wide(x: Tensor) -> Tensor:
    """``x`` in float32, or as it is when float64."""
    return x if x.dtype == torch.float64 else x.float()


def unit(x: Tensor) -> Tensor:
    """Rows of ``x`` (..., C) at unit L2 norm, wide."""
    return F.normalize(wide(x), dim=-1, eps=_EPS)


def full_precision(fn: Fn) -> Fn:
    """Decorator: autocast is off inside, on the device of the first tensor argument."""

    @functools.wraps(fn)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        device = next((a.device.type for a in args if isinstance(a, Tensor)), "cpu")
        with torch.autocast(device, enabled=False):
            return fn(*args, **kwargs)

    return wrapped  # type: ignore[return-value]
