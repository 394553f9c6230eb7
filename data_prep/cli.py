"""The sharder's command line. A verb is a module with ``add_arguments`` and ``run``; only the one used is imported."""

from __future__ import annotations

import argparse
import importlib
import os
import sys
from collections.abc import Sequence

from moe_cl import __version__
from moe_cl.arguments import Parser
from moe_cl.config import ConfigError

VERBS = {
    "fetch": "bring a named public set to a folder",
    "shard": "write tar shards, their indexes and dataset.json",
    "lint": "read every image of shards and report what is broken",
    "index": "build indexes for shards made by others",
    "subset": "lists of a part: 1 %%, 10 %%, few-shot splits, ImageNet-100",
    "stats": "class histogram, sizes, a contact sheet",
}


class _Parser(Parser):
    MARK = "error"


def parser(verb: str | None = None) -> argparse.ArgumentParser:
    """The parser; a verb's own options are there only if it is ``verb``, so that help is fast."""
    top = _Parser(prog="python -m data_prep", description="From images as people have them to shards.")
    top.add_argument("--version", action="version", version=f"moe_cl {__version__}")
    verbs = top.add_subparsers(dest="verb", metavar="VERB", required=True)
    for name, text in VERBS.items():
        sub = verbs.add_parser(name, help=text, description=text[0].upper() + text[1:] + ".")
        if name == verb:
            importlib.import_module(f"data_prep.{name}").add_arguments(sub)
    return top


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a verb. Exit code: 0 done, 1 errors found by ``lint``, 2 something the user must change, 130 interrupted."""
    argv = list(sys.argv[1:] if argv is None else argv)
    verb = next((a for a in argv if a in VERBS), None)
    try:
        args = parser(verb).parse_args(argv)
        return importlib.import_module(f"data_prep.{args.verb}").run(args)
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except BrokenPipeError:  # whoever read our output has gone; that is no fault
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except OSError as error:
        where = f"{error.filename}: " if error.filename else ""
        print(f"error: {where}{error.strerror or error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted; the same command continues", file=sys.stderr)
        return 130
