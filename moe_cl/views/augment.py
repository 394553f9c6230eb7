"""The fast views: antialiased uint8 resize, OpenCV colour with fused operations, normalised into CHW float32 at once.

What it computes is PIL's arithmetic (``views.reference``), re-ordered where that changes nothing but rounding:

- brightness, contrast and saturation map a pixel x to ``a*x + g*gray(x) + t`` with three numbers a, g, t, and so does
  any sequence of them as long as no step but the last can leave [0, 255]. A factor of at most 1 cannot (it mixes with
  black, the mean gray, or the pixel's gray), so a fused group ends at a factor above 1.
- PIL's Gaussian blur is three passes of a box with fractional ends; the three are one kernel of 7 to 13 taps.
- solarizing at 128 is the smaller of x and 255 - x.

One thread a process: the loader's workers are the parallelism.
"""

from __future__ import annotations

import functools

import cv2
import numpy as np
import torch
from torch import Tensor

from moe_cl.views.blur import blur_kernel
from moe_cl.views.draw import ViewParams, draw_views
from moe_cl.views.spec import ViewSpec

cv2.setNumThreads(0)

GRAY = (0.299, 0.587, 0.114)  # ITU-R 601, as PIL's convert("L")
_GRAY3 = np.array(GRAY)
_EYE = np.eye(3)
_RESIZE = {
    "bilinear": torch.ops.aten._upsample_bilinear2d_aa.out,
    "bicubic": torch.ops.aten._upsample_bicubic2d_aa.out,
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
    boxes = torch.from_numpy(np.array([p.box for p in params], np.float32))
    if spec.implementation == "device":
        return [torch.from_numpy(_planes(crop(image, p))) for p in params], boxes
    return [render(image, p, spec) for p in params], boxes


def render(image: np.ndarray, params: ViewParams, spec: ViewSpec) -> Tensor:
    """One view of an (H, W, 3) uint8 image: (3, size, size) float32, normalised."""
    return normalise(colour(crop(image, params), params.operations), spec.mean, spec.std)


def crop(image: np.ndarray, params: ViewParams) -> np.ndarray:
    """The resized and mirrored crop, (size, size, 3) uint8, of an (H, W, 3) uint8 image."""
    p, size = params, params.size
    view = image[p.top : p.top + p.height, p.left : p.left + p.width]
    if p.height != size or p.width != size:
        if p.interpolation == "bilinear" and p.height <= size and p.width <= size:
            view = cv2.resize(view, (size, size), interpolation=cv2.INTER_LINEAR)  # enlarging needs no antialiasing
        else:  # PIL's filter in SIMD; a channels-last result has to be asked for
            view = view if view.flags.writeable else view.copy()  # torch takes no read-only arrays
            out = np.empty((size, size, 3), np.uint8)
            source, target = (torch.from_numpy(a[None]).permute(0, 3, 1, 2) for a in (view, out))
            _RESIZE[p.interpolation](source, (size, size), False, None, None, out=target)
            view = out
    return cv2.flip(view, 1) if p.flip else view


def colour(view: np.ndarray, operations: tuple[tuple[str, float], ...]) -> np.ndarray:
    """Apply ``operations`` to a (h, w, 3) uint8 view; gives (h, w, 3), or (h, w) once it is gray."""
    pending = _Affine(view)
    for name, value in operations:
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
            view = _solarize(view, int(value))
        else:
            raise ValueError(f"no operation is called {name!r}")
        pending = _Affine(view)
    return pending.flush()


_MIX = ("brightness", "contrast", "saturation")


class _Affine:
    """A view with a fused group of brightness, contrast and saturation waiting: a*x + g*gray(x) + t."""

    def __init__(self, view: np.ndarray):
        self.view = view
        self.a, self.g, self.t = 1.0, 0.0, 0.0
        self.last: float | None = None
        self._mean: float | None = None

    def add(self, name: str, factor: float) -> None:
        """One more operation; the group so far is applied first if its last step could leave [0, 255]."""
        if factor == 1.0:
            return
        if self.last is not None and self.last > 1.0:
            self.__init__(self.flush())
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
        if self.last is None:
            return self.view
        shift = self.t + 0.004  # so that rounding takes an exact integer to itself, as cutting off does
        if self.view.ndim == 2:
            return cv2.addWeighted(self.view, self.a + self.g, self.view, 0.0, shift)
        matrix = np.empty((3, 4))
        matrix[:, :3] = self.a * _EYE + self.g * _GRAY3
        matrix[:, 3] = shift
        return cv2.transform(self.view, matrix)


def _hue(view: np.ndarray, turns: float) -> np.ndarray:
    """Shift of the hue in 8-bit HSV, in steps of 1/255 turn as torchvision does."""
    shift = int(turns * 255)
    if shift == 0 or view.ndim == 2:
        return view
    hsv = cv2.cvtColor(view, cv2.COLOR_RGB2HSV_FULL)
    row = np.zeros(view.shape[1] * 3, np.uint8)
    row[::3] = shift & 255
    flat = hsv.reshape(len(hsv), -1)
    np.add(flat, row, out=flat)  # the hue wraps around, saturation and value get 0
    return cv2.cvtColor(hsv, cv2.COLOR_HSV2RGB_FULL)


def _solarize(view: np.ndarray, threshold: int) -> np.ndarray:
    if threshold == 128:
        return cv2.min(view, cv2.bitwise_not(view))
    values = np.arange(256)
    return cv2.LUT(view, np.where(values < threshold, values, 255 - values).astype(np.uint8))


def normalise(view: np.ndarray, mean: tuple[float, ...], std: tuple[float, ...]) -> Tensor:
    """(h, w, 3) or gray (h, w) uint8 to (3, h, w) float32: (x/255 - mean) / std."""
    scale, shift = _scale_shift(mean, std)
    planes = _planes(view) if view.ndim == 3 else np.broadcast_to(view, (3, *view.shape))
    out = planes.astype(np.float32, order="C")
    out *= scale
    out += shift
    return torch.from_numpy(out)


def _planes(view: np.ndarray) -> np.ndarray:
    """(h, w, 3) to (3, h, w)."""
    planes = np.empty((3, *view.shape[:2]), np.uint8)
    cv2.split(view, list(planes))
    return planes


@functools.cache
def _scale_shift(mean: tuple[float, ...], std: tuple[float, ...]) -> tuple[np.ndarray, np.ndarray]:
    m, s = (np.array(v)[:, None, None] for v in (mean, std))
    return (1.0 / (255.0 * s)).astype(np.float32), (-m / s).astype(np.float32)
