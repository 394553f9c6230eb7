"""``report OUT OUT2 ...``: runs side by side, the differences of their settings on top."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from moe_cl.config import ConfigError, flatten
from moe_cl.reports import build, curves, measures, page
from moe_cl.reports.curves import Chart, Series
from moe_cl.reports.router import evenness
from moe_cl.reports.run import Run
from moe_cl.reports.style import Picture

ABOUT = {
    "Results": "Each row a measure, each column a run. Bold is the best of a row, where the runs can be compared: "
    "accuracies on the same data, losses of the same method, settings, views and batch, times over as many images.",
    "Differences": "Settings that are not the same in all runs.",
    "Training": "One colour a run, over optimizer steps.",
    "Router": "Means over the layers with experts.",
    "All settings": "Rows that differ are marked.",
}
LEFT_OUT = ("out", "resume")  # of a run's life, not of its settings


def write(outs: Sequence[str | Path], target: Path | None = None) -> Path:
    """Make the page of several runs; default ``comparison.html`` beside the first. Raises ConfigError."""
    if len(outs) < 2:
        raise ConfigError("a comparison needs two runs at least")
    runs = [Run.load(out, label) for out, label in zip(outs, labels(outs), strict=True)]
    target = target or runs[0].out / "comparison.html"
    target.parent.mkdir(parents=True, exist_ok=True)
    pictures = figures(runs)
    build.save_figures(pictures, target.with_name(target.stem + "_figures"))
    build.write_text(target, document(runs, pictures))
    return target


def labels(outs: Sequence[str | Path]) -> list[str]:
    """The shortest ends of the paths that tell them apart."""
    parts = [Path(out).resolve().parts for out in outs]
    for length in range(1, max(len(p) for p in parts) + 1):
        names = ["/".join(p[-length:]) for p in parts]
        if len(set(names)) == len(names):
            return names
    raise ConfigError("a comparison needs different runs; the same out dir was given twice")


def figures(runs: Sequence[Run]) -> list[Picture]:
    """Every curve that two runs have, and the router's means."""
    return [*curves.draw(curves.CHARTS, runs), *accuracy(runs), *router(runs)]


def accuracy(runs: Sequence[Run]) -> list[Picture]:
    """kNN and other accuracies during training, a chart each."""
    names = sorted({(e["name"], key) for run in runs for e in run.evaluations for key in e["values"]})
    out = []
    for name, key in names:
        lines = []
        for run in runs:
            points = [
                (e["step"], e["values"][key]) for e in run.evaluations if e["name"] == name and key in e["values"]
            ]
            points = [(x, measures.in_percent(key, y)) for x, y in points if isinstance(y, (int, float))]
            points = [(x, y) for x, y in points if y is not None]
            if len(points) > 1:
                x, y = np.array(sorted(points)).T
                lines.append((run.label, Series(x, y)))
        chart = Chart(f"accuracy_{name}_{key}".replace("/", "_"), f"{name} {key}", "%", group="Training")
        out += curves.one(chart, lines)
    return out


def router(runs: Sequence[Run]) -> list[Picture]:
    """Evenness of the load and agreement of views, mean over layers, a line a run."""
    out = []
    even = []
    for run in runs:
        if load := run.moe_layers("load"):
            first = next(iter(load.values()))
            same = [evenness(s.y) for s in load.values() if len(s.x) == len(first.x)]
            even.append((run.label, Series(first.x, 100 * np.mean(same, axis=0))))
    out += curves.one(Chart("load_entropy", "Evenness of the load", "% of the highest entropy", group="Router"), even)
    for key, title in (("agreement_cls", "Agreement of class tokens"), ("agreement_patch", "Agreement of patches")):
        lines = []
        for run in runs:
            found = [s for s in run.moe_layers(key).values() if s.y.ndim == 1]
            if found:
                same = [s.y for s in found if len(s.x) == len(found[0].x)]
                lines.append((run.label, Series(found[0].x, np.mean(same, axis=0))))
        out += curves.one(
            Chart(f"router_{key}", title, "% of the experts in common", scale=100.0, group="Router"), lines
        )
    return out


@dataclass
class Result:
    """A measure: one value a run, and which of them is the best (1 the highest, -1 the lowest, 0 none)."""

    name: str
    values: list[float | None]
    better: int

    def best(self) -> list[bool]:
        """Which values are the best; none where all are equal."""
        known = [v for v in self.values if v is not None and np.isfinite(v)]
        if not self.better or len(set(known)) < 2:
            return [False] * len(self.values)
        pick = max(known) if self.better > 0 else min(known)
        return [v == pick for v in self.values]


