"""``python -m moe_cl recipes``: a table of all; ``recipes NAME``: one resolved; ``recipes sweep NAME``: its commands.

A sweep (``sweeps/NAME.yaml``) is a base recipe and named rows of settings, one run each::

    base: mocov2_r50_200ep
    about: MoCo v2, table 1 ...
    rows:
      a: {settings: [params.head=mlp], expected: "66.2"}

A row is started as its recipe's head says: the same launcher and ranks, an out dir of its own.
"""

from __future__ import annotations

import argparse
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from moe_cl import config
from moe_cl.config import RECIPES, ConfigError

SWEEPS = RECIPES / "sweeps"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of ``recipes``."""
    parser.add_argument("name", nargs="*", help="NAME, or: sweep NAME; nothing = the table")
    parser.epilog = (
        "Settings (key=value) change the recipe that is printed, or all runs of the sweep; data.train=DIR fills in "
        "their --data DIR."
    )


def about(path: Path) -> str:
    """The first comment line of a recipe: what it is."""
    first = path.read_text().split("\n", 1)[0]
    return first.lstrip("# ").strip() if first.startswith("#") else ""


def sweep_names() -> list[str]:
    """Names of the sweeps that ship with the package."""
    return sorted(path.stem for path in SWEEPS.glob("*.yaml"))


def read_sweep(name: str) -> dict[str, Any]:
    """A sweep's base, text and rows. Raises ConfigError."""
    path = SWEEPS / f"{name}.yaml"
    if not path.is_file():
        raise ConfigError(f"unknown sweep {name!r}; there are {', '.join(sweep_names()) or 'none'}")
    tree = yaml.safe_load(path.read_text())
    config.recipe_path(tree["base"])
    return tree


def start_command(recipe: str) -> str:
    """How the head of a recipe says that it is started, DIR and HOSTFILE to be filled in."""
    head = (line.lstrip("# ") for line in config.recipe_path(recipe).read_text().split("\n") if line.startswith("#"))
    plain = f"python -m moe_cl pretrain --recipe {recipe} --data DIR --out runs/{recipe}"
    return next((line for line in head if f"--recipe {recipe} " in line and "--data DIR" in line), plain)


def commands(name: str, overrides: Sequence[str] = ()) -> list[tuple[str, str, str]]:
    """(row, command, expected figures) of each run of a sweep; ``overrides``: settings of all of them.

    Raises ConfigError.
    """
    tree, data = read_sweep(name), "DIR"
    for setting in overrides:
        if setting.startswith("data.train="):
            data = shlex.quote(setting.partition("=")[2])
    more, out = [setting for setting in overrides if not setting.startswith("data.train=")], []
    for row, cells in tree["rows"].items():
        recipe = cells.get("recipe", tree["base"])
        command = start_command(recipe).replace("--data DIR", f"--data {data}")
        command = command.replace(f"--out runs/{recipe}", f"--out runs/{name}-{row}")
        settings = [shlex.quote(setting) for setting in (*cells.get("settings", []), *more)]
        out.append((str(row), " ".join([command, *settings]), cells.get("expected", "")))
    return out


def main(args: argparse.Namespace) -> int:
    """Print what was asked for. Raises ConfigError on unknown names."""
    from moe_cl import methods
    from moe_cl.tracking.progress import table

    if not args.name:
        rows = []
        for name in config.recipe_names():
            cfg = config.load(name, [], methods.params_of)
            epochs = f"{cfg.schedule.stop_epochs or cfg.schedule.epochs:g}"
            if cfg.follows:
                before = config.load(cfg.follows, [], methods.params_of).schedule
                epochs = f"{before.stop_epochs or before.epochs:g} to {epochs}"
            what = about(config.recipe_path(name))
            rows.append([name, cfg.method, cfg.model.backbone, epochs, cfg.batch.global_batch, what])
        table(["recipe", "method", "backbone", "epochs", "batch", "what"], rows)
        if sweep_names():
            print(f"sweeps (recipes sweep NAME): {', '.join(sweep_names())}")
        return 0
    if args.name[0] == "sweep":
        names = args.name[1:] or sweep_names()
        for name in names:
            print(f"# {name}: {read_sweep(name).get('about', '')}")
            for row, command, expected in commands(name, args.overrides):
                print(command + (f"  # ({row}) expected: {expected}" if expected else f"  # ({row})"))
        return 0
    if len(args.name) > 1:
        raise ConfigError(f"recipes takes one name, found {' '.join(args.name)}")
    path = config.recipe_path(args.name[0])
    head = [line for line in path.read_text().split("\n") if line.startswith("#")]
    cfg = config.load(args.name[0], args.overrides, methods.params_of)
    print("\n".join(head))
    print(yaml.safe_dump(config.to_tree(cfg), sort_keys=False), end="")
    return 0
