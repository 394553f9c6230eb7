"""Colour, blur, solarize and normalisation of a whole batch, on whatever device the batch lies.

The CPU only crops, resizes and mirrors (``views.augment`` with implementation "device" gives uint8 views). The
parameters need no transport: they are a function of (seed, epoch, position, view), so they are drawn again here. Values
stay whole numbers of [0, 255] between operations, as PIL's do.

Shapes: B samples, V_r views of resolution r, n samples that share a step, S pixels a side.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from moe_cl import rng
from moe_cl.views.blur import blur_kernel
from moe_cl.views.draw import SLOTS, draw_operations
from moe_cl.views.spec import Batch, ViewSpec

Operations = tuple[tuple[str, float], ...]
CPU_ROWS = 4  # as many views at once as stay in a core's cache
_MIX = {"brightness", "contrast", "saturation", "gray"}


def to_device(batch: Batch, where: torch.device, spec: ViewSpec, seed: int, epoch: int) -> Batch:
    """The batch on ``where``, its views finished there if ``spec.implementation`` is "device".

    ``sample_ids`` stay on the host: they are only named and hashed, never computed with.

    Args:
        batch: as the loader gives it.
        where: the device the model is on.
        spec: what the loader was told to make.
        seed, epoch: of the run, and of the epoch the batch belongs to.
    """
    moved = {f.name: getattr(batch, f.name) for f in dataclasses.fields(batch) if f.name not in ("views", "sample_ids")}
    moved = {k: v.to(where, non_blocking=True) for k, v in moved.items() if v is not None}
    views = [v.to(where, non_blocking=True) for v in batch.views]
    if spec.implementation == "device":
        views = finish(views, spec, seed, epoch, batch.positions)
    return dataclasses.replace(batch, views=views, **moved)


def finish(views: Sequence[Tensor], spec: ViewSpec, seed: int, epoch: int, positions: Tensor) -> list[Tensor]:
    """The views that ``fast`` would have made of a batch, from its crops.

    Args:
        views: one (V_r*B, 3, S, S) uint8 tensor a resolution, view-major, as ``collate`` gives them.
        spec: what to make; its operations are applied to each view of each sample.
        seed, epoch: of the run and of the epoch the batch belongs to.
        positions: (B,) places in the epoch's order.

    Returns:
        The same tensors as float32, normalised, on the device of ``views``.
    """
    blocks = [rng.uniforms(seed, epoch, p, spec.views, SLOTS).tolist() for p in positions.tolist()]
    out, view = [], 0
    for tensor, (_, count) in zip(views, spec.resolutions, strict=True):
        crops = spec.crops[view : view + count]
        rows = [draw_operations(crop, block[view + i]) for i, crop in enumerate(crops) for block in blocks]
        out.append(normalise(operate(tensor.float(), rows), spec.mean, spec.std))
        view += count
    return out


def operate(x: Tensor, operations: Sequence[Operations]) -> Tensor:
    """Apply each row's own operations to x (N, 3, S, S) float32 of whole numbers in [0, 255]; changes x in place."""
    at_once = CPU_ROWS if x.device.type == "cpu" else max(len(x), 1)
    for start in range(0, len(x), at_once):
        _operate(x[start : start + at_once], operations[start : start + at_once])
    return x


def _operate(x: Tensor, operations: Sequence[Operations]) -> None:
    for step in range(max(map(len, operations), default=0)):
        groups: dict[str, list[int]] = {}
        for row, row_operations in enumerate(operations):
            if step < len(row_operations):
                name = row_operations[step][0]
                groups.setdefault("mix" if name in _MIX else name, []).append(row)
        for name, rows in groups.items():
            chosen = [operations[row][step] for row in rows]
            if len(rows) == len(x):
                x.copy_(_apply(name, x, chosen))
                continue
            index = torch.tensor(rows, device=x.device)
            x.index_copy_(0, index, _apply(name, x.index_select(0, index), chosen))


