"""PIL's Gaussian blur as a separable kernel, for implementations that filter in one pass an axis."""

from __future__ import annotations

import functools
import math

import numpy as np


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
    taps = np.convolve(np.convolve(box, box), box)[: 3 * r + 3] / box.sum() ** 3
    # OpenCV's filter counts in 1/256: the running sum is rounded, so that rounding errors do not add up in the middle
    side = np.diff(np.round(np.cumsum(taps) * 256), prepend=0.0)
    return np.trim_zeros(np.concatenate((side, [256 - 2 * side.sum()], side[::-1]))) / 256
