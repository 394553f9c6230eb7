"""``python -m moe_cl import FILE --out DIR``: published weights into a folder that everything here takes.

Strict: every tensor of the backbone on both sides, in the same shape. The key report is printed always and kept in the
folder's ``config.json``.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor, nn

from moe_cl.config import ConfigError, ModelConfig, MoEConfig, ViewsConfig, build, to_tree
from moe_cl.interop import infer, published
from moe_cl.models.folder import Settings, save


@dataclass
class KeyReport:
    """What became of every tensor: of the file (loaded, unused, other shape, left, derived) and of the network
    (loaded, missing)."""

    loaded: list[str] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)
    unused: list[str] = field(default_factory=list)
    shapes: list[str] = field(default_factory=list)  # "name: (file's) in the file, (network's) in the network"
    left: list[str] = field(default_factory=list)  # heads, queues: no part of a backbone
    derived: list[str] = field(default_factory=list)  # tables the network makes itself

    @property
    def complete(self) -> bool:
        """Every backbone tensor found its place."""
        return not (self.missing or self.unused or self.shapes)

    def __str__(self) -> str:
        rows = [f"loaded       {len(self.loaded)} tensors"]
        for title, names in (
            ("missing", self.missing), ("unused", self.unused), ("other shape", self.shapes),
            ("no backbone", self.left), ("made anew", self.derived),
        ):  # fmt: skip
            rows.append(f"{title:<12} {len(names)}" + (f": {_some(names)}" if names else ""))
        return "\n".join(rows)


def _some(names: Sequence[str], most: int = 6) -> str:
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


@torch.no_grad()
def load_into(module: nn.Module, state: Mapping[str, Tensor]) -> KeyReport:
    """Copy what has the same name and shape. BN's batch counter, which old files lack, may be missing.

    Raises ConfigError for values that are no weights: not finite, or of another kind of number than the network's.
    """
    own, report = module.state_dict(), KeyReport()
    for name, tensor in own.items():
        if name not in state:
            if not name.endswith("num_batches_tracked"):
                report.missing.append(name)
        elif tensor.shape != state[name].shape:
            theirs, ours = tuple(state[name].shape), tuple(tensor.shape)
            report.shapes.append(f"{name}: {theirs} in the file, {ours} in the network")
        else:
            _usable(name, state[name], tensor)
            tensor.copy_(state[name])
            report.loaded.append(name)
    report.unused = [name for name in state if name not in own]
    return report


def _usable(name: str, value: Tensor, own: Tensor) -> None:
    if value.is_complex() or (own.is_floating_point() and not value.is_floating_point()):
        kinds = [str(x.dtype).removeprefix("torch.") for x in (value, own)]
        raise ConfigError(f"{name} is {kinds[0]} in the file, {kinds[1]} in the network; give a file of float weights")
    if not value.isfinite().all():
        raise ConfigError(f"{name} has values that are not finite: these weights are broken")


def import_file(
    path: Path, *, which: str = "auto", backbone: str | None = None, overrides: Sequence[str] = (), strict: bool = True
) -> tuple[nn.Module, Settings, KeyReport, list[str]]:
    """Backbone, its settings, the key report, and the assumptions behind them, of a published file.

    Args:
        path: see ``published``. which: its side; ``auto`` is what its authors evaluate.
        backbone: a name of ours in the place of what the tensors say.
        overrides: ``model.options.KEY=VALUE``, ``moe.KEY=VALUE``, ``views.KEY=VALUE``.
        strict: raise for any backbone tensor without a place; otherwise it keeps its initial value.

    Raises:
        ConfigError: no weight file, an unknown network, or a tensor without a place.
    """
    found = published.read(path)
    try:
        which, state = found.side(which)
        model, moe, assumed = infer.infer(state, mocov3=found.kind == "mocov3")
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from None
    if backbone:
        model, assumed = ModelConfig(backbone), []
    tree: dict[str, Any] = {"model": to_tree(model), "moe": to_tree(moe), "views": {}}
    for override in overrides:
        _set(tree, override)
        assumed = [a for a in assumed if a.split("=")[0] != override.split("=")[0]]
    tree["views"].setdefault("size", (tree["model"]["options"] or {}).get("img_size", 224))
    kinds = {"model": ModelConfig, "moe": MoEConfig, "views": ViewsConfig}
    parts = {name: build(kind, tree[name], f"{name}.") for name, kind in kinds.items()}
    source = {"file": path.name, "kind": found.kind, "which": which, "recipe": ""}
    settings = Settings(**parts, source=source)
    module = settings.backbone()
    try:
        report = load_into(module, state)
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from None
    report.left, report.derived = found.left, found.derived
    if strict and not report.complete:
        why = [*report.shapes, *(f"{n} missing" for n in report.missing), *(f"{n} unused" for n in report.unused)]
        error = ConfigError(
            f"{path}: {len(why)} backbone tensors without a place ({_some(why, 2)}); give the file's own sizes as "
            "model.options.KEY=VALUE, or --loose to load the rest"
        )
        error.report = report
        raise error
    return module, settings, report, assumed


def _set(tree: dict[str, Any], override: str) -> None:
    key, _, text = override.partition("=")
    parts = key.split(".")
    if parts[0] not in tree or len(parts) < 2:
        raise ConfigError(f"{override}: an import takes model.options.KEY, moe.KEY and views.KEY")
    for part in parts[:-1]:
        tree = tree.setdefault(part, {})
    try:
        tree[parts[-1]] = yaml.safe_load(text)
    except yaml.YAMLError:
        raise ConfigError(f"{override}: the value is not valid YAML") from None


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of ``import``."""
    parser.add_argument("file", type=Path, help="weights of MoCo, JCL, MoCo v3, CR-MoE, EsViT, DINO, timm, torchvision")
    parser.add_argument("--out", type=Path, required=True, help="folder to write")
    parser.add_argument("--which", choices=("auto", "teacher", "student"), default="auto")
    parser.add_argument("--backbone", help="its name here, if the tensors' own answer is not wanted")
    parser.add_argument("--loose", action="store_true", help="tensors without a place are no error")
    parser.epilog = "What tensors cannot say is set by model.options.heads=6, moe.top_k=1, views.normalize=half, ..."


def main(args: argparse.Namespace) -> int:
    """Read, report, write. Raises ConfigError."""
    from moe_cl.interop.card import card

    try:
        module, settings, report, assumed = import_file(
            args.file, which=args.which, backbone=args.backbone, overrides=args.overrides, strict=not args.loose
        )
    except ConfigError as error:
        if hasattr(error, "report"):
            print(error.report)
        raise
    print(f"{args.file}: {settings.source['kind']}, {settings.source['which']}, {settings.model.backbone}\n{report}")
    if assumed:
        print(f"assumed      {', '.join(assumed)} (tensors cannot say)")
    settings.source |= {"keys": to_tree(report) | {"loaded": len(report.loaded)}, "assumed": assumed}
    save(args.out, module.state_dict(), settings, card(module, settings))
    print(f"{args.out}: written; use it with moe_cl.load({str(args.out)!r}), eval --checkpoint {args.out}, or "
          f"model.init_from={args.out / 'model.safetensors'}")  # fmt: skip
    return 0
