"""The one command: ``python -m moe_cl VERB``. Verbs load what they need when they run, so ``--help`` is fast.

Exit codes: 0 done, 1 a check found errors or a run cannot go on, 2 a setting to mend (one line on stderr says which).
"""

from __future__ import annotations

import argparse
import importlib
import os
import re
import sys
from collections.abc import Sequence

from moe_cl import config
from moe_cl.arguments import Parser, RanksParser, speaks, whole
from moe_cl.config import ConfigError
from moe_cl.typed import OneRanksError

# verb: (module with add_arguments(parser) and main(args) -> int, help)
VERBS = {
    "pretrain": ("moe_cl.cli", "pretrain an encoder from a recipe"),
    "eval": ("moe_cl.evals.cli", "measure a pretrained encoder (kNN, linear probe, ...)"),
    "export": ("moe_cl.interop.export", "an encoder for timm, torchvision, Hugging Face, Detectron2, or inference"),
    "import": ("moe_cl.interop.importing", "published weights (MoCo, JCL, CR-MoE, EsViT, DINO, timm, torchvision) in"),
    "checkpoint": ("moe_cl.engine.checkpoint.cli", "list, verify, convert and compare checkpoints"),
    "track": ("moe_cl.tracking.cli", "send a run's journal to MLflow"),
    "report": ("moe_cl.reports.cli", "write the HTML report of one run, or compare several"),
    "plan": ("moe_cl.planning.plan", "memory, time and traffic of a run on a cluster, before it starts"),
    "doctor": ("moe_cl.planning.doctor", "check this machine, or the hosts of a hostfile, before a job"),
    "recipes": ("moe_cl.recipes.cli", "list recipes, or print one resolved"),
}
AS_RANKS = ("pretrain", "eval")  # what a launcher starts many times over; every other verb is one process
SETTINGS = ("pretrain", "import", "plan", "doctor", "recipes")  # verbs that take key=value; to others it is a name
# Settings of the data that are wanted often enough to be options too (data.NAME=VALUE says the same).
DATA_OPTIONS = {
    "--retry-seconds": (float, "how long an unreachable source is tried again before the run saves and stops"),
    "--max-bad-fraction": (float, "share of bad samples above which the run stops"),
    "--max-pixels": (int, "larger images are not decoded"),
    "--log-sample-ids": (bool, "write the ids of every step's samples to the journal"),
}
# What ends a verb with one line and exit code 1; by name, for the modules of these errors load torch.
CANNOT_GO_ON = ("RankLost", "NonFiniteLoss", "SourceLost", "TooManyFaults")
OVERRIDE = re.compile(r"^[A-Za-z_][\w.]*=")


def _name(option: str) -> str:
    return option.removeprefix("--").replace("-", "_")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of ``pretrain``."""
    parser.add_argument("--recipe", required=True, help="name (see `recipes`) or path of a YAML")
    parser.add_argument("--out", help="directory of everything the run writes")
    parser.add_argument("--data", help="training shards: folder with dataset.json, brace pattern or URL")
    parser.add_argument("--epochs", type=float, help="same as schedule.epochs=N")
    parser.add_argument("--track-uri", metavar="URI", help="MLflow's address, same as track.uri=URI")
    parser.add_argument("--track", choices=["none"], help="none: the journal only, no MLflow")
    parser.add_argument("--resume", action="store_true", help="continue from the newest complete checkpoint, if any")
    for option, (kind, text) in DATA_OPTIONS.items():
        more = {"action": "store_true"} if kind is bool else {"type": kind}
        parser.add_argument(option, **more, help=text)
    parser.add_argument(
        "--check", type=whole(1), metavar="RANKS", help="only check settings and data for that many ranks, and exit"
    )
    parser.epilog = "Any setting of the recipe can be changed with key=value, for example optim.base_lr=1e-3."


def read_config(args: argparse.Namespace, overrides: list[str]) -> config.RunConfig:
    """The typed config of ``pretrain``'s command line. Raises ConfigError."""
    from moe_cl import methods

    given = [("out", args.out), ("data.train", args.data), ("schedule.epochs", args.epochs)]
    given += [("track.uri", args.track_uri), ("track.uri", args.track)]
    given += [(f"data.{name}", getattr(args, name)) for name in map(_name, DATA_OPTIONS)]
    for key, value in given:
        if value is not None and value is not False:  # 0 is a value
            overrides = [*overrides, f"{key}={value}"]
    cfg = config.load(args.recipe, overrides, methods.params_of)
    cfg.resume = cfg.resume or args.resume
    return cfg


