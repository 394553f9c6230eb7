"""``python -m moe_cl checkpoint ls|verify|convert|diff``."""

from __future__ import annotations

import argparse
import time
from pathlib import Path

from moe_cl.arguments import real
from moe_cl.config import ConfigError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The four verbs."""
    verbs = parser.add_subparsers(dest="action", metavar="ACTION", required=True)
    one = verbs.add_parser("ls", help="the complete checkpoints of a run")
    one.add_argument("dir", type=Path, help="run directory")
    one = verbs.add_parser("verify", help="check every file's size and sha256; exit code 1 if one is damaged")
    one.add_argument("dir", type=Path, help="run or checkpoint directory")
    one = verbs.add_parser("convert", help="one safetensors file of full tensors, all experts stacked")
    one.add_argument("dir", type=Path, help="checkpoint or run directory, or one that DeepSpeed wrote (weights only)")
    one.add_argument("to", type=Path, help="the .safetensors file to write")
    one.add_argument("--what", choices=("student", "teacher"), default="student")
    one = verbs.add_parser("diff", help="which tensors of two checkpoints differ; exit code 1 if any does")
    one.add_argument("dir", type=Path)
    one.add_argument("other", type=Path)
    one.add_argument(
        "--tolerance", type=real(low=0), default=0.0, help="largest absolute difference that counts as equal"
    )


def main(args: argparse.Namespace) -> int:
    """Run one action; returns the exit code. Raises ConfigError."""
    return {"ls": _ls, "verify": _verify, "convert": _convert, "diff": _diff}[args.action](args)


def _ls(args: argparse.Namespace) -> int:
    from rich.console import Console
    from rich.table import Table

    from moe_cl.engine.checkpoint import store
    from moe_cl.engine.checkpoint.format import Damaged, read_manifest

    paths = store.complete(args.dir)
    if not paths:
        raise ConfigError(f"{args.dir}: no complete checkpoint in {store.root(args.dir)}")
    table = Table("checkpoint", "written", "ranks", "files", "size", "metrics")
    for path in paths:
        try:
            manifest = read_manifest(path)
        except Damaged as error:
            table.add_row(path.name, "", "", "", "", f"damaged: {error}")
            continue
        written = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(manifest.created))
        size = sum(entry.bytes for entry in manifest.files.values())
        metrics = ", ".join(f"{name} {value:.4g}" for name, value in sorted(manifest.metrics.items()))
        table.add_row(path.name, written, str(manifest.world), str(len(manifest.files)), _size(size), metrics)
    Console().print(table)
    return 0


def _verify(args: argparse.Namespace) -> int:
    from moe_cl.engine.checkpoint import store
    from moe_cl.engine.checkpoint.format import MANIFEST, Damaged, read_manifest, verify_file

    paths = [args.dir] if (args.dir / MANIFEST).is_file() else store.complete(args.dir)
    if not paths:
        raise ConfigError(f"{args.dir}: no complete checkpoint there")
    bad = 0
    for path in paths:
        try:
            files = read_manifest(path).files
            for name, entry in sorted(files.items()):
                verify_file(path, name, entry)
            print(f"{path.name}: ok, {len(files)} files, {_size(sum(e.bytes for e in files.values()))}")
        except Damaged as error:
            bad += 1
            print(f"damaged: {error}")
    return 1 if bad else 0


def _convert(args: argparse.Namespace) -> int:
    from safetensors.torch import save_file

    from moe_cl.engine.checkpoint import foreign, start
    from moe_cl.engine.checkpoint.format import Damaged, Reader

    if args.to.suffix != ".safetensors":
        raise ConfigError(f"{args.to}: the file to write must end in .safetensors")
    found = start.checkpoint_at(args.dir)
    try:
        if found is not None:
            state = Reader(found).tree(args.what)
        elif foreign.is_deepspeed(args.dir):
            state = start.read_weights(args.dir)
        else:
            raise ConfigError(f"{args.dir}: neither a checkpoint of moe_cl nor one of DeepSpeed")
    except Damaged as error:
        raise ConfigError(f"checkpoint {error}") from None
    if not state:
        raise ConfigError(f"{found.name} has no {args.what}; choose --what student or teacher")
    save_file({name: value.contiguous() for name, value in state.items()}, args.to, {"from": str(args.dir.name)})
    print(f"{args.to}: {len(state)} tensors, {sum(v.numel() for v in state.values()):,} values")
    return 0


def _diff(args: argparse.Namespace) -> int:
    import torch

    from moe_cl.engine.checkpoint import start
    from moe_cl.engine.checkpoint.format import Damaged, Reader

    readers = []
    for path in (args.dir, args.other):
        found = start.checkpoint_at(path)
        if found is None:
            raise ConfigError(f"{path}: no complete checkpoint there")
        readers.append(Reader(found))
    one, other = readers
    names = [{n for n in r.manifest.tensors if not n.startswith("rng/")} for r in readers]
    differ = [f"{name}: only in {one.path}" for name in sorted(names[0] - names[1])]
    differ += [f"{name}: only in {other.path}" for name in sorted(names[1] - names[0])]
    try:
        for name in sorted(names[0] & names[1]):
            a, b = one.tensor(name), other.tensor(name)
            if a.shape != b.shape:
                differ.append(f"{name}: {tuple(a.shape)} and {tuple(b.shape)}")
            elif not torch.equal(a, b):
                distance = (a.double() - b.double()).abs().max().item()
                if not distance <= args.tolerance:
                    differ.append(f"{name}: largest difference {distance:.3g}")
    except Damaged as error:
        raise ConfigError(f"checkpoint {error}") from None
    print("\n".join(differ) if differ else f"{len(names[0])} tensors, all equal")
    return 1 if differ else 0


def _size(count: int) -> str:
    return f"{count / 1e9:.2f} GB" if count >= 1e9 else f"{count / 1e6:.2f} MB"
