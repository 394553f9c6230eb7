"""``python -m moe_cl track sync OUT``: brings to MLflow what a run could not deliver."""

from __future__ import annotations

import argparse
import sys

from moe_cl.arguments import real
from moe_cl.tracking import mlflow


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of the verb ``track``."""
    verbs = parser.add_subparsers(dest="track_verb", required=True, metavar="sync")
    sync = verbs.add_parser("sync", help="send what has not been delivered, each point once")
    sync.add_argument("out", nargs="+", help="out dirs of runs")
    sync.add_argument("--track-uri", help="another server than the run's (with credentials, if it needs some)")
    sync.add_argument("--seconds", type=real(low=0), default=600.0, help="give up after (default %(default)s)")
    sync.add_argument("--new-run", action="store_true", help="if it was deleted in MLflow: another, with everything")
    sync.add_argument("--status", choices=["FINISHED", "FAILED", "KILLED"], help="how the run ended, if it did not say")


def main(args: argparse.Namespace) -> int:
    """0 if everything is there, 3 if something is left."""
    left = False
    for out in args.out:
        result = mlflow.sync(out, args.track_uri, args.seconds, args.status, args.new_run)
        if result["done"]:
            print(f"{out}: {result['sent']} points sent to {result['uri']}, run {result['run_id']}; nothing is left")
        else:
            left = True
            waiting = f"{result['waiting']} left" if result["waiting"] else "not all is there"
            print(f"{out}: {result['sent']} points sent, {waiting}: {result['error']}", file=sys.stderr)
    return 3 if left else 0
