"""The frozen features: a map, nearest neighbours, attention of the class token, corresponding regions."""

from __future__ import annotations

import math

import numpy as np
from matplotlib.lines import Line2D

from moe_cl.reports import marks
from moe_cl.reports.routing_maps import Arrays, _frame, class_name, signed
from moe_cl.reports.style import BAD, EXPERTS, GOOD, INK, Picture, figures, legend, picture, repeats

GROUP = "Embeddings"


def draw(arrays: Arrays) -> list[Picture]:
    """All figures of the feature arrays of ``explain.npz``."""
    out = []
    if "features" in arrays:
        out += [pca_map(arrays), neighbours(arrays)]
    if "attention" in arrays:
        out.append(attention(arrays))
    if "correspondence" in arrays:
        out.append(correspondence(arrays))
    return [signed(p, arrays) for p in out]


def pca(features: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(n, 2) coordinates on the two main directions of centred unit features, and their shares of the variance."""
    x = features / np.maximum(np.linalg.norm(features, axis=1, keepdims=True), 1e-12)
    x = x - x.mean(0)
    values, vectors = np.linalg.eigh(x.T @ x)
    top = vectors[:, ::-1][:, :2]
    return x @ top, values[::-1][:2] / max(values.sum(), 1e-12)


def pca_map(arrays: Arrays) -> Picture:
    """Every image a point."""
    points, share = pca(arrays["features"].astype(float))
    labels = arrays["labels"]
    drawing, axes = figures(1, 1, 4.0, 3.6)
    ax = axes[0, 0]
    present = np.unique(labels)
    order = np.random.default_rng(0).permutation(len(points))  # no class on top of all others
    colours = {int(c): EXPERTS[i % len(EXPERTS)] for i, c in enumerate(present)}
    ax.scatter(
        *points[order].T, s=7, c=[colours[int(c)] for c in labels[order]], linewidths=0, alpha=0.8, rasterized=True
    )
    ax.set_xlabel(f"first direction ({share[0]:.0%} of the variance)")
    ax.set_ylabel(f"second direction ({share[1]:.0%})")
    if len(present) <= 20:
        marker = {"marker": "o", "linestyle": "", "markersize": 5}
        handles = [Line2D([], [], color=colours[int(c)], label=class_name(arrays, int(c)), **marker) for c in present]
        legend(drawing, handles, 4, loc="outside lower center", handletextpad=0.2, columnspacing=1.0)
    caption = f"Principal components of the features of {len(points):,} images, coloured by class."
    caption += repeats(len(present), "class")
    return picture(drawing, "pca", "Map of the features", caption, group=GROUP)


def nearest(features: np.ndarray, queries: np.ndarray, count: int) -> np.ndarray:
    """(q, count) indices of the most similar other images, best first."""
    x = features / np.maximum(np.linalg.norm(features, axis=1, keepdims=True), 1e-12)
    similarity = x[queries] @ x.T
    similarity[np.arange(len(queries)), queries] = -np.inf
    return np.argsort(-similarity, axis=1)[:, :count]


def neighbours(arrays: Arrays, rows: int = 10, count: int = 6) -> Picture:
    """A query a row, its nearest neighbours beside it, framed by whether they are of its class."""
    labels, images = arrays["labels"], arrays["thumbnails"]
    classes = np.unique(labels)
    count = min(count, len(labels) - 1)
    chosen = [int(np.flatnonzero(labels == c)[0]) for c in classes[:: max(1, math.ceil(len(classes) / rows))]][:rows]
    queries = np.array(chosen)
    found = nearest(arrays["features"].astype(float), queries, count)
    drawing, axes = figures(len(queries), count + 1, 4.0, 0.62 * len(queries) + 0.2)
    for r, q in enumerate(queries):
        for c, index in enumerate([q, *found[r]]):
            ax = axes[r, c]
            ax.imshow(images[index], interpolation="nearest")
            _frame(ax)
            if c:
                for side in ax.spines.values():
                    side.set_color(GOOD if labels[index] == labels[q] else BAD)
                    side.set_linewidth(2)
        name = class_name(arrays, int(labels[q]))
        axes[r, 0].set_ylabel(name, rotation=0, ha="right", va="center", fontsize=8)
    right = float((labels[found] == labels[queries][:, None]).mean())
    caption = f"Left the query; green frames are of its class. {right:.0%} of these are."
    return picture(drawing, "neighbours", "Nearest neighbours", caption, group=GROUP)


def attention(arrays: Arrays, heads: int = 4) -> Picture:
    """What the class token of the last block looks at: mean of all heads, then single heads."""
    weights, images = arrays["attention"], arrays["attention_images"]
    heads = min(heads, weights.shape[1])
    drawing, axes = figures(len(images), heads + 2, 4.0, 0.72 * len(images) + 0.3)
    for i, image in enumerate(images):
        maps = [None, weights[i].mean(0), *weights[i][:heads]]
        for c, value in enumerate(maps):
            ax = axes[i, c]
            ax.imshow(image if value is None else _lit(image, value), interpolation="nearest")
            _frame(ax)
            if i == 0:
                ax.set_title("image" if c == 0 else "mean" if c == 1 else f"head {c - 2}", pad=3)
    caption = "Bright patches are those that the class token of the last block attends to."
    return picture(drawing, "attention", "Attention of the class token", caption, group=GROUP)


def _lit(image: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """(S, S, 3) uint8, dark where ``weights`` (g, g) are small, warm where they are large."""
    factor = max(1, math.ceil(56 / len(image)))
    image = image.repeat(factor, 0).repeat(factor, 1).astype(float)
    place = np.arange(len(image)) * len(weights) // len(image)
    share = (weights - weights.min()) / max(float(np.ptp(weights)), 1e-12)
    share = share[place][:, place][..., None]
    warm = np.array([255.0, 176.0, 32.0])
    out = image * (0.25 + 0.45 * share) + warm * 0.55 * share
    return np.clip(out, 0, 255).astype(np.uint8)


def correspondence(arrays: Arrays, links: int = 8) -> Picture:
    """The regions of view 2 that are most like regions of view 1, of the surest of them the places."""
    views, best, similarity = arrays["views"], arrays["correspondence"], arrays["similarity"]
    match = arrays.get("match", np.full(best.shape, -1))
    count, _, size = views.shape[:3]
    grid = math.isqrt(best.shape[1])
    rows, widths = math.ceil(count / 2), [1, 1, 0.05, 1, 1]
    drawing, axes = figures(rows, 5, 4.0, 0.98 * rows + 0.3, gridspec_kw={"width_ratios": widths})
    near = total = 0
    for ax in axes[:, 2]:
        ax.set_visible(False)
    for i in range(2 * rows):
        pair = axes[i // 2, [0, 1] if i % 2 == 0 else [3, 4]]
        for v, ax in enumerate(pair):
            ax.set_visible(i < count)
            _frame(ax)
            if i < count:
                ax.imshow(views[i, v], interpolation="nearest")
            if i < 2:
                ax.set_title(f"view {v + 1}", color=INK)
        if i >= count:
            continue
        right = (match[i] >= 0) & _close(best[i], match[i], grid)
        near, total = near + int(right.sum()), total + int((match[i] >= 0).sum())
        surest = np.argsort(-similarity[i], kind="stable")
        surest = surest[marks.foremost(surest, best[i][surest], grid, links)]
        marks.letters(*pair, surest, best[i][surest], right[surest], grid, size)
    caption = (
        f"A letter in view 2 is at the region most similar to that with the letter in view 1 (up to {links} an image,"
        " the surest)."
    )
    if total:
        caption += (
            " White on black: within one patch of the place that view 1 shows there; black on white: elsewhere, or"
            f" that place is outside view 2. Of {total} regions that both views show, {near / total:.0%} find theirs."
        )
    caption += marks.where(grid)
    return picture(drawing, "correspondence", "Corresponding regions", caption, group=GROUP)


def _close(p: np.ndarray, q: np.ndarray, grid: int) -> np.ndarray:
    """Are the patches p and q at most one patch apart, diagonals too?"""
    return np.maximum(abs(p // grid - q // grid), abs(p % grid - q % grid)) <= 1
