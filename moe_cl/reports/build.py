"""``report OUT``: a run's page (``report.html``) and its figures (``figures/*.png``)."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from moe_cl.config import flatten
from moe_cl.reports import arrays as explained
from moe_cl.reports import curves, embeddings, measures, page, router, routing_maps
from moe_cl.reports.run import Run
from moe_cl.reports.style import Picture
from moe_cl.tracking.progress import duration

ABOUT = {
    "Training": "Objective and schedules over optimizer steps. Light lines are single values, strong ones their mean.",
    "Health": "Signs of collapse show here before they show in an accuracy.",
    "Router": "Which experts the tokens go to, and how that changes.",
    "Router, looked into": "What the routers of the last checkpoint do with images that it was not trained on.",
    "Embeddings": "The frozen features of the last checkpoint.",
    "Speed": "What the machines did.",
    "Evaluations": "Figures of the frozen encoder. Columns sort.",
    "Reproduce": "The same command with the same data gives the same sample order at any number of ranks.",
    "Events": "Everything that happened besides steps.",
    "Configuration": "The resolved settings.",
}
NAMES = {
    "knn_trained": "kNN, trained", "knn_untrained": "kNN, untrained network", "knn_pixels": "kNN, raw pixels",
    "linear_trained": "linear probe, trained",
}  # fmt: skip


def write(out: str | Path, label: str | None = None) -> Path:
    """Make the page of the run in ``out`` and return its path. Raises ConfigError if there is no run."""
    run = Run.load(out, label)
    pictures = figures(run)
    target = run.out / "report.html"
    save_figures(pictures, run.out / "figures")
    write_text(target, document(run, pictures))
    return target


def figures(run: Run) -> list[Picture]:
    """Every figure that the run has values for."""
    found = explained.of_run(run.out, run.id)
    looked = [*routing_maps.draw(found), *embeddings.draw(found)]
    return [*curves.draw(curves.CHARTS, [run]), *router.draw(run), *evaluation_curves(run), *looked]


def save_figures(pictures: Sequence[Picture], folder: Path) -> None:
    """PNGs beside the page; those of an earlier report that are no more are taken away."""
    folder.mkdir(exist_ok=True)
    keep = {p.save(folder).name for p in pictures}
    for path in folder.glob("*.png"):
        if path.name not in keep:
            path.unlink()


def write_text(path: Path, text: str) -> None:
    """All of it or nothing of it: a page may be open while it is made again."""
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_text(text)
    os.replace(temporary, path)


def evaluation_curves(run: Run) -> list[Picture]:
    """Accuracies and other shares that were measured more than once."""
    found: dict[str, list[tuple[int, float]]] = {}
    for line in run.evaluations:
        for key, value in line["values"].items():
            number = measures.in_percent(key, value) if isinstance(value, (int, float)) else None
            if number is not None:
                found.setdefault(f"{line['name']} {key}", []).append((line["step"], float(number)))
    lines = [(n, curves.Series(*np.array(sorted(points)).T)) for n, points in found.items() if len(points) > 1]
    chart = curves.Chart("accuracy", "Accuracy during training", "%", group="Evaluations")
    return curves.one(chart, lines)


def document(run: Run, pictures: Sequence[Picture]) -> str:
    """The page's HTML."""
    groups: dict[str, list[Picture]] = {}
    for p in pictures:
        groups.setdefault(p.group, []).append(p)
    sections = [("Evaluations", page.grid(groups.pop("Evaluations", []), evaluation_tables(run)))]
    order = ("Training", "Router", "Router, looked into", "Embeddings", "Health", "Speed")
    for name in order:
        kind = "masonry" if name in ("Router, looked into", "Embeddings") else "grid"
        sections.append((name, page.grid(groups.get(name, []), kind=kind)))
    sections += [("Reproduce", reproduce(run)), ("Events", events(run)), ("Configuration", configuration(run))]
    return page.page(
        run.label, subtitle(run), [(name, about(run, name), inner) for name, inner in sections], pictures,
        status=run.status, lead=page.tiles(headline(run)),
    )  # fmt: skip


def about(run: Run, section: str) -> str:
    """What stands under a section's heading."""
    return ABOUT[section] + (router.about(run) if section.startswith("Router") else "")


def subtitle(run: Run) -> str:
    """Method, backbone, experts, length, in one line."""
    c = flatten(run.config)
    parts = [c.get("method"), c.get("model.backbone")]
    if c.get("moe.blocks") not in (None, "none"):
        parts.append(f"{c.get('moe.experts')} experts, top-{c.get('moe.top_k')}, ep {c.get('moe.ep_size')}")
    parts += [f"batch {c['batch.global_batch']}" if "batch.global_batch" in c else None, f"{run.steps:,} steps"]
    return " · ".join(str(p) for p in parts if p)