def normalise(x: Tensor, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """(x/255 - mean) / std of x (N, 3, S, S), in place."""
    m, s = (torch.tensor(v, device=x.device)[:, None, None] for v in (mean, std))
    return x.div_(255.0 * s).sub_(m / s)


def _apply(name: str, x: Tensor, chosen: Sequence[tuple[str, float]]) -> Tensor:
    if name == "mix":
        return _mix(x, chosen)
    if name == "blur":
        return _blur(x, [value for _, value in chosen])
    values = _column([value for _, value in chosen], x)
    if name == "hue":
        return _hue(x, values)
    if name == "solarize":
        return torch.where(x < values, x, 255.0 - x)
    raise ValueError(f"no operation is called {name!r}")


def _column(values: Sequence[float], x: Tensor) -> Tensor:
    return torch.tensor(values, dtype=x.dtype, device=x.device)[:, None, None, None]


def _cut(x: Tensor) -> Tensor:
    """Whole numbers of x in [0, 256), fractions cut off."""
    return x.to(torch.uint8).to(x.dtype)


def _gray(x: Tensor) -> Tensor:
    """(n, 1, S, S): ITU-R 601 luma, rounded as PIL's convert("L") is."""
    r, g, b = x.split(1, dim=1)
    return _cut((0.299 * r).add_(g, alpha=0.587).add_(b, alpha=0.114).add_(0.5))


def _mix(x: Tensor, chosen: Sequence[tuple[str, float]]) -> Tensor:
    """Brightness, contrast, saturation and gray are all a*x + g*gray(x) + c*mean(gray(x)), cut to whole numbers."""
    weights = {
        "brightness": lambda f: (f, 0.0, 0.0),
        "contrast": lambda f: (f, 0.0, 1.0 - f),
        "saturation": lambda f: (f, 1.0 - f, 0.0),
        "gray": lambda _: (0.0, 1.0, 0.0),
    }
    a, g, c = (_column(w, x) for w in zip(*(weights[name](value) for name, value in chosen), strict=True))
    gray = _gray(x)
    level = c * gray.mean(dim=(1, 2, 3), keepdim=True).add_(0.5).floor_()
    # 0.002: a whole number that float32 puts just below itself is not cut to the one before
    return _cut((a * x).add_(g * gray + level).clamp_(0.0, 255.0).add_(0.002))


def _hue(x: Tensor, turns: Tensor) -> Tensor:
    """Hue of x (n, 3, S, S) shifted by turns (n, 1, 1, 1), in steps of 1/255 turn, by the hexagon model of HSV."""
    top, low = x.amax(1, keepdim=True), x.amin(1, keepdim=True)
    chroma = top - low
    r, g, b = x.split(1, dim=1)
    safe = chroma.clamp_min(1.0)  # values are whole numbers
    sector = torch.where(top == r, (g - b) / safe, torch.where(top == g, (b - r) / safe + 2.0, (r - g) / safe + 4.0))
    # channel n of (5, 3, 1): top - chroma * clamp(min(k, 4 - k), 0, 1) with k = (n + sector) mod 6
    first = torch.tensor([5.0, 3.0, 1.0], device=x.device)[:, None, None]
    k = sector + (first + 6.0 * torch.trunc(turns * 255.0) / 255.0).remainder_(6.0)  # in [-1, 11)
    k = torch.where(k >= 6.0, k - 6.0, k)  # below 0, k and 6 + k clamp alike
    return _cut((top - chroma * torch.minimum(k, 4.0 - k).clamp_(0.0, 1.0)).add_(0.5))


def _blur(x: Tensor, sigmas: Sequence[float]) -> Tensor:
    """Each row of x (n, 3, S, S) with its own symmetric kernel; edges are repeated outwards."""
    kernels = [blur_kernel(sigma) for sigma in sigmas]
    reach = max(len(k) for k in kernels) // 2
    taps = np.zeros((len(kernels), reach + 1), np.float32)  # from the middle outwards
    for row, kernel in zip(taps, kernels, strict=True):
        half = kernel[len(kernel) // 2 :]
        row[: len(half)] = half
    weights = torch.from_numpy(taps).to(x.device)[:, :, None, None, None]
    padded = torch.nn.functional.pad(x, (reach,) * 4, mode="replicate")
    for axis in (3, 2):
        size = padded.shape[axis] - 2 * reach
        x = padded.narrow(axis, reach, size) * weights[:, 0]
        for d in range(1, reach + 1):
            pair = padded.narrow(axis, reach - d, size) + padded.narrow(axis, reach + d, size)
            x.addcmul_(pair, weights[:, d])
        padded = x
    return _cut(x.add_(0.5))
