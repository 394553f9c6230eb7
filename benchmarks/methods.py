"""Does every method learn? Each small Fashion-MNIST recipe through the launcher: kNN of its teacher beside an untrained
network's (one step at learning rate 0), and the health figures before and after.

    bash launchers/quickstart.sh            # makes data/fashion-mnist
    python -m benchmarks.methods [--quick] [--ranks 2] [--only NAME]
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

from moe_cl import config
from moe_cl.tracking.journal import read

DATA = Path("data/fashion-mnist")
HEALTH = ("health/feature_std", "health/effective_rank", "health/positive", "health/negative", "health/kl")


def recipes() -> list[str]:
    """The Fashion-MNIST recipes."""
    return [name for name in config.recipe_names() if name.endswith("_fmnist")]


def run(recipe: str, steps: int, ranks: int, out: Path) -> tuple[float, dict[str, float]]:
    """kNN top-1 at the end of ``steps`` steps, and the last health figures."""
    settings = [f"data.train={DATA}/train", f"eval.bank={DATA}/train", f"eval.test={DATA}/test", "eval.knn_every=1000",
                f"schedule.max_steps={steps}", "track.uri=none", "checkpoint.every_epochs=1000"]  # fmt: skip
    command = ["bash", "launchers/local.sh", str(ranks), "--recipe", recipe, "--out", str(out), *settings]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{recipe}: exit {done.returncode}\n{done.stdout[-2000:]}{done.stderr[-2000:]}")
    lines = read(out / "journal.jsonl")
    knn = [line["values"]["top1"] for line in lines if line["kind"] == "evaluation"]
    health: dict[str, float] = {}
    for line in lines:
        if line["kind"] == "step":
            health.update({k: v for k, v in line["values"].items() if k in HEALTH})
    return knn[-1], health


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="60 steps a recipe instead of two epochs")
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--only", default="", help="recipes whose name has this part")
    args = parser.parse_args()
    if not (DATA / "train").is_dir():
        sys.exit(f"{DATA} is not there: bash launchers/quickstart.sh makes it")
    steps, ratios = (60 if args.quick else 468), {}
    for name in [n for n in recipes() if args.only in n]:
        with tempfile.TemporaryDirectory() as folder:
            before, start = run(name, 1, args.ranks, Path(folder) / "untrained")
            after, end = run(name, steps, args.ranks, Path(folder) / "trained")
        ratios[name] = after / before
        moved = "  ".join(f"{k.removeprefix('health/')} {start[k]:.3f} -> {end[k]:.3f}" for k in HEALTH if k in end)
        print(f"{name:28s} kNN {100 * before:5.1f} -> {100 * after:5.1f} %  {moved}", flush=True)
    targets = dict.fromkeys(ratios, 1.0)
    print(json.dumps({"benchmark": "methods", "ratios": {k: round(v, 4) for k, v in ratios.items()},
                      "targets": targets, "met": all(r > 1 for r in ratios.values())}))  # fmt: skip


if __name__ == "__main__":
    main()