def headline(run: Run) -> list[tuple[str, str]]:
    """The figures that a reader looks for first."""
    out = []
    for key, name in NAMES.items():
        if isinstance(run.summary.get(key), (int, float)):
            out.append((name, f"{run.summary[key]:.2%}"))
    if not out and run.evaluations:
        last = run.evaluations[-1]
        numbers = [(k, v) for k, v in last["values"].items() if isinstance(v, (int, float))]
        numbers.sort(key=lambda item: measures.in_percent(*item) is None)  # accuracies first
        out += [(f"{last['name']} {k}, step {last['step']:,}", measures.shown(k, v)) for k, v in numbers[:2]]
    if "loss" in run.series:
        y = run.series["loss"].y
        tail = y[-max(1, len(y) // 50) :]
        out.append(("loss at the end", f"{np.nanmean(tail):.4f}" if np.isfinite(tail).any() else "not finite"))
    if "images_per_second" in run.series:
        rates = run.series["images_per_second"].y
        out.append(("images/s", f"{len(rates) / np.sum(1 / rates):,.0f}"))  # over the time, not over the steps
        if "data_wait" in run.series and len(run.series["data_wait"].y) == len(rates):
            out.append(("time waiting for data", f"{np.average(run.series['data_wait'].y, weights=1 / rates):.1%}"))
    out.append(("training time", duration(run.seconds)))
    return out


def evaluation_tables(run: Run) -> list[str]:
    """Summary figures and every evaluation, as cards."""
    parts = []
    rows = [[name, run.summary[key]] for key, name in NAMES.items() if isinstance(run.summary.get(key), (int, float))]
    if rows:
        best = max(value for _, value in rows)
        classes = ["best" if value == best else "" for _, value in rows]
        cells = [[name, (f"{value:.2%}", value)] for name, value in rows]
        parts.append("<h3>Accuracy of frozen features</h3>" + page.table(["features", "top-1"], cells, classes))
    for name in dict.fromkeys(e["name"] for e in run.evaluations):
        same = [e for e in run.evaluations if e["name"] == name]
        if len(same) == 1:  # its figures one under the other: a row of them would leave the page
            title, columns = f"{name}, step {same[0]['step']:,}", ["figure", "value"]
            cells = [[key, _number(value)] for key, value in same[0]["values"].items()]
        else:
            keys = list(dict.fromkeys(key for e in same for key in e["values"]))
            title, columns = name, ["step", *keys]
            cells = [[e["step"], *(_number(e["values"].get(key)) for key in keys)] for e in same]
        parts.append(f"<h3>Evaluation {page.escape(title)}</h3>" + page.table(columns, cells))
    return [page.box(part) for part in parts]


def _number(value: Any) -> Any:
    return value if value is None or isinstance(value, (int, float)) else str(value)


def reproduce(run: Run) -> str:
    """Command line and environment."""
    env = run.environment
    if not env:
        return ""
    git = env.get("git") or {}
    names = ("folder", "host", "system", "python", "processor", "cores", "memory_gib")
    rows = [["memory (GiB)" if key == "memory_gib" else key, str(env[key])] for key in names if env.get(key)]
    rows += [["accelerators", ", ".join(env.get("accelerators") or []) or "none"]]
    if git:
        rows.append(["commit", git["commit"] + (" with uncommitted changes" if git.get("dirty") else "")])
    rows += [[name, version] for name, version in env.get("packages", {}).items()]
    link = run.mlflow.get("link")
    more = f'<p>MLflow: <a href="{page.escape(link)}">{page.escape(link)}</a></p>' if link else ""
    return page.box(
        page.command(env.get("command", "")) + more + page.table(["environment", "value"], rows, sort=False)
    )


def events(run: Run) -> str:
    """What happened, the last 500."""
    hidden = {"kind", "time", "name", "step"}
    begin = run.lines[0]["time"]
    rows = []
    for event in run.events[-500:]:
        text = ", ".join(f"{k}: {v}" for k, v in event.items() if k not in hidden)
        rows.append([(duration(event["time"] - begin), event["time"]), event.get("step"), event["name"], text])
    return page.box(page.table(["time", "step", "event", "details"], rows)) if rows else ""


def configuration(run: Run) -> str:
    """All settings, one a row."""
    rows = [[key, str(value)] for key, value in flatten(run.config).items() if value not in ({}, "")]
    return page.box(page.folded(f"all {len(rows)} settings", page.table(["key", "value"], rows))) if rows else ""
