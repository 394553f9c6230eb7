"""``python -m moe_cl eval PROTOCOL --checkpoint DIR ...``, alone or under deepspeed, torchrun or srun."""

from __future__ import annotations

import argparse
import importlib

from moe_cl.evals import context

# protocol: module with HELP, add_arguments(parser) and run(ctx)
PROTOCOLS = {
    "summary": "moe_cl.evals.summary",
    "knn": "moe_cl.evals.knn",
    "linear": "moe_cl.evals.linear",
    "logistic": "moe_cl.evals.logistic",
    "fewshot": "moe_cl.evals.fewshot",
    "finetune": "moe_cl.evals.finetune",
    "detection": "moe_cl.evals.detection",
    "correspondence": "moe_cl.evals.correspondence",
    "routing": "moe_cl.evals.routing",
    "statistics": "moe_cl.evals.statistics",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """One sub-command a protocol."""
    protocols = parser.add_subparsers(dest="protocol", metavar="PROTOCOL", required=True)
    for name, module in PROTOCOLS.items():
        loaded = importlib.import_module(module)
        sub = protocols.add_parser(name, help=loaded.HELP.replace("%", "%%"), description=loaded.HELP)
        context.add_arguments(sub)
        loaded.add_arguments(sub)


def main(args: argparse.Namespace) -> int:
    """Run one protocol on this rank; returns the exit code."""
    from moe_cl.comm import LocalComm
    from moe_cl.engine import ranks

    me = ranks.from_environment()
    comm = ranks.init(me, timeout=3600.0) if me.world > 1 else LocalComm()
    ctx = context.Context(args, comm)
    ctx.check()
    importlib.import_module(PROTOCOLS[args.protocol]).run(ctx)
    return 0
