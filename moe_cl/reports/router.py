"""The router over training, from the journal: load by layer and expert, dead experts, entropy, agreement of views."""

from __future__ import annotations

import numpy as np
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.ticker import MaxNLocator

from moe_cl.reports.curves import Chart, one
from moe_cl.reports.run import Run, Series
from moe_cl.reports.style import Picture, figures, heat, picture

DEAD = 0.1  # an expert with less than this share of its fair load counts as dead


def draw(run: Run) -> list[Picture]:
    """All router figures that the run's journal has values for."""
    load = run.moe_layers("load")
    if not load:
        return []
    out = [load_over_time(load)]
    out += one(
        Chart("load_spread", "Fullest and emptiest expert", "share of its fair load", group="Router",
              zero=True, members=2,
              caption="1 is a fair share; a colour a layer, its fullest expert above, its emptiest dashed below."),
        [(f"{name} {what}", Series(s.x, f(s.y, 1) * s.y.shape[1]))
         for name, s in load.items() for what, f in (("fullest", np.max), ("emptiest", np.min))],
    )  # fmt: skip
    out += one(
        Chart("dead", "Dead experts", "experts", group="Router", counts=True,
              caption=f"Experts with less than {DEAD:.0%} of a fair share in a step."),
        [(name, Series(s.x, (s.y * s.y.shape[1] < DEAD).sum(1).astype(float))) for name, s in load.items()],
    )  # fmt: skip
    out += one(
        Chart("load_entropy", "Evenness of the load", "% of the highest entropy", group="Router",
              caption="Entropy of the load over experts; 100 % is perfectly even."),
        [(name, Series(s.x, 100 * evenness(s.y))) for name, s in load.items()],
    )  # fmt: skip
    for key, title, unit, scale, caption in (
        ("entropy", "Entropy of a token's routing", "nats", 1.0, "Of the softmax over experts; low is decided."),
        ("margin", "Margin of the first choice", "probability", 1.0, "Probability of the first less the second."),
        ("agreement_cls", "Do the two views' class tokens agree?", "% of the experts in common", 100.0,
         "The paper's point: both views of an image should take the same experts. Share of the k that both take."),
        ("agreement_patch", "Do overlapping patches agree?", "% of the experts in common", 100.0,
         "Patches of the two views that show the same place."),
        ("sent", "Tokens sent to other ranks", "rows", 1.0, "What expert parallelism puts on the network in a step."),
    ):  # fmt: skip
        lines = [(name, s) for name, s in run.moe_layers(key).items() if s.y.ndim == 1]
        out += one(Chart(f"router_{key}", title, unit, caption=caption, scale=scale, group="Router"), lines)
    return out


def about(run: Run) -> str:
    """What L0, L1 ... are; "" without experts."""
    count, blocks = len(run.moe_layers("load")), (run.config.get("moe") or {}).get("blocks")
    if not count:
        return ""
    names = "L0" if count == 1 else "L0 and L1" if count == 2 else f"L0 to L{count - 1}"
    text = f" {names}: the layers with experts, in order from the input"
    if blocks == "odd":
        blocks = [2 * layer + 1 for layer in range(count)]
    if isinstance(blocks, list) and len(blocks) == count:
        text += f" (block{'s' if count > 1 else ''} {', '.join(str(b) for b in blocks)} of the network; the first is 0)"
    return text + "."


def evenness(load: np.ndarray) -> np.ndarray:
    """Entropy of load (n, E) over log E."""
    share = load / np.maximum(load.sum(1, keepdims=True), 1e-12)
    return -(share * np.log(np.maximum(share, 1e-12))).sum(1) / np.log(load.shape[1])


def load_over_time(load: dict[str, Series], columns: int = 160) -> Picture:
    """Heat maps: steps across, experts down, one map a layer; strong = more than its share."""
    high = 2.0
    drawing, axes = figures(len(load), 1, 4.0, 0.55 + 1.35 * len(load), sharex=True)
    for (name, s), ax in zip(load.items(), axes[:, 0], strict=True):
        share = s.y * s.y.shape[1]
        edges = np.linspace(0, len(share), min(columns, len(share)) + 1).astype(int)
        table = np.stack([share[a:b].mean(0) for a, b in zip(edges[:-1], edges[1:], strict=True)], 1)
        ax.imshow(
            heat(table, 0.0, high), aspect="auto", interpolation="nearest",
            extent=(float(s.x[0]) - 0.5, float(s.x[-1]) + 0.5, len(table) - 0.5, -0.5),
        )  # fmt: skip
        ax.grid(visible=False)
        ax.set_ylabel(f"{name} expert")
        ax.set_yticks(range(0, len(table), max(1, len(table) // 4)))
        for side in ("top", "right"):
            ax.spines[side].set_visible(True)
    axes[-1, 0].set_xlabel("step")
    bar(drawing, axes[:, 0], high, "load / fair share", over=True)
    caption = "Share of the routed tokens that each expert takes, against an even share; no colour is no load."
    return picture(drawing, "expert_load", "Load of the experts over training", caption, group="Router")


def bar(drawing: object, axes: object, high: float, label: str, low: float = 0.0, over: bool = False) -> None:
    """The scale of a heat map, beside it. ``over``: values above ``high`` have its colour, and the scale says so."""
    side = drawing.colorbar(ScalarMappable(Normalize(low, high)), ax=axes, fraction=0.04, pad=0.02, aspect=30)
    side.set_label(label)
    side.outline.set_visible(False)
    side.solids.set_visible(False)
    side.ax.imshow(heat(np.linspace(high, low, 64)[:, None], low, high), aspect="auto", extent=(0, 1, low, high))
    side.ax.grid(visible=False)
    ticks = [t for t in MaxNLocator(4, steps=[1, 2, 2.5, 5, 10]).tick_values(low, high) if low <= t < high * 0.93]
    side.ax.set_yticks([*ticks, high], [*(f"{t:g}" for t in ticks), f"\u2265 {high:g}" if over else f"{high:g}"])
