"""What every backbone shares: views in, ``Encoded`` out; keyed drop-path; activation checkpointing."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from moe_cl import rng
from moe_cl.config import ConfigError
from moe_cl.models.build import Encoded
from moe_cl.models.norm import current_views, replay, view_count
from moe_cl.moe.router import Routing

_DROP_PATH = 0x0D0  # purpose number in the random keys: drop-path never shares numbers with the router's noise


class Backbone(nn.Module):
    """Base class. A subclass gives ``dim`` (feature width) and ``encode``."""

    dim: int
    patch_size: int = 1
    channels_last: bool = False
    activation_checkpointing: bool = False

    def check_image(self, height: int, width: int, what: str = "images") -> None:
        """Raises ConfigError if images of that size, pixels, cannot be cut into patches; ``what`` they are."""
        if height % self.patch_size or width % self.patch_size:
            raise ConfigError(
                f"{what} of {height} x {width} px cannot be cut into patches of {self.patch_size}; "
                f"use sizes that are multiples of {self.patch_size}"
            )

    def encode(self, x: Tensor, keys: Tensor | None) -> tuple[Tensor, Tensor, list[Routing]]:
        """One resolution: (N, C, H, W) -> pooled (N, D), region tokens (N, T, D), routing of each MoE layer."""
        raise NotImplementedError  # abstract

    def last_features(self, x: Tensor, blocks: int = 1, patches: bool = False) -> Tensor:
        """Features of the last ``blocks`` blocks side by side, (N, sum of widths), as linear probes take them.

        ``patches`` adds the mean patch token where the pooled feature is a class token (esvit.md section 3).
        """
        raise NotImplementedError  # abstract

    def forward(
        self, views: Sequence[Tensor], keys: Tensor | None = None, counts: Sequence[int] | None = None
    ) -> Encoded:
        """Encode views grouped by resolution.

        Args:
            views: one (V_r*B, C, H_r, W_r) a resolution, view-major.
            keys: (V*B,) int64 random keys of the rows of all resolutions in order; None = torch's generator.
            counts: V_r of each resolution, for statistics a view (batch norm); None = one view each.
        """
        rows = [len(x) for x in views]
        keys_of = [None] * len(rows) if keys is None else keys.split(rows)
        features, regions, routing = [], [], []
        for r, (x, k) in enumerate(zip(views, keys_of, strict=True)):
            if self.channels_last:
                x = x.contiguous(memory_format=torch.channels_last)
            with view_count(counts[r] if counts else 1):
                pooled, tokens, routes = self.encode(x, k)
            features.append(pooled)
            regions.append(tokens)
            routing.append(routes)
        return Encoded(features[0] if len(features) == 1 else torch.cat(features), regions, routing)

    def compile_blocks(self, **options: Any) -> None:
        """torch.compile of the parts that are worth it, in place (names of parameters stay); options go to torch."""
        raise ConfigError(f"model.compile: {type(self).__name__} has no blocks to compile; set it to false")

    def run(self, part: Callable[..., Any], *args: Any, keyed: bool = True) -> Any:
        """``part(*args)``; with activation checkpointing it is computed again in the backward instead of kept.

        ``keyed``: ``part`` draws from keys only, so torch's random state needs no replay.
        """
        if not (self.activation_checkpointing and self.training and torch.is_grad_enabled()):
            return part(*args)
        views = current_views()  # the backward runs after the ``with`` of forward has ended
        return checkpoint(
            part,
            *args,
            use_reentrant=False,
            preserve_rng_state=not keyed,
            context_fn=lambda: (contextlib.nullcontext(), replay(views)),
        )


class DropPath(nn.Module):
    """Stochastic depth (Huang et al. 2016) of one residual branch, in training only: rows are zeroed with probability
    ``rate`` and the kept ones scaled by 1/(1-rate). ``place`` = (block, branch) makes the draw its own."""

    def __init__(self, rate: float, *place: int):
        super().__init__()
        self.rate, self.place = rate, place

    def forward(self, x: Tensor, keys: Tensor | None) -> Tensor:
        """x (N, ...); ``keys`` (N,) or None = torch's generator."""
        if not self.rate or not self.training:
            return x
        if keys is None:
            draw = torch.rand(len(x), device=x.device)
        else:
            draw = rng.uniform(rng.fold(keys, _DROP_PATH, *self.place), ())
        keep = (draw >= self.rate).to(x.dtype) / (1.0 - self.rate)
        return x * keep.view(-1, *[1] * (x.ndim - 1))

    def extra_repr(self) -> str:
        return f"rate={self.rate:.3f}"


def set_drop_path(module: nn.Module, rate: float) -> None:
    """Give the blocks of a built backbone other rates, growing linearly from 0 to ``rate``."""
    paths = [m for m in module.modules() if isinstance(m, DropPath)]
    rates = drop_rates(rate, 1 + max((m.place[0] for m in paths), default=0))
    for path in paths:
        path.rate = rates[path.place[0]]


def drop_rates(rate: float, depth: int) -> list[float]:
    """Rates growing linearly from 0 to ``rate`` over ``depth`` blocks."""
    return [rate * i / max(depth - 1, 1) for i in range(depth)]
