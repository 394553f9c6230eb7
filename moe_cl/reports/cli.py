"""``python -m moe_cl report OUT [OUT2 ...]``."""

from __future__ import annotations

import argparse


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of the verb ``report``."""
    parser.add_argument("out", nargs="+", help="out dir of a run; several are set side by side")


def main(args: argparse.Namespace) -> int:
    """Write the page (or pages) and say where."""
    from moe_cl.reports import build

    for out in args.out:
        print(f"report: {build.write(out)}")
    return 0
