"""Curves of a run over its steps."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
from matplotlib.ticker import MaxNLocator, NullFormatter

from moe_cl.reports.run import Run, Series
from moe_cl.reports.style import SERIES, Picture, figure, legend, picture, thin


@dataclass
class Chart:
    """One chart: the keys that belong in it, its unit, and what the caption says."""

    name: str
    title: str
    unit: str
    keys: Callable[[str], bool] = lambda key: False
    caption: str = ""
    log: bool = False
    scale: float = 1.0
    zero: bool = False  # the axis begins at 0
    group: str = "Training"
    members: int = 1  # neighbouring lines that share a colour and differ by their dashes
    counts: bool = False  # whole numbers: steps, no running mean; of a stretch of steps the highest


DASHES = ("-", "--", ":", "-.")


def _is(*names: str) -> Callable[[str], bool]:
    return lambda key: key in names


def _under(*prefixes: str) -> Callable[[str], bool]:
    return lambda key: key.startswith(prefixes)


CHARTS = (
    Chart("loss", "Loss", "loss", _is("loss"), "What the optimizer sees, averaged over all ranks."),
    Chart("loss_parts", "Parts of the loss", "loss", _under("loss/"), "Each with its weight; their sum is the loss.",
          log=True),
    Chart("lr", "Learning rate", "learning rate", _is("lr")),
    Chart("decay", "Weight decay", "weight decay", _is("weight_decay")),
    Chart("momentum", "Teacher momentum", "momentum", _is("teacher_momentum"), "Share that a step keeps."),
    Chart("gradients", "Gradient norms", "L2 norm", _under("grad/", "grad_norm"), "Before clipping.", log=True),
    Chart(
        "similarity", "Similarity of pairs", "cosine", _is("health/positive", "health/negative"),
        "Positive pairs should part from negative ones.", group="Health",
    ),
    Chart("spread", "Spread of the features", "deviation x sqrt(width)", _is("health/feature_std"), zero=True,
          caption="Standard deviation of unit features: about 1 is evenly spread, 0 is collapse.", group="Health"),
    Chart("rank", "Effective rank", "dimensions", _is("health/effective_rank"), zero=True, group="Health"),
    Chart("entropy", "Teacher entropy and divergence", "nats", _is("health/teacher_entropy", "health/kl"),
          group="Health"),
    Chart("match", "Matched patches", "%", _is("health/match_rate", "health/match_unique"), scale=100.0,
          caption="Share of patches that have a partner in the other view.", group="Health"),
    Chart("consistency", "Consistency of routing", "loss", _under("health/consistency/"),
          "The paper's loss for each layer, before its weight.", group="Router"),
    Chart("throughput", "Throughput", "images/s", _is("images_per_second"), zero=True, group="Speed"),
    Chart("data_wait", "Time spent waiting for data", "%", _is("data_wait"), scale=100.0, zero=True, group="Speed"),
    Chart("flops", "Arithmetic", "TFLOP/s", _is("tflops"), zero=True, group="Speed"),
    Chart("mfu", "Model FLOPs utilisation", "%", _is("mfu"), scale=100.0, zero=True, group="Speed"),
)  # fmt: skip


def draw(charts: Sequence[Chart], runs: Sequence[Run]) -> list[Picture]:
    """The charts for which a run has values; several runs in one chart where it has a single key."""
    out = []
    for chart in charts:
        keys = sorted({key for run in runs for key in run.series if chart.keys(key)})
        if len(runs) == 1:
            lines = [(_label(key), runs[0].series[key]) for key in keys if runs[0].series[key].y.ndim == 1]
            out += one(chart, lines)
        else:
            for key in keys:
                lines = [(run.label, run.series[key]) for run in runs if key in run.series]
                title = chart.title if len(keys) == 1 else f"{chart.title}: {_label(key)}"
                name = chart.name if len(keys) == 1 else f"{chart.name}_{_label(key).replace('/', '_')}"
                out += one(replace(chart, name=name, title=title), [(label, s) for label, s in lines if s.y.ndim == 1])
    return out


def _label(key: str) -> str:
    return key.rsplit("/", 1)[-1].replace("_", " ")


def one(chart: Chart, lines: Sequence[tuple[str, Series]]) -> list[Picture]:
    """One chart of (label, series); [] if nothing is there. A noisy line is drawn light, its running mean strong."""
    lines = [(label, s) for label, s in lines if np.isfinite(s.y).any()]
    if not lines:
        return []
    drawing, axes = figure(4.0, 2.4)
    shown = []
    for i, (label, s) in enumerate(lines):
        lap, number = divmod(i // chart.members, len(SERIES))
        colour, style = SERIES[number], DASHES[(lap * chart.members + i % chart.members) % len(DASHES)]
        x, y = thin(s.x, s.y * chart.scale, of=np.max if chart.counts else np.mean)
        smooth = y if chart.counts else running_mean(y)
        if chart.counts:  # equal counts lie on each other: the earlier line is seen at the sides of the later
            width = 1.8 + 1.6 * min(3, len(lines) - 1 - i)
            axes.step(x, y, style, where="post", color=colour, label=label, linewidth=width, clip_on=False)
        elif noisy(y, smooth):
            axes.plot(x, y, color=colour, alpha=0.25, linewidth=1)
            axes.plot(x, smooth, style, color=colour, label=label)
        else:
            axes.plot(x, y, style, color=colour, label=label)
        if len(x) == 1:
            axes.plot(x, y, "o", color=colour, markersize=4)
        shown.append((label, colour, x, y))
    finish(axes, chart, [s.y * chart.scale for _, s in lines])
    if len(lines) > 1:
        handles = axes.get_legend_handles_labels()[0]
        legend(drawing, handles, chart.members if chart.members > 1 else 3, loc="outside upper left")
    return [picture(drawing, chart.name, chart.title, chart.caption, series=shown, unit=chart.unit, group=chart.group)]


def finish(axes: object, chart: Chart, values: Sequence[np.ndarray]) -> None:
    """Axes of a chart over steps."""
    axes.set_xlabel("step")
    axes.set_ylabel(chart.unit)
    axes.grid(axis="x", visible=False)
    every = np.concatenate([v[np.isfinite(v)] for v in values])
    if chart.log and (every > 0).all() and every.max() > 20 * every.min():
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")  # no small raised digits: a phone shows them too
        axes.yaxis.set_minor_formatter(NullFormatter())
    elif chart.zero:
        axes.set_ylim(0, every.max() * 1.08 or 1.0)
    elif np.ptp(every) == 0:
        axes.set_ylim(every[0] - 0.5 * max(abs(every[0]), 1e-6), every[0] + 0.5 * max(abs(every[0]), 1e-6))
    if axes.get_yscale() == "linear":
        axes.ticklabel_format(axis="y", scilimits=(-2, 6), useOffset=False)
    if chart.counts:
        axes.set_ylim(0, max(1.0, every.max() * 1.08))
        axes.yaxis.set_major_locator(MaxNLocator(5, integer=True))
    axes.xaxis.set_major_locator(MaxNLocator(7, integer=True))


def running_mean(y: np.ndarray, share: float = 0.03) -> np.ndarray:
    """Centred mean over ``share`` of the curve; at its ends over what there is."""
    width = max(1, int(len(y) * share)) | 1
    values, weight = np.nan_to_num(y), np.isfinite(y).astype(float)
    kernel = np.ones(width)
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.convolve(values, kernel, "same") / np.convolve(weight, kernel, "same")


def noisy(y: np.ndarray, smooth: np.ndarray) -> bool:
    """Does the line hide its own course?"""
    if len(y) < 60:
        return False
    spread = np.nanmax(smooth) - np.nanmin(smooth)
    return bool(np.nanstd(y - smooth) > 0.01 * max(spread, 1e-12))
