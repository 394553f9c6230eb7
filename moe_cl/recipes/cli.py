"""``python -m moe_cl recipes``: a table of all; ``recipes NAME``: one resolved; ``recipes sweep NAME``: its commands.

A sweep (``sweeps/NAME.yaml``) is a base recipe and named rows of settings, one run each::

    base: mocov2_r50_200ep
    about: MoCo v2, table 1 ...
    rows:
      a: {settings: [params.mlp=true], expected: "66.2 linear"}
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import yaml

from moe_cl import config
from moe_cl.config import RECIPES, ConfigError

SWEEPS = RECIPES / "sweeps"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of ``recipes``."""
    parser.add_argument("name", nargs="*", help="NAME, or: sweep NAME; nothing = the table")
    parser.epilog = "Settings (key=value) change the recipe that is printed."


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


def commands(name: str) -> list[tuple[str, str, str]]:
    """(row, command, expected figures) of each run of a sweep."""
    tree = read_sweep(name)
    out = []
    for row, cells in tree["rows"].items():
        settings = " ".join(f"'{s}'" if set(s) & set(" []{}*") else s for s in cells.get("settings", []))
        recipe = cells.get("recipe", tree["base"])
        out.append(
            (
                str(row),
                f"pretrain --recipe {recipe} --out runs/{name}-{row} {settings}".rstrip(),
                cells.get("expected", ""),
            )
        )
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
            for row, command, expected in commands(name):
                print(
                    f"python -m moe_cl {command}"
                    + (f"  # ({row}) expected: {expected}" if expected else f"  # ({row})")
                )
        return 0
    if len(args.name) > 1:
        raise ConfigError(f"recipes takes one name, found {' '.join(args.name)}")
    path = config.recipe_path(args.name[0])
    head = [line for line in path.read_text().split("\n") if line.startswith("#")]
    cfg = config.load(args.name[0], args.overrides, methods.params_of)
    print("\n".join(head))
    print(yaml.safe_dump(config.to_tree(cfg), sort_keys=False), end="")
    return 0
