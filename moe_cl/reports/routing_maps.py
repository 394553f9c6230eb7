"""What goes to which expert: classes, patch positions, and the patches of two views of an image."""

from __future__ import annotations

import math

import numpy as np
from matplotlib.colors import to_rgb
from matplotlib.patches import ConnectionPatch, Patch

from moe_cl.reports.router import bar
from moe_cl.reports.style import AXIS, EXPERTS, INK, Picture, figures, heat, picture

GROUP = "Router, looked into"
Arrays = dict[str, np.ndarray]


def draw(arrays: Arrays) -> list[Picture]:
    """All figures of the routing arrays of ``explain.npz``."""
    layers = sorted((k.split("/")[1] for k in arrays if k.startswith("routing/L")), key=lambda name: int(name[1:]))
    chosen = layers if len(layers) <= 3 else [layers[0], layers[len(layers) // 2], layers[-1]]
    out = [patches(arrays, layer) for layer in chosen if f"view_routing/{layer}" in arrays]
    out += [classes(arrays, layer) for layer in chosen]
    out += [p for layer in chosen for p in positions(arrays, layer)]
    return out


def class_name(arrays: Arrays, label: int) -> str:
    """The name of a class, else its number."""
    names = arrays.get("class_names", ())
    return str(names[label]) if 0 <= label < len(names) else str(label)


def class_table(arrays: Arrays, layer: str) -> tuple[np.ndarray, np.ndarray]:
    """(classes present (c,), share of each class's token-expert pairs by expert (c, E))."""
    routing, labels = arrays[f"routing/{layer}"], arrays["labels"]
    experts = int(arrays[f"experts/{layer}"])
    present = np.unique(labels)
    counts = np.stack([np.bincount(routing[labels == c].reshape(-1), minlength=experts) for c in present])
    return present, counts / counts.sum(1, keepdims=True)


def classes(arrays: Arrays, layer: str) -> Picture:
    """Classes down, experts across."""
    present, table = class_table(arrays, layer)
    present, table = present[:40], table[:40]
    experts = table.shape[1]
    drawing, axes = figures(1, 1, 4.0, 1.0 + 0.19 * len(present))
    ax = axes[0, 0]
    high = max(2.0 / experts, float(np.quantile(table, 0.98)))
    ax.imshow(heat(table, 0, high), aspect="auto", interpolation="nearest")
    ax.set_yticks(range(len(present)), [class_name(arrays, int(c)) for c in present])
    ax.set_xticks(range(0, experts, max(1, experts // 8)))
    ax.set_xlabel("expert")
    ax.grid(visible=False)
    bar(drawing, ax, 100 * high, "% of the class's tokens")
    return picture(
        drawing, f"class_expert_{layer}", f"Which classes go to which expert, {layer}",
        f"{len(arrays['labels']):,} images; a column of one colour: that expert does not look at the class.",
        group=GROUP,
    )  # fmt: skip


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
    high = max(float(table.max()), 1e-6)
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
    """Both views of the shown images, patches coloured by first expert, matched patches linked."""
    views, routing = arrays["views"], arrays[f"view_routing/{layer}"]
    match = arrays.get("match")
    count, _, size = views.shape[:3]
    grid = math.isqrt(routing.shape[2])
    first = routing[:, :, routing.shape[2] - grid * grid :, 0]
    drawing, axes = figures(count, 2, 4.0, 1.75 * count + 0.5)
    agree = total = 0
    for i in range(count):
        for v in range(2):
            ax = axes[i, v]
            ax.imshow(overlay(views[i, v], first[i, v].reshape(grid, grid)), interpolation="nearest")
            _frame(ax)
        if i == 0:
            axes[0, 0].set_title("view 1", color=INK)
            axes[0, 1].set_title("view 2", color=INK)
        if match is None:
            continue
        linked = np.flatnonzero(match[i] >= 0)
        same = first[i, 0][linked] == first[i, 1][match[i][linked]]
        agree, total = agree + int(same.sum()), total + len(linked)
        for p, ok in list(zip(linked, same, strict=True))[:: max(1, len(linked) // 12)]:
            drawing.add_artist(_link(axes[i, 0], axes[i, 1], int(p), int(match[i][p]), grid, size, bool(ok)))
    used = np.unique(first)
    drawing.legend(
        handles=[Patch(color=EXPERTS[e % len(EXPERTS)], label=f"{e}") for e in used], title="first expert",
        loc="outside lower center", ncols=min(8, len(used)),
    )  # fmt: skip
    caption = "Patches tinted by their first expert."
    if total:
        caption += f" Lines link patches at the same place (solid: same expert); {agree / total:.0%} of {total} agree."
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


def _link(left: object, right: object, p: int, q: int, grid: int, size: int, same: bool) -> ConnectionPatch:
    scale = max(1, math.ceil(112 / size)) * size / grid
    ends = [((n % grid + 0.5) * scale, (n // grid + 0.5) * scale) for n in (p, q)]
    return ConnectionPatch(
        ends[0], ends[1], "data", "data", axesA=left, axesB=right, color=INK, alpha=0.9 if same else 0.35,
        linewidth=1.0 if same else 0.8, linestyle="-" if same else (0, (2, 2)), shrinkA=0, shrinkB=0,
    )  # fmt: skip


def _frame(ax: object) -> None:
    ax.set_xticks([])
    ax.set_yticks([])
    ax.grid(visible=False)
    for side in ax.spines.values():
        side.set_visible(True)
        side.set_color(AXIS)
