"""Two views of an image whose places are known: the image, and its mirror with other colours (esvit.md section 2).

A patch (r, c) of a g x g grid in the first lies at (r, g-1-c) in the second, so what an encoder does with the two can
be compared place by place.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from moe_cl.evals.sets import View
from moe_cl.views.augment import render
from moe_cl.views.draw import draw_views
from moe_cl.views.spec import NORMALIZE, CropSpec, ViewSpec, eval_view


def mirrored(size: int, normalize: str, seed: int = 0, interpolation: str = "bilinear", gray: float = 1.0) -> View:
    """View function -> (2, C, S, S): the plain evaluation view, and its mirror, jittered (p .8) and greyed (p ``gray``;
    EsViT's analysis: 1)."""
    crop = CropSpec(
        size=size, scale=[1.0, 1.0], ratio=[1.0, 1.0], flip=1.0, saturation=0.2, gray=gray, order=["jitter", "gray"]
    )
    spec = ViewSpec("mirror", (crop,), 1, *NORMALIZE[normalize])
    mean, std = (torch.tensor(v)[:, None, None] for v in NORMALIZE[normalize])

    def view(image: np.ndarray, sample_id: int) -> Tensor:
        plain = eval_view(image, size, normalize, interpolation)
        pixels = ((plain * std + mean) * 255.0).round().clamp(0, 255).byte().permute(1, 2, 0).contiguous().numpy()
        (params,) = draw_views(spec, size, size, seed, 0, sample_id)
        return torch.stack([plain, render(pixels, params, spec)])

    return view


def mirror_index(grid: int) -> Tensor:
    """(g*g,) token in the second view that shows what token t shows in the first, row-major."""
    return torch.arange(grid * grid).view(grid, grid).flip(1).flatten()
