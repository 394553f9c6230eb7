"""What views are made of a sample (``ViewSpec``), and the batch they arrive in (``Batch``).

Shapes: V views a sample, B samples, V_r views of resolution r, C = 3 channels, H_r = W_r = the resolution.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from moe_cl.config import ConfigError, ViewsConfig, build

NORMALIZE = {
    "imagenet": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
    "half": ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5)),
}
STAGES = ("jitter", "gray", "blur", "solarize")


@dataclass
class Batch:
    """B samples on this rank, V views each, grouped by resolution r.

    views: one tensor (V_r*B, C, H_r, W_r) a resolution, view-major (all samples of view 0, then of view 1 ...),
    global views first. boxes: (V, B, 5) x, y, w, h, flip as fractions of the original image (crmoe.md 1.5).
    sample_ids: (B,) int64. labels: (B,) int64, -1 where unknown. positions: (B,) int64, place in the epoch's order.
    keys: (V*B,) int64 counter-based random keys, view-major, or None (router noise, drop-path).
    """

    views: list[Tensor]
    boxes: Tensor
    sample_ids: Tensor
    labels: Tensor
    positions: Tensor
    keys: Tensor | None = None


@dataclass(frozen=True)
class CropSpec:
    """How one view is drawn: the ranges and probabilities of torchvision's transforms, by the names used there.

    size: output side, pixels. scale: area fraction of the crop, ratio: its aspect (log-uniform). flip, gray, blur,
    solarize: probabilities; jitter: probability of the four colour changes below, whose factors are drawn from
    [max(0, 1 - v), 1 + v] (hue from [-hue, hue]). sigma: range of the blur's standard deviation, pixels of the view.
    threshold: solarize inverts values at or above it. order: stages as they are applied; one left out is never done.
    """

    size: int = 224
    scale: list[float] = dataclasses.field(default_factory=lambda: [0.08, 1.0])
    ratio: list[float] = dataclasses.field(default_factory=lambda: [3 / 4, 4 / 3])
    interpolation: Literal["bilinear", "bicubic"] = "bilinear"
    flip: float = 0.5
    jitter: float = 0.8
    brightness: float = 0.4
    contrast: float = 0.4
    saturation: float = 0.4
    hue: float = 0.1
    gray: float = 0.2
    blur: float = 0.0
    sigma: list[float] = dataclasses.field(default_factory=lambda: [0.1, 2.0])
    solarize: float = 0.0
    threshold: int = 128
    order: list[str] = dataclasses.field(default_factory=lambda: list(STAGES))

    def __post_init__(self) -> None:
        """Raises ConfigError for values no view can be drawn from."""
        for name in ("flip", "jitter", "gray", "blur", "solarize"):
            if not 0.0 <= getattr(self, name) <= 1.0:
                raise ConfigError(f"views: {name} is a probability between 0 and 1, found {getattr(self, name)}")
        for name in ("brightness", "contrast", "saturation"):
            if getattr(self, name) < 0.0:
                raise ConfigError(f"views: {name} cannot be negative, found {getattr(self, name)}")
        if not 0.0 <= self.hue <= 0.5:
            raise ConfigError(f"views: hue lies between 0 and 0.5, found {self.hue}")
        if not 0 <= self.threshold <= 256:
            raise ConfigError(f"views: threshold lies between 0 and 256, found {self.threshold}")
        for name, top in (("scale", 1.0), ("ratio", float("inf")), ("sigma", float("inf"))):
            pair = getattr(self, name)
            if len(pair) != 2 or not 0.0 < pair[0] <= pair[1] <= top:
                raise ConfigError(f"views: {name} is a pair [smallest, largest] above 0, found {pair}")
        if self.size < 1:
            raise ConfigError(f"views: a view is at least 1 pixel wide, found size {self.size}")
        if len(set(self.order)) != len(self.order) or set(self.order) - set(STAGES):
            raise ConfigError(f"views: order lists {', '.join(STAGES)} once each at most, found {self.order}")


@dataclass(frozen=True)
class ViewSpec:
    """All views of a sample, global views first; equal sizes follow each other.

    crops: one a view. global_views: how many of them are global. mean, std: of the normalisation, for values in [0, 1].
    implementation: who makes the views: ``fast`` (OpenCV), ``reference`` (torchvision on PIL), ``device`` (the CPU
    crops, ``views.device.finish`` does the rest on the batch).
    """

    name: str
    crops: tuple[CropSpec, ...]
    global_views: int
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    implementation: str = "fast"

    @property
    def views(self) -> int:
        """V, views a sample."""
        return len(self.crops)

    @property
    def resolutions(self) -> tuple[tuple[int, int], ...]:
        """(side in pixels, views of it) for each resolution, in the order of ``Batch.views``."""
        return tuple((size, len(list(group))) for size, group in itertools.groupby(c.size for c in self.crops))


def _moco_v1(cfg: ViewsConfig) -> tuple[list[CropSpec], int]:
    crop = CropSpec(cfg.size, [_crop_min(cfg, 0.2), 1.0], jitter=1.0, hue=0.4, order=["gray", "jitter"])
    return [crop] * 2, 2  # moco_jcl.md 1.1: grayscale comes before the jitter, which is always on


def _moco_v2(cfg: ViewsConfig) -> tuple[list[CropSpec], int]:
    return [CropSpec(cfg.size, [_crop_min(cfg, 0.2), 1.0], blur=0.5)] * 2, 2


def _moco_v3(cfg: ViewsConfig) -> tuple[list[CropSpec], int]:
    first = CropSpec(cfg.size, [_crop_min(cfg, 0.08), 1.0], saturation=0.2, blur=1.0)
    return [first, dataclasses.replace(first, blur=0.1, solarize=0.2)], 2


def _simclr(cfg: ViewsConfig) -> tuple[list[CropSpec], int]:
    strong = {"brightness": 0.8, "contrast": 0.8, "saturation": 0.8, "hue": 0.2}
    return [CropSpec(cfg.size, [_crop_min(cfg, 0.08), 1.0], blur=0.5, **strong)] * 2, 2


def _jcl(cfg: ViewsConfig) -> tuple[list[CropSpec], int]:
    views = 1 + (5 if cfg.keys is None else cfg.keys)  # M = 5 in the paper
    if views < 2:
        raise ConfigError(f"views.keys: JCL needs at least 1 key view, found {cfg.keys}")
    return _moco_v2(cfg)[0][:1] * views, views


def _esvit(cfg: ViewsConfig) -> tuple[list[CropSpec], int]:
    first = CropSpec(
        cfg.size, [_crop_min(cfg, 0.4), 1.0], interpolation="bicubic", saturation=0.2, blur=1.0, order=list(STAGES)
    )
    crops = [first, dataclasses.replace(first, blur=0.1, solarize=0.2)]
    sizes = cfg.local_size if isinstance(cfg.local_size, list) else [cfg.local_size]
    number = 8 if cfg.local_number is None else cfg.local_number
    numbers = number if isinstance(number, list) else [number] * len(sizes)
    if len(numbers) != len(sizes) or min(numbers, default=0) < 0:
        raise ConfigError(f"views.local_number: give one number a local size {sizes}, found {number}")
    for size, n in zip(sizes, numbers, strict=True):
        crops += [dataclasses.replace(first, size=size, scale=[0.05, first.scale[0]], blur=0.5)] * n
    return crops, 2


_SPECS = {
    "mocov1": _moco_v1,
    "mocov2": _moco_v2,
    "mocov3": _moco_v3,
    "byol": _moco_v3,
    "crmoe": _moco_v3,
    "simclr": _simclr,
    "jcl": _jcl,
    "esvit": _esvit,
    "dino": _esvit,
}


def _crop_min(cfg: ViewsConfig, default: float) -> float:
    return default if cfg.crop_min is None else cfg.crop_min


def build_spec(cfg: ViewsConfig) -> ViewSpec:
    """The views that a recipe asks for: a named spec with the recipe's sizes and overrides.

    ``cfg.overrides`` changes fields of ``CropSpec`` in every view; a list of V values for a single-valued field gives
    one a view (``{blur: [1.0, 0.1]}``). Images without colour need no hue and saturation: ``{hue: 0, saturation: 0,
    gray: 0}`` makes them free; sigma is in pixels of the view, so small views want a smaller one or ``{blur: 0}``.

    Raises:
        ConfigError: unknown spec or field, or a value no view can be drawn from.
    """
    if cfg.spec not in _SPECS:
        raise ConfigError(f"views.spec: unknown {cfg.spec!r}; it is one of {', '.join(_SPECS)}")
    if cfg.local_number not in (None, 0) and cfg.spec not in ("esvit", "dino"):
        raise ConfigError(f"views.local_number: {cfg.spec} has no local views; remove it or use spec esvit")
    if cfg.keys is not None and cfg.spec != "jcl":
        raise ConfigError(f"views.keys: {cfg.spec} has no key views to count; remove it or use spec jcl")
    if cfg.normalize not in NORMALIZE:
        raise ConfigError(f"views.normalize: unknown {cfg.normalize!r}; it is one of {', '.join(NORMALIZE)}")
    crops, global_views = _SPECS[cfg.spec](cfg)
    crops = [_override(crop, cfg.overrides, view, len(crops)) for view, crop in enumerate(crops)]
    mean, std = NORMALIZE[cfg.normalize]
    return ViewSpec(cfg.spec, tuple(crops), global_views, mean, std, cfg.implementation)


def _override(crop: CropSpec, overrides: dict[str, Any], view: int, views: int) -> CropSpec:
    if not overrides:
        return crop
    values = dataclasses.asdict(crop)
    for key, value in overrides.items():
        if isinstance(value, list) and key in values and not isinstance(values[key], list):
            if len(value) != views:
                raise ConfigError(f"views.overrides.{key}: give one value or {views} (one a view), found {len(value)}")
            value = value[view]
        values[key] = value
    return build(CropSpec, values, "views.overrides.")


def collate(samples: Sequence[tuple[Sequence[Tensor], Tensor]]) -> tuple[list[Tensor], Tensor]:
    """What ``make_views`` gave for B samples as ``Batch.views`` and ``Batch.boxes``.

    Args:
        samples: (views, boxes (V, 5)) of each sample, every sample with the same V and sizes.

    Returns:
        One tensor (V_r*B, C, H_r, W_r) a resolution, view-major, and boxes (V, B, 5).
    """
    first = samples[0][0]
    out, view = [], 0
    for shape, group in itertools.groupby(v.shape for v in first):
        count = len(list(group))
        rows = torch.empty((count, len(samples), *shape), dtype=first[view].dtype)
        for b, (views, _) in enumerate(samples):
            for v in range(count):
                rows[v, b] = views[view + v]
        out.append(rows.flatten(0, 1))
        view += count
    return out, torch.stack([boxes for _, boxes in samples], dim=1)


def eval_view(image: np.ndarray, size: int, normalize: str = "imagenet", interpolation: str = "bilinear") -> Tensor:
    """The one view of evaluation: shorter side to size*256/224 (antialiased), centre crop, normalised.

    Args:
        image: (H, W, 3) uint8 RGB; one that is ``size`` x ``size`` already is used as it is.
        size: side of the result, pixels.
        normalize: "imagenet" or "half".
        interpolation: "bilinear" (MoCo's protocols) or "bicubic" (EsViT's, esvit.md 3).

    Returns:
        (3, size, size) float32.
    """
    mean, std = (torch.tensor(v)[:, None, None] for v in NORMALIZE[normalize])
    image = image if image.flags.writeable else image.copy()  # torch takes no read-only arrays
    x = torch.from_numpy(np.ascontiguousarray(image)).permute(2, 0, 1)
    height, width = x.shape[1:]
    if (height, width) != (size, size):
        short = round(size * 256 / 224)
        # torchvision's Resize truncates the longer side
        new = (int(short * height / width), short) if height > width else (short, int(short * width / height))
        x = torch.nn.functional.interpolate(x[None], new, mode=interpolation, antialias=True)[0]
        top, left = round((new[0] - size) / 2), round((new[1] - size) / 2)
        x = x[:, top : top + size, left : left + size]
    return (x / 255.0).sub_(mean).div_(std)
