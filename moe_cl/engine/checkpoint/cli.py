"""``python -m moe_cl checkpoint ls|verify|convert|diff``."""

from __future__ import annotations

import argparse
import contextlib
import time
from pathlib import Path

from moe_cl.arguments import real
from moe_cl.config import ConfigError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The four verbs."""
    verbs = parser.add_subparsers(dest="action", metavar="ACTION", required=True)
    one = verbs.add_parser("ls", help="the complete checkpoints of a run")
    one.add_argument("dir", type=Path, help="run or checkpoint directory")
    one = verbs.add_parser("verify", help="check every file's size and sha256; exit code 1 if one is damaged")
    one.add_argument("dir", type=Path, help="run or checkpoint directory")
    one = verbs.add_parser("convert", help="one safetensors file of full tensors, all experts stacked")
    one.add_argument("dir", type=Path, help="checkpoint or run directory, or one that DeepSpeed wrote (weights only)")
    one.add_argument("to", type=Path, help="the .safetensors file to write")
    one.add_argument("--what", choices=("student", "teacher"), default="student")
    one = verbs.add_parser(
        "diff", help="what differs in two checkpoints: tensors, step counts, cursor, loss scale; exit code 1"
    )
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

    from moe_cl.engine.checkpoint.format import OtherVersion, read_manifest

    table, unread = Table("checkpoint", "written", "ranks", "files", "size", "metrics"), []
    for path in _found(args.dir):
        try:
            manifest = read_manifest(path)
        except ConfigError as error:
            what = "not read" if isinstance(error, OtherVersion) else "damaged"
            table.add_row(path.name, what, "", "", "", "")
            unread.append(f"{what}: {error}")
            continue
        written = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(manifest.created))
        size = sum(entry.bytes for entry in manifest.files.values())
        metrics = ", ".join(f"{name} {value:.4g}" for name, value in sorted(manifest.metrics.items()))
        table.add_row(path.name, written, str(manifest.world), str(len(manifest.files)), _size(size), metrics)
    Console().print(table)
    print("\n".join(unread), end="\n" if unread else "")  # whole lines: a column would cut them
    return 0


def _found(path: Path) -> list[Path]:
    from moe_cl.engine.checkpoint import store

    if paths := store.at(path):
        return paths
    raise ConfigError(f"{path}: no complete checkpoint there; give the directory of a run that has saved (its --out)")


def _verify(args: argparse.Namespace) -> int:
    from moe_cl.engine.checkpoint.format import OtherVersion, Reader

    bad = 0
    for path in _found(args.dir):
        try:
            reader = Reader(path)
            reader.verify()
            files = reader.manifest.files
            print(f"{path.name}: ok, {len(files)} files, {_size(sum(e.bytes for e in files.values()))}")
        except OtherVersion as error:
            bad += 1
            print(f"not read: {error}")
        except ConfigError as error:
            bad += 1
            print(f"damaged: {error}")
    return 1 if bad else 0


def _convert(args: argparse.Namespace) -> int:
    from moe_cl.engine.checkpoint import foreign, start
    from moe_cl.engine.checkpoint.format import Damaged, Reader, write_shard

    if args.to.suffix != ".safetensors":
        raise ConfigError(f"{args.to}: the file to write must end in .safetensors")
    if args.to.is_dir():
        raise ConfigError(f"{args.to} is a directory; name the file to write")
    found = start.checkpoint_at(args.dir)
    try:
        if found is not None:
            state = Reader(found).tree(args.what)
        elif foreign.is_deepspeed(args.dir):
            if args.what != "student":
                raise ConfigError(f"{args.dir}: DeepSpeed saved one network there, no {args.what}; leave --what out")
            state = start.read_weights(args.dir)
        else:
            raise ConfigError(f"{args.dir}: neither a checkpoint of moe_cl nor one of DeepSpeed")
    except Damaged as error:
        raise ConfigError(f"checkpoint {error}; take another") from None
    if not state:
        raise ConfigError(f"{found.name} has no {args.what}; choose --what student or teacher")
    part = args.to.with_name(f".{args.to.name}.part")
    try:
        write_shard(part, state, {"from": args.dir.name})
        part.replace(args.to)
    except OSError as error:
        with contextlib.suppress(OSError):
            part.unlink()
        raise ConfigError(f"{args.to}: cannot be written ({error.strerror or error}); choose another place") from None
    print(f"{args.to}: {len(state)} tensors, {sum(v.numel() for v in state.values()):,} values")
    return 0


def _diff(args: argparse.Namespace) -> int:
    from moe_cl.engine.checkpoint import diff, start
    from moe_cl.engine.checkpoint.format import Damaged, Reader

    readers = []
    try:
        for path in (args.dir, args.other):
            found = start.checkpoint_at(path)
            if found is None:
                raise ConfigError(f"{path}: no complete checkpoint there")
            readers.append(Reader(found))
        count, differ = diff.differences(*readers, args.tolerance)
    except Damaged as error:
        raise ConfigError(f"checkpoint {error}; take another") from None
    print("\n".join(differ) if differ else f"{count} tensors and the run's state, all equal")
    return 1 if differ else 0


def _size(count: int) -> str:
    return f"{count / 1e9:.2f} GB" if count >= 1e9 else f"{count / 1e6:.2f} MB"
