"""Letters that mark corresponding patches in two views. Lines would lie on each other where the views are aligned."""

from __future__ import annotations

import string
from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.patches import Rectangle

NEED = 0.2  # of the image's side: letters nearer than this would cover each other
MOST = 16  # letters an image
COARSE = 5  # patches a side up to which a letter has room inside its patch; in a finer grid it stands beside it


def where(grid: int) -> str:
    """What a caption says of a fine grid's letters."""
    return "" if grid <= COARSE else " A letter stands beside its framed patch."


def centres(patches: np.ndarray, grid: int) -> np.ndarray:
    """(n,) patch numbers -> (n, 2) x, y of their middles, as shares of the image's side."""
    return (np.stack([patches % grid, patches // grid], -1) + 0.5) / grid


def spread(first: np.ndarray, second: np.ndarray, grid: int) -> np.ndarray:
    """Indices of pairs (first[i], second[i]) of patches, ascending: as many as can have letters that do not
    cover each other, far apart in both images; of a fine grid 9, else ``MOST``, at most."""
    if not len(first):
        return np.zeros(0, dtype=int)
    one, two = centres(first, grid), centres(second, grid)
    kept, distance = [0], np.full(len(first), np.inf)
    while True:
        last = kept[-1]
        distance = np.minimum(distance, np.minimum(np.abs(one - one[last]).max(-1), np.abs(two - two[last]).max(-1)))
        best = int(distance.argmax())
        if distance[best] < NEED or len(kept) == (MOST if grid <= COARSE else 9):
            return np.sort(kept)
        kept.append(best)


def foremost(first: np.ndarray, second: np.ndarray, grid: int, most: int) -> np.ndarray:
    """The same, but the earlier pairs preferred, and pairs that share their second patch may both stay."""
    kept: list[int] = []
    one, two = centres(first, grid), centres(second, grid)
    for i in range(len(first)):
        far = (np.abs(two[kept] - two[i]).max(-1) >= NEED) | (second[kept] == second[i])
        if len(kept) < most and far.all() and (np.abs(one[kept] - one[i]).max(-1) >= NEED).all():
            kept.append(i)
    return np.array(kept, dtype=int)


def letters(
    left: Any, right: Any, first: np.ndarray, second: np.ndarray, strong: Sequence[bool], grid: int, size: float
) -> None:
    """Write a, b ... on the patches ``first`` of the axes ``left`` and on ``second`` of ``right``.

    Args:
        strong: white on black; else black on white. size: the images' side in data units.
    """
    order = np.argsort(first, kind="stable")  # a, b ... in reading order of the left image
    places: dict[tuple[int, int], list[tuple[str, bool]]] = {}
    for letter, i in zip(string.ascii_lowercase, order, strict=False):
        for side, patch in enumerate((first[i], second[i])):
            places.setdefault((side, int(patch)), []).append((letter, bool(strong[i])))
    for (side, patch), found in places.items():
        text = "".join(letter for letter, _ in found)
        _letter((left, right)[side], text, patch, all(ok for _, ok in found), grid, size)


def _letter(axes: Any, text: str, patch: int, strong: bool, grid: int, size: float) -> None:
    x, y = centres(np.array([patch]), grid)[0]
    ink, ground = ("#ffffff", "#000000") if strong else ("#000000", "#ffffff")
    align = "center"
    if grid > COARSE:
        corner, side = ((x - 0.5 / grid) * size - 0.5, (y - 0.5 / grid) * size - 0.5), size / grid
        for colour, width in ((ink, 2.0), (ground, 1.0)):
            axes.add_patch(Rectangle(corner, side, side, fill=False, edgecolor=colour, linewidth=width))
        align = "left" if x < 0.7 else "right"
        x += (0.5 / grid + 0.04) * (1 if align == "left" else -1)
        y = min(max(y, 0.09), 0.91)
    axes.text(
        x * size - 0.5, y * size - 0.5, text, ha=align, va="center_baseline", fontsize=7.5, color=ink,
        bbox={"boxstyle": "round,pad=0.2", "facecolor": ground, "edgecolor": ink, "linewidth": 0.5},
    )  # fmt: skip
