"""The transfer tables' metrics on class scores (n, K): accuracy, mean per class, VOC2007's 11-point mAP."""

from __future__ import annotations

import numpy as np

from moe_cl.config import ConfigError


def accuracy(scores: np.ndarray, labels: np.ndarray) -> float:
    """Share of rows whose best score is at the label, labels (n,)."""
    return float((scores.argmax(1) == labels).mean())


def per_class(scores: np.ndarray, labels: np.ndarray) -> float:
    """Mean over the classes present of each one's accuracy, labels (n,)."""
    right = scores.argmax(1) == labels
    return float(np.mean([right[labels == c].mean() for c in np.unique(labels)]))


def average_precision_11(scores: np.ndarray, present: np.ndarray) -> float:
    """VOC2007's: mean over recall 0, .1, ..., 1 of the best precision at that recall or more."""
    order = np.argsort(-scores, kind="stable")
    found = np.cumsum(present[order])
    recall = found / max(present.sum(), 1)
    precision = found / np.arange(1, len(order) + 1)
    return float(np.mean([precision[recall >= r].max(initial=0.0) for r in np.arange(11) / 10]))


def map11(scores: np.ndarray, labels: np.ndarray) -> float:
    """Mean over classes of ``average_precision_11``; labels (n, K) in {1, 0, -1}, -1 (difficult) left out."""
    kept = labels >= 0
    columns = range(labels.shape[1])
    return float(np.mean([average_precision_11(scores[kept[:, c], c], labels[kept[:, c], c]) for c in columns]))


METRICS = {"accuracy": accuracy, "per_class": per_class, "map11": map11}


def metric(name: str, scores: np.ndarray, labels: np.ndarray) -> float:
    """The metric ``name`` in [0, 1]. Raises ConfigError where it does not fit the labels."""
    if (labels.ndim == 2) != (name == "map11"):
        raise ConfigError(
            f"metric {name} does not fit labels of shape {labels.shape}; map11 is for several labels an image"
        )
    return METRICS[name](scores, labels)
