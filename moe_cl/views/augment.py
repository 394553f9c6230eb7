"""The fast views: antialiased uint8 resize, OpenCV colour with fused operations, normalised into CHW float32 at once.

What it computes is PIL's arithmetic (``views.reference``), re-ordered where that changes nothing but rounding:

- brightness, contrast and saturation map a pixel x to ``a*x + g*gray(x) + t`` with three numbers a, g, t, and so does
  any sequence of them as long as no step but the last can leave [0, 255]. A factor of at most 1 cannot (it mixes with
  black, the mean gray, or the pixel's gray), so a fused group ends at a factor above 1.
- PIL's Gaussian blur is three passes of a box with fractional ends; the three are one kernel of 7 to 13 taps.
- the last step, to float and normalised, is an affine map of each channel, or a table when solarize comes before it.

One thread a process: the loader's workers are the parallelism.
"""

from __future__ import annotations

import functools
import math

import cv2
import numpy as np
import torch
from torch import Tensor

from moe_cl.views.draw import ViewParams, draw_views
from moe_cl.views.spec import ViewSpec

cv2.setNumThreads(0)

GRAY = (0.299, 0.587, 0.114)  # ITU-R 601, as PIL's convert("L")
_GRAY3 = np.array(GRAY)
_EYE = np.eye(3)
_RESIZE = {
    "bilinear": torch.ops.aten._upsample_bilinear2d_aa,
    "bicubic": torch.ops.aten._upsample_bicubic2d_aa,
}


def make_views(image: np.ndarray, spec: ViewSpec, seed: int, epoch: int, position: int) -> tuple[list[Tensor], Tensor]:
    """The V views of one decoded image, by the implementation that ``spec`` names.

    Args:
        image: (H, W, 3) uint8 RGB.
        spec: what to make.
        seed, epoch, position: the key of all random numbers; position is the sample's place in the epoch's order.

    Returns:
        V tensors (3, size, size) float32, normalised (uint8 and without colour operations for "device"), and boxes
        (V, 5) float32: x, y, w, h, flip as fractions of the image.
    """
    if spec.implementation == "reference":
        from moe_cl.views import reference  # torchvision is imported only by those who ask for it

        return reference.make_views(image, spec, seed, epoch, position)
    params = draw_views(spec, image.shape[0], image.shape[1], seed, epoch, position)
    boxes = torch.tensor([p.box for p in params])
    if spec.implementation == "device":
        return [torch.from_numpy(np.ascontiguousarray(crop(image, p).transpose(2, 0, 1))) for p in params], boxes
    return [render(image, p, spec) for p in params], boxes


def render(image: np.ndarray, params: ViewParams, spec: ViewSpec) -> Tensor:
    """One view of an (H, W, 3) uint8 image: (3, size, size) float32, normalised."""
    view, threshold = colour(crop(image, params), params.operations)
    return normalise(view, spec.mean, spec.std, threshold)


def crop(image: np.ndarray, params: ViewParams) -> np.ndarray:
    """The resized and mirrored crop, (size, size, 3) uint8, of an (H, W, 3) uint8 image."""
    p, size = params, params.size
    view = image[p.top : p.top + p.height, p.left : p.left + p.width]
    if p.height != size or p.width != size:
        if p.interpolation == "bilinear" and p.height <= size and p.width <= size:
            view = cv2.resize(view, (size, size), interpolation=cv2.INTER_LINEAR)  # enlarging needs no antialiasing
        else:
            x = torch.from_numpy(view).permute(2, 0, 1).unsqueeze(0)
            x = _RESIZE[p.interpolation](x, (size, size), False)  # PIL's filter, in SIMD
            view = x[0].permute(1, 2, 0).numpy()
    return cv2.flip(view, 1) if p.flip else view


def colour(view: np.ndarray, operations: tuple[tuple[str, float], ...]) -> tuple[np.ndarray, int]:
    """Apply ``operations`` to a (h, w, 3) uint8 view.

    Returns:
        The view, (h, w, 3) or (h, w) once it is gray, and the threshold of a solarize at the very end, which is left to
        ``normalise`` (256 = none).
    """
    pending = _Affine(view)
    for i, (name, value) in enumerate(operations):
        if name in _MIX:
            pending.add(name, value)
            continue
        view = pending.flush()
        if name == "hue":
            view = _hue(view, value)
        elif name == "gray":
            view = cv2.cvtColor(view, cv2.COLOR_RGB2GRAY) if view.ndim == 3 else view
        elif name == "blur":
            kernel = blur_kernel(value)
            view = cv2.sepFilter2D(view, -1, kernel, kernel, borderType=cv2.BORDER_REPLICATE)
        elif name == "solarize":
            if i == len(operations) - 1:
                return view, int(value)
            view = cv2.LUT(view, _solarized(int(value)).astype(np.uint8))
        else:
            raise ValueError(f"no operation is called {name!r}")
        pending = _Affine(view)
    return pending.flush(), 256


