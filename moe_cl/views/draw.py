"""All parameters of a view, drawn once from its own counter-based generator; the implementations only obey them.

The distributions are torchvision's (``RandomResizedCrop.get_params``, ``ColorJitter.get_params``). Every parameter
reads its own fixed slot of one block of uniforms, so switching one operation off leaves the draws of the others as they
were, and colour does not depend on the size of the image.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from moe_cl import rng
from moe_cl.views.spec import CropSpec, ViewSpec

TRIES = 10
AREA, RATIO, TOP, LEFT, FLIP, JITTER, FACTOR, ORDER, GRAY, BLUR, SIGMA, SOLARIZE = (
    0, 10, 20, 21, 22, 23, 24, 28, 32, 33, 34, 35,
)  # fmt: skip
SLOTS = 36
COLOURS = ("brightness", "contrast", "saturation", "hue")


@dataclass(slots=True)
class ViewParams:
    """One view of one image as plain numbers.

    size: side of the view. interpolation: of the resize. top, left, height, width: the crop, pixels of an image of
    image_height x image_width. flip: mirrored. operations: (name, value) in the order they are applied, only those that
    change something: brightness, contrast, saturation (factor), hue (turns, -0.5 to 0.5), gray (1), blur (sigma,
    pixels), solarize (threshold).
    """

    size: int
    interpolation: str
    top: int
    left: int
    height: int
    width: int
    image_height: int
    image_width: int
    flip: bool
    operations: tuple[tuple[str, float], ...]

    @property
    def box(self) -> tuple[float, float, float, float, float]:
        """x, y, w, h as fractions of the original image, and flip (crmoe.md 1.5)."""
        w, h = self.image_width, self.image_height
        return self.left / w, self.top / h, self.width / w, self.height / h, float(self.flip)


def draw_views(spec: ViewSpec, height: int, width: int, seed: int, epoch: int, position: int) -> list[ViewParams]:
    """The parameters of all V views of the sample at ``position`` of ``epoch``, for an image of height x width."""
    uniforms = rng.uniforms(seed, epoch, position, spec.views, SLOTS).tolist()
    return [draw(crop, u, height, width) for crop, u in zip(spec.crops, uniforms, strict=True)]


def draw(crop: CropSpec, u: Sequence[float], height: int, width: int) -> ViewParams:
    """One view's parameters from SLOTS numbers in [0, 1)."""
    top, left, h, w = _box(crop, u, height, width)
    flip = u[FLIP] < crop.flip
    return ViewParams(crop.size, crop.interpolation, top, left, h, w, height, width, flip, draw_operations(crop, u))


def _box(crop: CropSpec, u: Sequence[float], height: int, width: int) -> tuple[int, int, int, int]:
    (smallest, largest), (narrow, wide) = crop.scale, crop.ratio
    low, high = math.log(narrow), math.log(wide)
    for i in range(TRIES):
        area = height * width * (smallest + (largest - smallest) * u[AREA + i])
        aspect = math.exp(low + (high - low) * u[RATIO + i])
        w, h = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < w <= width and 0 < h <= height:
            return int(u[TOP] * (height - h + 1)), int(u[LEFT] * (width - w + 1)), h, w
    h, w = height, width  # ten misses: the largest centre crop within the ratios
    if width / height < narrow:
        h = round(width / narrow)
    elif width / height > wide:
        w = round(height * wide)
    return (height - h) // 2, (width - w) // 2, h, w


def draw_operations(crop: CropSpec, u: Sequence[float]) -> tuple[tuple[str, float], ...]:
    """The colour, blur and solarize operations alone, ``ViewParams.operations``; they do not depend on the image."""
    out: list[tuple[str, float]] = []
    gray = False  # saturation and hue leave a gray image as it is
    for stage in crop.order:
        if stage == "jitter" and u[JITTER] < crop.jitter:
            for i in sorted(range(4), key=lambda i: u[ORDER + i]):  # a uniformly random order of the four
                name, spread, v = COLOURS[i], getattr(crop, COLOURS[i]), u[FACTOR + i]
                low = -spread if name == "hue" else max(0.0, 1.0 - spread)
                high = spread if name == "hue" else 1.0 + spread
                if spread and not (gray and i >= 2):
                    out.append((name, low + (high - low) * v))
        elif stage == "gray" and u[GRAY] < crop.gray:
            gray = True
            out.append(("gray", 1.0))
        elif stage == "blur" and u[BLUR] < crop.blur:
            out.append(("blur", crop.sigma[0] + (crop.sigma[1] - crop.sigma[0]) * u[SIGMA]))
        elif stage == "solarize" and u[SOLARIZE] < crop.solarize:
            out.append(("solarize", float(crop.threshold)))
    return tuple(out)
