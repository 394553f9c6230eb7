"""``python -m tests.conformance --golden DIR [--only PATTERN]``: the project's own code on published values.

One row a comparison (file, case, quantity, largest error, tolerance, ok or FAIL), at the end ``N passed, M failed``;
exit code 1 when one fails or when a file or an array in DIR (or a folder in it) was not compared. Files are known by
the names of their arrays; sizes and settings are theirs. What no array says (heads, top-k, a temperature) is the
specification's where that fits the values, else what does, and the rows of the file name it.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch

from tests.conformance import checks
from tests.conformance.harness import run


def main(argv: list[str] | None = None) -> int:
    """Run, print, and return the exit code."""
    parser = argparse.ArgumentParser(prog="python -m tests.conformance", description=__doc__.split("\n")[0])
    parser.add_argument("--golden", type=Path, required=True, help="folder of .npz and .json files")
    parser.add_argument("--only", default="*", help="file or file/case, a glob or a part of the name")
    args = parser.parse_args(argv)
    if not args.golden.is_dir():
        parser.error(f"--golden {args.golden}: no such folder")
    torch.manual_seed(0)
    rows = run(args.golden, checks.CHECKS, args.only)
    for row in rows:
        verdict = "ok" if row.ok else "FAIL"
        note = f"  {row.note}" if row.note else ""
        print(f"{row.file:24s} {row.case:28s} {row.quantity:28s} {row.error:9.2e} {row.tolerance:9.2e} {verdict}{note}")
    failed = sum(not row.ok for row in rows)
    print(f"{len(rows) - failed} passed, {failed} failed")
    return int(failed > 0 or not rows)


if __name__ == "__main__":
    sys.exit(main())