def preflight(cfg: config.RunConfig, world: int) -> None:
    """Everything that can be known to be wrong before ranks meet: settings, batch, data, tools. Raises ConfigError."""
    from moe_cl.data.faults import SourceLost
    from moe_cl.data.index import resolve
    from moe_cl.data.loader import Loader
    from moe_cl.engine import checks, schedules, setup
    from moe_cl.engine.checkpoint import source
    from moe_cl.evals import online
    from moe_cl.tracking import mlflow
    from moe_cl.views.spec import build_spec

    checks.check_out(cfg.out)
    if cfg.data.cache_dir:
        checks.check_folder("data.cache_dir", cfg.data.cache_dir)
    batch = checks.check(cfg, world)
    modules = setup.check_model(
        cfg, batch.micro_batch * (1 if not cfg.batch.exact_large_batch else batch.accumulation), world
    )
    mlflow.check(cfg.track)
    online.check_best(cfg)
    sizes = {"global_batch": batch.global_batch, "micro_batch": batch.micro_batch}
    try:
        loader = Loader(cfg.data, build_spec(cfg.views), seed=cfg.seed, **sizes, rank=0, world=world)
    except SourceLost as error:
        raise ConfigError(str(error)) from None
    loader.close()
    per_epoch = loader.steps_per_epoch
    total = schedules.total_steps(cfg.schedule, per_epoch)
    checks.check_same_run(cfg, total, per_epoch)
    source.check_schedule(cfg, total, per_epoch)
    source.check_own(cfg, modules)
    if (cursor := source.cursor(cfg)) is not None:
        loader.load_state_dict(cursor)
    for name, pattern in (("eval.bank", cfg.eval.bank), ("eval.test", cfg.eval.test)):
        if pattern and (cfg.eval.knn_every or not pattern.startswith(("folder:", "torchvision:"))):
            images = len(resolve(pattern))
            if name == "eval.bank" and cfg.eval.k > images:
                raise ConfigError(
                    f"eval.k {cfg.eval.k} is more than the {images} images of eval.bank {pattern}; lower it"
                )
        elif not pattern and cfg.eval.knn_every:
            raise ConfigError(f"eval.knn_every={cfg.eval.knn_every:g} needs {name}: labelled shards, or set it to 0")


def main_pretrain(args: argparse.Namespace) -> int:
    """Check everything that can be checked, then start (or, with --check, stop there)."""
    cfg = read_config(args, args.overrides)
    from moe_cl.engine import ranks
    from moe_cl.engine.checkpoint import source

    began = source.kept(cfg)
    if cfg.model.init_from not in (None, began) and speaks():
        print(f"{cfg.out} goes on from its own checkpoint: model.init_from={cfg.model.init_from} is not read")
    cfg.model.init_from = began
    me = ranks.from_environment()
    preflight(cfg, args.check or me.world)
    if args.check:
        return 0
    from moe_cl.pretrain import pretrain

    return pretrain(cfg, me)


def main(argv: Sequence[str] | None = None) -> int:
    """Run one verb; see the module's docstring for exit codes."""
    argv = list(sys.argv[1:] if argv is None else argv)
    chosen = next((a for a in argv if a in VERBS), None)
    # --check is one process too, also where its environment is that of a rank (a pod of a PyTorchJob), but for one that
    # a launcher starts, which says which of its host's it is.
    checks = any(a.split("=", 1)[0] == "--check" for a in argv) and "LOCAL_RANK" not in os.environ
    ranked = chosen is None or chosen in AS_RANKS and not checks
    parser = (RanksParser if ranked else Parser)(
        prog="python -m moe_cl", description=__doc__.split("\n")[0].replace("``", "")
    )
    # DeepSpeed's launcher writes --local_rank=N before everything else.
    parser.add_argument("--local_rank", "--local-rank", type=int, default=None, help=argparse.SUPPRESS)
    verbs = parser.add_subparsers(dest="verb", metavar="VERB", required=True)
    for verb, (module, text) in VERBS.items():
        sub = verbs.add_parser(verb, help=text, description=text)
        if verb == chosen:
            importlib.import_module(module).add_arguments(sub)
    # Settings stand anywhere between options, which argparse alone cannot do.
    overrides = [a for a in argv if OVERRIDE.match(a)] if chosen in SETTINGS else []
    args, rest = parser.parse_known_args([a for a in argv if a not in overrides])
    if rest:
        setting = next((a for a in rest if OVERRIDE.match(a)), None)
        what = f"{chosen} takes no settings ({setting})" if setting else f"unrecognized arguments: {' '.join(rest)}"
        parser.error(what)
    args.overrides = overrides
    if args.local_rank is not None:
        os.environ.setdefault("LOCAL_RANK", str(args.local_rank))
    aloud = not ranked or speaks()  # now: the process group gives LOCAL_RANK another meaning
    try:
        if args.verb == "pretrain":
            return main_pretrain(args)
        return importlib.import_module(VERBS[args.verb][0]).main(args)
    except ConfigError as error:
        if aloud or isinstance(error, OneRanksError):
            print(f"moe_cl: {error}", file=sys.stderr)
        return 2
    except RuntimeError as error:
        if type(error).__name__ not in CANNOT_GO_ON:
            raise
        print(f"moe_cl: {error}" + "".join(f" ({note})" for note in getattr(error, "__notes__", ())), file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
