"""What goes to which expert: classes, patch positions, and the patches of two views of an image."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
from matplotlib.colors import to_rgb
from matplotlib.patches import Patch

from moe_cl.reports import marks
from moe_cl.reports.arrays import source
from moe_cl.reports.router import bar
from moe_cl.reports.style import AXIS, EXPERTS, INK, Picture, figures, heat, legend, picture, repeats

GROUP = "Router, looked into"
CLASSES = 40  # rows of the map of classes
Arrays = dict[str, np.ndarray]


def draw(arrays: Arrays) -> list[Picture]:
    """All figures of the routing arrays of ``explain.npz``."""
    layers = sorted((k.split("/")[1] for k in arrays if k.startswith("routing/L")), key=lambda name: int(name[1:]))
    chosen = layers if len(layers) <= 3 else [layers[0], layers[len(layers) // 2], layers[-1]]
    out = [patches(arrays, layer) for layer in chosen if f"view_routing/{layer}" in arrays]
    out += [classes(arrays, layer) for layer in chosen]
    out += [p for layer in chosen for p in positions(arrays, layer)]
    return [signed(p, arrays) for p in out]


def signed(drawn: Picture, arrays: Arrays) -> Picture:
    """The picture with whose weights and which images it shows at the end of its caption."""
    return replace(drawn, caption=f"{drawn.caption} {source(arrays)}".strip())


def class_name(arrays: Arrays, label: int) -> str:
    """The name of a class, else its number; the end of a long name is left out."""
    names = arrays.get("class_names", ())
    name = str(names[label]) if 0 <= label < len(names) else str(label)
    return name if len(name) <= 20 else name[:19].rstrip(" ,") + "\u2026"


def class_table(arrays: Arrays, layer: str) -> tuple[np.ndarray, np.ndarray]:
    """(classes present (c,), share of each class's token-expert pairs by expert (c, E))."""
    routing, labels = arrays[f"routing/{layer}"], arrays["labels"]
    experts = int(arrays[f"experts/{layer}"])
    present = np.unique(labels)
    counts = np.stack([np.bincount(routing[labels == c].reshape(-1), minlength=experts) for c in present])
    return present, counts / counts.sum(1, keepdims=True)


def classes(arrays: Arrays, layer: str) -> Picture:
    """Classes down, experts across; of very many classes some, evenly spread."""
    present, table = class_table(arrays, layer)
    every = len(present)
    rows = np.linspace(0, every - 1, min(CLASSES, every)).round().astype(int)
    present, table = present[rows], table[rows]
    experts = table.shape[1]
    drawing, axes = figures(1, 1, 4.0, 1.0 + 0.19 * len(present))
    ax = axes[0, 0]
    high = math.ceil(20 * max(2.0 / experts, float(np.quantile(table, 0.98))) - 1e-9) / 20  # whole 5 %
    ax.imshow(heat(table, 0, high), aspect="auto", interpolation="nearest")
    ax.set_yticks(range(len(present)), [class_name(arrays, int(c)) for c in present])
    ax.set_xticks(range(0, experts, max(1, experts // 8)))
    ax.set_xlabel("expert")
    ax.grid(visible=False)
    bar(drawing, ax, 100 * high, "% of the class's tokens", over=bool(table.max() > high))
    caption = f"{len(arrays['labels']):,} images; a column of one colour: that expert does not look at the class."
    if every > len(rows):
        caption += f" {len(rows)} of the {every:,} classes, evenly spread over their numbers."
    title = f"Which classes go to which expert, {layer}"
    return picture(drawing, f"class_expert_{layer}", title, caption, group=GROUP)


def position_table(arrays: Arrays, layer: str) -> np.ndarray | None:
    """(E, g, g): share of the images whose patch at a place takes the expert; None if tokens are no square."""
    routing, experts = arrays[f"routing/{layer}"], int(arrays[f"experts/{layer}"])
    tokens = routing.shape[1]
    grid = math.isqrt(tokens)
    if grid < 2 or tokens - grid * grid not in (0, 1):
        return None
    patches_ = routing[:, tokens - grid * grid :]
    return np.stack([(patches_ == e).any(-1).mean(0).reshape(grid, grid) for e in range(experts)])


def positions(arrays: Arrays, layer: str) -> list[Picture]:
    """One small map an expert: where in the image its patches lie."""
    table = position_table(arrays, layer)
    if table is None:
        return []
    columns = 4
    rows = math.ceil(len(table) / columns)
    drawing, axes = figures(rows, columns, 4.0, 0.35 + 1.0 * rows)
    high = max(math.ceil(20 * float(table.max()) - 1e-9), 1) / 20
    for e, ax in enumerate(axes.flat):
        if e >= len(table):
            ax.set_visible(False)
            continue
        ax.imshow(heat(table[e], 0, high), interpolation="nearest")
        ax.set_title(f"expert {e}", pad=2)
        _frame(ax)
    bar(drawing, list(axes.flat), 100 * high, "% of the images")
    caption = "Each square is the image; strong where patches at that place often take the expert."
    return [
        picture(drawing, f"position_expert_{layer}", f"Which places go to which expert, {layer}", caption, group=GROUP)
    ]


def patches(arrays: Arrays, layer: str) -> Picture:
    """Both views of the shown images, and between them their patches by first expert; letters on matched patches."""
    views, routing = arrays["views"], arrays[f"view_routing/{layer}"]
    match = arrays.get("match")
    count = len(views)
    grid = math.isqrt(routing.shape[2])
    first = routing[:, :, routing.shape[2] - grid * grid :, 0]
    drawing, axes = figures(count, 4, 4.0, 0.98 * count + 0.6)
    agree = total = lettered = 0
    for i in range(count):
        for v, (plain, tinted) in enumerate(((0, 1), (3, 2))):
            axes[i, plain].imshow(views[i, v], interpolation="nearest")
            side = overlay(views[i, v], first[i, v].reshape(grid, grid))
            axes[i, tinted].imshow(side, interpolation="nearest")
        if match is None:
            continue
        linked = np.flatnonzero(match[i] >= 0)
        partner = match[i][linked]
        same = first[i, 0][linked] == first[i, 1][partner]
        agree, total = agree + int(same.sum()), total + len(linked)
        kept = marks.spread(linked, partner, grid)
        lettered += len(kept)
        marks.letters(axes[i, 1], axes[i, 2], linked[kept], partner[kept], same[kept], grid, len(side))
    for ax in axes.flat:
        _frame(ax)
    for ax, title in zip(axes[0], ("view 1", "its experts", "its experts", "view 2"), strict=True):
        ax.set_title(title, color=INK)
    used = np.unique(first)
    handles = [Patch(color=EXPERTS[e % len(EXPERTS)], label=f"{e}") for e in used]
    near = {"handlelength": 1.0, "handletextpad": 0.4, "columnspacing": 1.0}
    legend(drawing, handles, 12, title="first expert", loc="outside lower center", **near)
    caption = "Outside two views of an image, between them their patches tinted by their first expert."
    if total:
        caption += (
            " Patches with the same letter show the same place: white on black where both go to the same expert first,"
            f" black on white where not. {agree / total:.0%} of the {total} such patches agree"
            f"{'' if lettered == total else f', {lettered} have a letter'}."
        )
        caption += marks.where(grid)
    caption += repeats(int(arrays[f"experts/{layer}"]), "expert")
    return picture(drawing, f"patches_{layer}", f"Two views of the same images, {layer}", caption, group=GROUP)


def overlay(image: np.ndarray, experts: np.ndarray, strength: float = 0.55) -> np.ndarray:
    """(S, S, 3) uint8 tinted by the colours of ``experts`` (g, g), a fine line between patches; at least 112 px."""
    grid = len(experts)
    factor = max(1, math.ceil(112 / len(image)))
    image = image.repeat(factor, 0).repeat(factor, 1).astype(float) / 255
    colours = np.array([to_rgb(EXPERTS[e % len(EXPERTS)]) for e in experts.reshape(-1)]).reshape(grid, grid, 3)
    place = np.arange(len(image)) * grid // len(image)
    gray = 0.3 + 0.7 * (image.mean(-1, keepdims=True) * 0.7 + image * 0.3)  # black would swallow the tint
    out = (1 - strength) * gray + strength * colours[place][:, place]
    edge = np.flatnonzero(np.diff(place)) + 1
    out[edge], out[:, edge] = out[edge] * 0.75, out[:, edge] * 0.75
    return np.round(out * 255).astype(np.uint8)


def _frame(ax: object) -> None:
    ax.set_xticks([])
    ax.set_yticks([])
    ax.grid(visible=False)
    for side in ax.spines.values():
        side.set_visible(True)
        side.set_color(AXIS)
