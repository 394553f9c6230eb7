"""What every method learns from equally many images: kNN, linear probe, 4- and 10-shot, beside pixels and the untrained
network. Writes ``accuracy.md`` anew after every cell (a method on a set with a seed).

    python -m benchmarks.accuracy                          # six methods, two sets, three seeds
    python -m benchmarks.accuracy --minutes 60 --jobs 2    # what fits; started again it goes on
    python -m benchmarks.accuracy --launched               # all nine methods through the DeepSpeed launcher, two ranks

``--out`` holds what was measured (``state.json``) and the run that is under way: a killed command that is started again
goes on in the middle of it.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import threading
import time
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait
from dataclasses import asdict
from pathlib import Path
from typing import Any

from benchmarks import _accuracy_table as page
from benchmarks import _cells
from benchmarks._cells import METHODS, SETS, SIX, Budget, Cell
from moe_cl.config import ConfigError
from moe_cl.evals.record import write_json


def arguments(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line; ``--quick`` sets what it must."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="two methods on scikit-learn's digits, a minute")
    parser.add_argument("--launched", action="store_true", help="all methods, Fashion-MNIST, one seed, the launcher")
    parser.add_argument("--sets", nargs="+", choices=tuple(SETS), default=["fashion-mnist", "openclipart"])
    parser.add_argument("--methods", nargs="+", choices=(*METHODS, "all"), default=list(SIX))
    parser.add_argument("--seeds", type=int, default=3, help="seeds 0 to N - 1 (default: 3)")
    parser.add_argument("--images", type=int, default=Budget.images, help="seen by every method (default: %(default)s)")
    parser.add_argument("--batch", type=int, default=Budget.batch, help="global batch (default: %(default)s)")
    parser.add_argument("--ranks", type=int, default=0, help="ranks of the DeepSpeed launcher; 0 = one process, none")
    parser.add_argument("--jobs", type=int, default=1, help="cells at the same time")
    parser.add_argument("--minutes", type=float, help="no cell begins after so long")
    parser.add_argument("--out", type=Path, default=Path("runs/accuracy"))
    parser.add_argument("--table", type=Path, default=Path("benchmarks/accuracy.md"))
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="settings of all cells")
    args = parser.parse_args(argv)
    args.said = "".join(f" {a}" for a in (sys.argv[1:] if argv is None else argv))
    if args.quick:
        args.sets, args.methods, args.seeds, args.images, args.batch = ["digits"], ["MoCo v3", "CR-MoE"], 1, 1024, 64
        args.out = args.out if args.out != Path("runs/accuracy") else Path("runs/accuracy-quick")
        args.table = args.out / "accuracy.md"
    if args.launched:
        args.sets, args.methods, args.seeds, args.ranks = ["fashion-mnist"], ["all"], 1, args.ranks or 2
        args.out = args.out if args.out != Path("runs/accuracy") else Path("runs/accuracy-launched")
        default = Path("benchmarks/accuracy.md")
        args.table = args.table if args.table != default else default.with_name("accuracy-launched.md")
    args.methods = page.order(METHODS if "all" in args.methods else args.methods)
    return args


class State:
    """What is done, in ``OUT/state.json``, and the page made of it."""

    def __init__(self, args: argparse.Namespace, budget: Budget):
        self.args, self.budget, self.path, self.lock = args, budget, args.out / "state.json", threading.Lock()
        self.body: dict[str, Any] = {"budget": asdict(budget), "sizes": {}, "flops": {}, "cells": {}}
        if self.path.is_file():
            self.body = json.loads(self.path.read_text())
            if self.body["budget"] != json.loads(json.dumps(asdict(budget))):
                sys.exit(f"{args.out} holds a table of another budget ({self.body['budget']}): choose another --out")

    def save(self) -> None:
        """The state, and the page; by whoever holds the lock."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        write_json(self.path, self.body)
        cells, shown = self.body["cells"], page.order({k.split("/")[1] for k in self.body["cells"]})
        text = page.write(self.budget, cells, self.body["sizes"], self.body["flops"], self.args.said, shown)
        self.args.table.parent.mkdir(parents=True, exist_ok=True)
        part = self.args.table.with_name(self.args.table.name + ".part")
        part.write_text(text + "\n")
        os.replace(part, self.args.table)


def count(state: State, cells: list[Cell], folders: dict[str, Path]) -> None:
    """FLOPs of every method, which also says what is wrong with a cell's settings before the first one starts."""
    from benchmarks._flops import flops

    for cell in cells:
        name = f"{cell.set}/{cell.method}"
        if name not in state.body["flops"]:
            state.body["flops"][name] = flops(_cells.resolve(cell, state.budget, folders[cell.set])[1])


def measure(state: State, cell: Cell, data: Path) -> None:
    """One cell, recorded."""
    folder = state.args.out / "cells" / cell.key.replace("/", "-").replace(" ", "_")
    result = _cells.run(cell, state.budget, data, folder)
    with state.lock:
        state.body["cells"][cell.key] = asdict(result)
        state.save()
    figures = "  ".join(f"{m} {100 * result.figures['trained'][m]:.1f}" for m in page.MEASURES)
    print(f"{cell.key:32s} {figures}  ({result.images:,} images, {result.seconds:.0f} s)", flush=True)


def run_cells(state: State, cells: list[Cell], folders: dict[str, Path]) -> list[str]:
    """All cells that are not there yet, while there is time; what went wrong."""
    args, begin, errors = state.args, time.monotonic(), []
    todo = [cell for cell in cells if cell.key not in state.body["cells"]]
    print(f"{len(cells) - len(todo)} of {len(cells)} cells are there", flush=True)
    with ThreadPoolExecutor(args.jobs) as pool:
        running: set[Any] = set()
        while todo or running:
            over = args.minutes is not None and time.monotonic() - begin > 60 * args.minutes
            while todo and not over and len(running) < args.jobs:
                cell = todo.pop(0)
                running.add(pool.submit(measure, state, cell, folders[cell.set]))
            if not running:
                print(f"{args.minutes:g} minutes are over; the same command goes on with {len(todo)} cells", flush=True)
                break
            done, running = wait(running, return_when=FIRST_COMPLETED)
            for error in (future.exception() for future in done):
                if error:
                    errors.append(str(error))
                    print(f"a cell failed; the same command tries it again:\n{error}", file=sys.stderr, flush=True)
    return errors


def main() -> int:
    args = arguments()
    budget = Budget(args.images, args.batch, args.ranks, tuple(args.overrides))
    state = State(args, budget)
    folders = {}
    for name in args.sets:
        folders[name], state.body["sizes"][name] = _cells.prepare(name)
    # A whole round of methods before the next seed, so that a table that was cut short has every method in it.
    cells = [Cell(s, m, seed) for seed in range(args.seeds) for s in args.sets for m in args.methods]
    try:
        count(state, cells, folders)
    except ConfigError as error:
        sys.exit(f"accuracy: {error}")
    errors = run_cells(state, cells, folders)
    found = state.body["cells"]
    ratios = {}
    for name in args.sets:
        mine = {k: v for k, v in found.items() if k.startswith(f"{name}/")}
        ratios |= {f"{name}/{m}": round(r, 4) for m in args.methods if (r := page.ratio(mine, m)) is not None}
    met = not errors and len(ratios) == len(args.sets) * len(args.methods) and all(r > 1 for r in ratios.values())
    print(json.dumps({"benchmark": "accuracy", "ratios": ratios, "targets": dict.fromkeys(ratios, 1.0), "met": met}))
    return 1 if errors else 0


if __name__ == "__main__":
    sys.exit(main())
