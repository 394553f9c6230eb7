"""``python -m moe_cl report OUT [OUT2 ...]``."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from moe_cl.arguments import whole
from moe_cl.config import ConfigError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of the verb ``report``."""
    parser.add_argument("out", nargs="+", help="out dir of a run; several are set side by side")
    parser.add_argument("--to", metavar="FILE", help="where the comparison goes (default OUT/comparison.html)")
    parser.add_argument("--data", metavar="PATTERN", help="labelled shards to look at (default the run's eval.test)")
    parser.add_argument(
        "--samples", type=whole(1), default=2000, help="images of the maps at most (default %(default)s)"
    )
    parser.add_argument("--weights", default="auto", choices=["auto", "teacher", "student"], help="whose encoder")
    parser.add_argument("--journal-only", action="store_true", help="do not run the checkpoint's encoder over images")
    parser.add_argument("--no-track", action="store_true", help="do not send the page to MLflow")


def main(args: argparse.Namespace) -> int:
    """Write the page (or pages) and say where."""
    from moe_cl.reports import build, compare
    from moe_cl.reports.run import Run

    for out in args.out:
        Run.load(out)  # what is no run is said once, not by each part
    for out in args.out:
        if not args.journal_only:
            look(Path(out), args)
        print(f"report: {build.write(out)}")
        if not args.no_track:
            track(Path(out))
    if len(args.out) > 1:
        print(f"comparison: {compare.write(args.out, Path(args.to) if args.to else None)}")
        if not args.to and not args.no_track:
            track(Path(args.out[0]))
    return 0


def look(out: Path, args: argparse.Namespace) -> None:
    """Make ``explain.npz`` unless it is there and of the newest checkpoint, these weights, data and number of images.

    Without a checkpoint the page shows what the journal has.
    """
    from moe_cl.data.faults import DataStop, SampleFault
    from moe_cl.data.remote import transient
    from moe_cl.reports import arrays, explain
    from moe_cl.tracking import redact

    try:
        asked = {"which": args.weights, "samples": args.samples, "pattern": args.data}
        if arrays.origin(out / arrays.NAME) != explain.origin(out, **asked):
            explain.of_run(out, **asked)
    except Exception as error:
        if not (isinstance(error, (ConfigError, DataStop, SampleFault, OSError)) or transient(error)):
            raise
        why = redact.text(" ".join(str(error).split()))
        if args.data:
            raise ConfigError(why if isinstance(error, ConfigError) else f"--data: {why}") from error
        print(f"report: figures of the encoder are left out: {why}", file=sys.stderr)


def track(out: Path) -> None:
    """The page and its figures as artifacts of the run, if it is tracked and its server answers."""
    from moe_cl.tracking import mlflow

    if mlflow.run_id(out) is None:
        return
    try:
        result = mlflow.sync(out, seconds=20.0)
    except mlflow.Busy:  # it sends the files
        return
    except ConfigError as error:
        print(f"report: not sent to MLflow: {error}", file=sys.stderr)
        return
    if not result["done"]:
        print(f"report: not sent to MLflow ({result['error']}); python -m moe_cl track sync {out}", file=sys.stderr)