def results(runs: Sequence[Run]) -> list[Result]:
    """What the runs came to."""
    out: list[Result] = []

    def add(name: str, values: Sequence[Any], better: int, comparable: bool = True) -> None:
        if any(v is not None for v in values):
            numbers = [float(v) if isinstance(v, (int, float)) else None for v in values]
            out.append(Result(name, numbers, better if comparable else 0))

    data = same(runs, evaluated_on)
    for key, name in build.NAMES.items():
        add(name, [run.summary.get(key) for run in runs], 1, data)
    last = [{(e["name"], k): v for e in run.evaluations for k, v in e["values"].items()} for run in runs]
    for name, key in sorted({pair for found in last for pair in found}):
        if name != "summary":  # its figures are those above and below
            add(f"{name} {key}, last", [found.get((name, key)) for found in last], measures.better(key), data)
    for key, comparable in (("loss", same(runs, objective)), ("images_per_second", True), ("data_wait", True)):
        series = [run.series.get(key) for run in runs]
        tails = [float(np.nanmedian(s.y[-max(1, len(s.y) // 10) :])) if s else None for s in series]
        add(f"{key.replace('_', ' ')}, median of the last tenth", tails, measures.better(key), comparable)
    add("training seconds", [run.seconds for run in runs], -1, same(runs, images))
    add("steps", [run.steps for run in runs], 0)
    return out


def same(runs: Sequence[Run], what: Callable[[Run], Any]) -> bool:
    """Is it the same of all runs?"""
    first = what(runs[0])
    return all(what(run) == first for run in runs[1:])


def evaluated_on(run: Run) -> list[str]:
    """The ends of the paths of test and training images: where a data set lies does not matter."""
    c = flatten(run.config)
    paths = [str(c.get(key) or c.get("data.train", "")) for key in ("eval.test", "eval.bank")]
    return ["/".join(Path(path).parts[-2:]) for path in paths]


def objective(run: Run) -> dict[str, Any]:
    """Everything that the number called loss depends on, the weights aside."""
    c = flatten(run.config)
    of_loss = ("method", "params.", "views.", "batch.global_batch")
    return {k: v for k, v in c.items() if k.startswith(of_loss)} | {"on": evaluated_on(run)}


def images(run: Run) -> int:
    """Images that the run was trained on, repeats counted."""
    return run.steps * int((run.config.get("batch") or {}).get("global_batch") or 1)


def results_table(runs: Sequence[Run]) -> str:
    """The results, the best of each row bold where there is one."""
    rows = []
    for result in results(runs):
        shown = [None if v is None else int(v) if v == int(v) and abs(v) > 1 else v for v in result.values]
        rows.append([result.name, *shown])
    best = [[False, *result.best()] for result in results(runs)]
    return page.table(["measure", *(run.label for run in runs)], rows, strong=best)


def settings(runs: Sequence[Run]) -> list[tuple[str, list[str], bool]]:
    """(key, value in each run, do they differ) of every setting."""
    flat = [flatten(run.config) for run in runs]
    out = []
    for key in sorted({key for f in flat for key in f} - set(LEFT_OUT)):
        values = [str(f[key]) if key in f else "–" for f in flat]
        out.append((key, values, len(set(values)) > 1))
    return out


def document(runs: Sequence[Run], pictures: Sequence[Picture]) -> str:
    """The page's HTML."""
    names = [run.label for run in runs]
    rows = settings(runs)
    differ = [[key, *values] for key, values, different in rows if different]
    everything = page.table(
        ["key", *names], [[key, *values] for key, values, _ in rows], ["differs" if d else "" for *_, d in rows]
    )
    if differ:
        differences = page.box(page.table(["key", *names], differ, ["differs"] * len(differ)))
    else:
        differences = page.box("<p>None: the runs have the same settings.</p>")
    sections = [("Results", page.box(results_table(runs))), ("Differences", differences)]
    main = [p for p in pictures if p.group != "Router"]
    sections += [("Training", page.grid(main)), ("Router", page.grid([p for p in pictures if p.group == "Router"]))]
    sections.append(("All settings", page.box(page.folded(f"all {len(rows)} settings", everything)) if rows else ""))
    subtitle = " · ".join(f"{run.label}: {run.status.lower()}, {run.steps:,} steps" for run in runs)
    return page.page(" and ".join(names), subtitle, [(n, ABOUT[n], inner) for n, inner in sections], pictures)
