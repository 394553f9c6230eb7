"""One look for every figure: drawn once by matplotlib, written as SVG that follows the page's theme, and as PNG.

Figures are drawn in the light theme's colours (``INK``, ``SERIES[i]`` ...); in the SVG each of them is replaced by a
CSS variable of the page, whose value dark mode changes. Heat maps are one colour whose opacity is the value, so they
need no second version.
"""

from __future__ import annotations

import html
import io
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

# name of the CSS variable -> light, dark; no light colour twice
_THEME = {
    "ink": ("#0b0b0b", "#ffffff"), "muted": ("#52514e", "#c3c2b7"), "grid": ("#e4e3dc", "#30302e"),
    "axis": ("#c3c2b7", "#4a4a46"), "surface": ("#fcfcfb", "#1a1a19"), "good": ("#0ca30c", "#3fbf3f"),
    "bad": ("#d03b3b", "#e66767"),
}  # fmt: skip
_SERIES = (
    ("#2a78d6", "#3987e5"), ("#eb6834", "#d95926"), ("#1baf7a", "#199e70"), ("#e8a100", "#c98500"),
    ("#4a3aa7", "#9085e9"), ("#e34948", "#e66767"), ("#e87ba4", "#d55181"), ("#008300", "#2ba62b"),
)  # fmt: skip
_TOKENS: dict[str, tuple[str, str]] = {**_THEME, **{f"s{i}": pair for i, pair in enumerate(_SERIES)}}

INK, MUTED, GRID, AXIS, SURFACE, GOOD, BAD = (light for light, _ in _THEME.values())
SERIES = tuple(light for light, _ in _SERIES)
# Experts and classes need more colours than series do, and the same ones in both themes (they are laid over images):
# each has a contrast of 3 or more with the light and with the dark card, and the first eight are furthest apart.
EXPERTS = (
    "#2679d9", "#df6626", "#1a9966", "#a67900", "#8066d9", "#d9534d", "#d95993", "#4d8c13",
    "#79606c", "#8093ac", "#b34600", "#b34086", "#007960", "#ac79e6", "#796600", "#997379",
    "#206c9f", "#3993f2", "#468699", "#809900", "#7359ac", "#bf8080", "#b359b9", "#007900",
)  # fmt: skip
HEAT = (42, 120, 214)  # blue: its opacity is the value
FONT = "DejaVu Sans"  # comes with matplotlib
_RC = {
    "svg.fonttype": "none", "font.family": FONT, "font.size": 9, "axes.titlesize": 9, "axes.labelsize": 9,
    "xtick.labelsize": 8, "ytick.labelsize": 8, "legend.fontsize": 8, "text.color": INK, "axes.labelcolor": MUTED,
    "xtick.color": AXIS, "ytick.color": AXIS, "xtick.labelcolor": MUTED, "ytick.labelcolor": MUTED,
    "axes.edgecolor": AXIS, "axes.linewidth": 0.8, "axes.grid": True, "grid.color": GRID, "grid.linewidth": 0.8,
    "axes.axisbelow": True, "axes.spines.top": False, "axes.spines.right": False, "axes.facecolor": "none",
    "figure.facecolor": "none", "savefig.facecolor": "none", "lines.linewidth": 1.8, "lines.solid_capstyle": "round",
    "legend.frameon": False, "legend.handlelength": 1.4, "legend.labelcolor": MUTED, "xtick.major.size": 3,
    "ytick.major.size": 0, "image.interpolation": "none",
}  # fmt: skip
matplotlib.rcParams.update(_RC)  # reports alone draw


def css() -> str:
    """The CSS variables of both themes."""
    light = "".join(f"--{name}:{value[0]};" for name, value in _TOKENS.items())
    dark = "".join(f"--{name}:{value[1]};" for name, value in _TOKENS.items())
    return (
        f":root{{color-scheme:light dark;{light}}}\n"
        f"@media (prefers-color-scheme:dark){{:root:not([data-theme=light]){{{dark}}}}}\n"
        f":root[data-theme=dark]{{color-scheme:dark;{dark}}}\n:root[data-theme=light]{{color-scheme:light}}"
    )


@dataclass
class Picture:
    """A finished figure. ``hover``: what the page's script shows under the pointer (axes box, ranges, series)."""

    name: str
    title: str
    caption: str
    svg: str
    png: bytes
    hover: dict[str, Any] | None = None
    wide: bool = False
    group: str = ""

    def save(self, folder: Path) -> Path:
        """Write ``NAME.png``."""
        path = folder / f"{self.name}.png"
        path.write_bytes(self.png)
        return path


def figure(width: float = 4.4, height: float = 2.7) -> tuple[Figure, Axes]:
    """An empty figure of one axes in this look; inches at 100 dots."""
    out = Figure((width, height), dpi=100, layout="constrained")
    FigureCanvasAgg(out)
    return out, out.add_subplot()


def figures(rows: int, columns: int, width: float, height: float, **options: Any) -> tuple[Figure, np.ndarray]:
    """A figure of ``rows`` x ``columns`` axes (an array of them)."""
    out = Figure((width, height), dpi=100, layout="constrained")
    FigureCanvasAgg(out)
    return out, out.subplots(rows, columns, squeeze=False, **options)


