"""``python -m benchmarks.loader [--quick]``: sharding, views and loading, each beside what people use today."""

from __future__ import annotations

import argparse
import json

from benchmarks import _loading, _sharding, _views

PARTS = {"sharding": _sharding, "views": _views, "loading": _loading}


def main() -> None:
    """Run the parts in turn; the last line of stdout is one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="fewer rounds, smaller inputs")
    parser.add_argument("--part", choices=PARTS, action="append", help="only this part (may be repeated)")
    args = parser.parse_args()
    ratios: dict[str, float] = {}
    targets: dict[str, float] = {}
    for name in args.part or PARTS:
        print(f"-- {name}")
        found, wanted = PARTS[name].measure(args.quick)
        ratios.update(found)
        targets.update(wanted)
    met = all(ratios[name] >= target for name, target in targets.items())
    rounded = {name: round(value, 3) for name, value in ratios.items()}
    print(json.dumps({"benchmark": "loader", "ratios": rounded, "targets": targets, "met": met}))


if __name__ == "__main__":
    main()
