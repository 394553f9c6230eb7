"""Real photographs that installed packages carry, as uint8 RGB arrays of 375 x 500."""

from __future__ import annotations

import functools

import cv2
import numpy as np
from sklearn.datasets import load_sample_images


@functools.cache
def photos() -> list[np.ndarray]:
    """Two photographs (scikit-learn's temple and flower), shrunk and cut to 375 x 500."""
    return [
        np.ascontiguousarray(cv2.resize(im, (562, 375), interpolation=cv2.INTER_AREA)[:, 31:531])
        for im in load_sample_images().images
    ]