_MIX = ("brightness", "contrast", "saturation")


class _Affine:
    """A view with a fused group of brightness, contrast and saturation waiting: a*x + g*gray(x) + t."""

    def __init__(self, view: np.ndarray):
        self.view = view
        self.a, self.g, self.t, self.last = 1.0, 0.0, 0.0, 0.0
        self._mean: float | None = None

    def add(self, name: str, factor: float) -> None:
        """One more operation; the group so far is applied first if its last step could leave [0, 255]."""
        if self.last > 1.0:
            self.view = self.flush()
            self.__init__(self.view)
        if name == "brightness":
            self.a, self.g, self.t = factor * self.a, factor * self.g, factor * self.t
        elif name == "contrast":
            mean = int((self.a + self.g) * self.mean() + self.t + 0.5)
            self.a, self.g, self.t = factor * self.a, factor * self.g, factor * self.t + (1.0 - factor) * mean
        else:
            self.a, self.g = factor * self.a, factor * self.g + (1.0 - factor) * (self.a + self.g)
        self.t -= 0.5  # PIL cuts the fraction off at every operation
        self.last = factor

    def mean(self) -> float:
        """Mean gray of the view before the group."""
        if self._mean is None:
            r, g, b, _ = cv2.mean(self.view)
            self._mean = GRAY[0] * r + GRAY[1] * g + GRAY[2] * b if self.view.ndim == 3 else r
        return self._mean

    def flush(self) -> np.ndarray:
        """The view with the group applied, rounded and clipped once."""
        if not self.last and self.a == 1.0:
            return self.view
        if self.view.ndim == 2:
            return cv2.addWeighted(self.view, self.a + self.g, self.view, 0.0, self.t)
        matrix = np.empty((3, 4))
        matrix[:, :3] = self.a * _EYE + self.g * _GRAY3
        matrix[:, 3] = self.t
        return cv2.transform(self.view, matrix)


def _hue(view: np.ndarray, turns: float) -> np.ndarray:
    """Shift of the hue in 8-bit HSV, in steps of 1/255 turn as torchvision does."""
    shift = int(turns * 255)
    if shift == 0 or view.ndim == 2:
        return view
    hsv = cv2.cvtColor(view, cv2.COLOR_RGB2HSV_FULL)
    hue = hsv[..., 0]
    hue += np.uint8(shift & 255)  # wraps around
    return cv2.cvtColor(hsv, cv2.COLOR_HSV2RGB_FULL, dst=hsv)


def blur_kernel(sigma: float) -> np.ndarray:
    """PIL's Gaussian blur as one symmetric kernel (taps,), its values multiples of 1/256 with sum 1.

    PIL runs three passes of a box of 2r + 1 ones with two ends of weight w, chosen so that the variance of the three is
    sigma^2 (Gwosdek et al., "Theoretical foundations of Gaussian convolution by extended box filtering", 2011).
    """
    return _kernel(round(sigma * 512))


@functools.lru_cache(maxsize=4096)
def _kernel(step: int) -> np.ndarray:
    variance = (step / 512) ** 2 / 3.0
    r = int((math.sqrt(12.0 * variance + 1.0) - 1.0) / 2.0)
    w = (2 * r + 1) * (r * (r + 1) - 3.0 * variance) / (6.0 * (variance - (r + 1) ** 2))
    box = np.ones(2 * r + 3)
    box[0] = box[-1] = w
    taps = np.round(np.convolve(np.convolve(box, box), box) / box.sum() ** 3 * 256)  # OpenCV's filter counts in 1/256
    taps[len(taps) // 2] += 256 - taps.sum()
    return np.trim_zeros(taps) / 256


def _solarized(threshold: int) -> np.ndarray:
    """Table of 256 values: v below the threshold, 255 - v at or above it."""
    values = np.arange(256)
    return np.where(values < threshold, values, 255 - values)


@functools.lru_cache(maxsize=64)
def _tables(mean: tuple[float, ...], std: tuple[float, ...], threshold: int) -> list[np.ndarray]:
    values = _solarized(threshold) / 255.0
    return [((values - m) / s).astype(np.float32) for m, s in zip(mean, std, strict=True)]


def normalise(view: np.ndarray, mean: tuple[float, ...], std: tuple[float, ...], threshold: int = 256) -> Tensor:
    """(h, w, 3) or gray (h, w) uint8 to (3, h, w) float32: solarized above ``threshold``, (x/255 - mean) / std."""
    out = torch.empty((3, *view.shape[:2]))
    planes = cv2.split(view) if view.ndim == 3 else (view,) * 3
    for plane, target, m, s, table in zip(planes, out.numpy(), mean, std, _tables(mean, std, threshold), strict=True):
        if threshold < 256:
            cv2.LUT(plane, table, dst=target)
        else:
            cv2.addWeighted(plane, 1.0 / (255.0 * s), plane, 0.0, -m / s, dst=target, dtype=cv2.CV_32F)
    return out