def legend(drawing: Figure, handles: Sequence[Any], most: int = 3, **options: Any) -> None:
    """A legend of as many columns (``most`` at most) as the figure is wide enough for; it is read along its rows."""
    count = len(handles)
    for columns in range(min(most, count), 0, -1):
        down = [handles[i] for c in range(columns) for i in range(c, count, columns)]  # matplotlib fills columns
        made = drawing.legend(handles=down, ncols=columns, **options)
        if columns == 1 or made.get_window_extent(drawing.canvas.get_renderer()).width <= drawing.bbox.width:
            return
        made.remove()


def repeats(count: int, what: str) -> str:
    """What a caption says of colours when there are more experts or classes than colours; else ""."""
    return f" From the {len(EXPERTS) + 1}th {what} on colours repeat." if count > len(EXPERTS) else ""


def picture(
    drawing: Figure,
    name: str,
    title: str,
    caption: str = "",
    *,
    series: Sequence[tuple[str, str, np.ndarray, np.ndarray]] = (),
    wide: bool = False,
    group: str = "",
    unit: str = "",
) -> Picture:
    """Render. ``series``: (label, colour token, x, y) of the lines that the pointer reads, in the first axes."""
    with matplotlib.rc_context({"svg.hashsalt": name}):
        raw = io.StringIO()
        drawing.savefig(raw, format="svg", metadata={"Date": None, "Creator": None})
        hover = _hover(drawing, series, unit) if series else None
        image = io.BytesIO()
        drawing.savefig(image, format="png", dpi=160, facecolor=_THEME["surface"][0])
    return Picture(name, title, caption, _svg(raw.getvalue(), title, name), image.getvalue(), hover, wide, group)


def _hover(drawing: Figure, series: Sequence[tuple[str, str, np.ndarray, np.ndarray]], unit: str) -> dict[str, Any]:
    axes = drawing.axes[0]
    box = axes.get_position()
    lines = [
        {"label": label, "color": _variable(colour), "x": [float(v) for v in x], "y": _json(y)}
        for label, colour, x, y in series
    ]
    return {
        "box": [round(float(v), 5) for v in (box.x0, 1 - box.y1, box.width, box.height)],
        "x": [float(v) for v in axes.get_xlim()], "y": [float(v) for v in axes.get_ylim()],
        "log": axes.get_yscale() == "log", "unit": unit, "xlabel": axes.get_xlabel(), "lines": lines,
    }  # fmt: skip


def _json(values: np.ndarray) -> list[float | None]:
    return [float(f"{v:.5g}") if np.isfinite(v) else None for v in np.asarray(values, float)]


def _variable(token: str) -> str:
    return next((f"var(--{name})" for name, (light, _) in _TOKENS.items() if light == token), token)


_JUNK = re.compile(r"^.*?(?=<svg)|<metadata>.*?</metadata>|<style.*?</style>", re.S)
_FONT = re.compile(r"font-family: [^;\"]*;?|font: ([^;'\"]*?)'[^;\"]*")


def _svg(raw: str, title: str, name: str) -> str:
    """The SVG for inside a page: tokens as CSS variables, the page's font, sized by its box, a title for readers."""
    text = _JUNK.sub("", raw)
    for key, (light, _) in _TOKENS.items():
        text = text.replace(light, f"var(--{key})")
    text = _FONT.sub(lambda m: f"font: {m[1]}system-ui, sans-serif" if m[1] else "", text)
    text = re.sub(r'<g id="[^"]*"', "<g", text)  # ids must be unique in a page; only those of definitions are used
    text = re.sub(r"\s*\n\s*", " ", text)
    text = re.sub(r'(<svg [^>]*?)width="[\d.]+pt" height="[\d.]+pt"', r"\1", text, count=1)
    head = f'<svg role="img" aria-label="{html.escape(title)}" class="plot" data-figure="{name}"'
    return text.replace("<svg", head, 1).strip()


def thin(x: np.ndarray, y: np.ndarray, points: int = 400, of: Any = np.mean) -> tuple[np.ndarray, np.ndarray]:
    """At most about ``points`` points of a curve: the mean (or ``of``) of each stretch of equal length."""
    if len(x) <= points:
        return x, y
    edges = np.linspace(0, len(x), points + 1).astype(int)
    with np.errstate(invalid="ignore"):
        return np.array([x[b - 1] for b in edges[1:]]), np.array(
            [of(y[a:b]) for a, b in zip(edges[:-1], edges[1:], strict=True)]
        )


def heat(values: np.ndarray, low: float, high: float) -> np.ndarray:
    """(r, c) values as RGBA (r, c, 4) uint8: one colour, its opacity from ``low`` (none) to ``high`` (full)."""
    share = np.clip((np.nan_to_num(values, nan=low) - low) / max(high - low, 1e-12), 0, 1)
    out = np.empty((*values.shape, 4), np.uint8)
    out[..., :3], out[..., 3] = HEAT, np.round(255 * share)
    return out
