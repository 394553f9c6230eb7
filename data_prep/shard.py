"""``shard``: any source to tar shards, in parallel, the same bytes for any number of workers; goes on after a kill.

Order of writing: the plan's fingerprint, shards (each under a temporary name, its index, then its own name), and last
dataset.json. So a shard that has its name is complete and is not written again, and a folder without dataset.json is an
unfinished run, which the same command continues.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
from collections import Counter
from dataclasses import asdict
from pathlib import Path
from typing import Any

from data_prep import parallel
from data_prep.claim import claim, is_complete
from data_prep.console import byte_text, note, table
from data_prep.encode import prepare
from data_prep.manifest import shard_entry, write_split
from data_prep.plan import Plan, Settings, make_plan
from data_prep.sources import KINDS, Source, SourceOptions, open_source
from data_prep.writer import ShardFile
from moe_cl.arguments import whole
from moe_cl.config import ConfigError
from moe_cl.data.header import BadImage
from moe_cl.data.index import DATASET, ShardIndex, load_index, read_dataset

_UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of the verb."""
    parser.add_argument("source", help=KINDS)
    parser.add_argument("--out", required=True, metavar="DIR", help="folder of the shards; splits share one")
    parser.add_argument("--name", help="first part of the shards' names (default: from the source)")
    parser.add_argument("--split", default="train", help="train, val, test, ... (default: %(default)s)")
    parser.add_argument("--max-count", type=whole(1), default=10_000, help="samples a shard (default: %(default)s)")
    parser.add_argument("--max-size", type=parse_bytes, default="256M", help="bytes a shard (default: %(default)s)")
    parser.add_argument(
        "--shuffle-seed", type=whole(0), default=0, help="of the order over all shards (default: %(default)s)"
    )
    parser.add_argument(
        "--keep-order", action="store_true", help="do not shuffle; dataset.json says so, the loader warns"
    )
    parser.add_argument(
        "--workers", type=whole(1), default=_cores(), metavar="N", help="processes (default: %(default)s)"
    )
    parser.add_argument(
        "--resize-shorter", type=whole(1), metavar="S", help="shrink the shorter side to S pixels (JPEG)"
    )
    parser.add_argument(
        "--quality", type=int, default=90, metavar="Q", help="of re-encoded JPEGs (default: %(default)s)"
    )
    parser.add_argument("--labels", metavar="FILE", help="ground-truth list of a flat tar or folder")
    parser.add_argument(
        "--devkit", metavar="PATH", help="ILSVRC2012 devkit: synsets, and the list if --labels is absent"
    )
    parser.add_argument("--root", metavar="DIR", help="folder of a table's paths, or of torchvision's files")
    parser.add_argument("--overwrite", action="store_true", help="replace shards of the split that another plan wrote")
    parser.add_argument("--dry-run", action="store_true", help="say what would be written, write nothing")


def run(args: argparse.Namespace) -> int:
    """The verb. Raises ConfigError."""
    _check(args)
    source = open_source(args.source, SourceOptions(args.split, args.labels, args.devkit, args.root))
    for line in source.notes:
        note(line)
    settings = Settings(
        name=args.name or re.sub(r"[^A-Za-z0-9_.-]+", "_", source.name) or "images",
        split=args.split,
        max_count=args.max_count,
        max_size=args.max_size,
        shuffle_seed=None if args.keep_order else args.shuffle_seed,
        resize_shorter=args.resize_shorter,
        quality=args.quality,
    )
    plan = make_plan(source.items, settings)
    out = Path(args.out)
    _describe(source, plan, out)
    if args.dry_run:
        return 0
    return write_shards(source, plan, out, args.workers, args.overwrite)


def write_shards(source: Source, plan: Plan, out: Path, workers: int, overwrite: bool = False) -> int:
    """Writes what of the plan is not there yet, then dataset.json. Raises ConfigError."""
    settings = plan.settings
    out.mkdir(parents=True, exist_ok=True)
    _check_classes(source, out, settings.split)
    with claim(out, plan, overwrite):
        _write_missing(source, plan, out, workers)
        indexes = [load_index(str(out / plan.file(s))) for s in range(plan.shards)]
        entry = _entry(source, plan, indexes)
        if not entry["samples"]:
            raise ConfigError(f"{source.text}: not one file is an image ({entry['skipped'][0]['reason']})")
        write_split(out, settings.split, entry)
    skipped = entry["skipped"]
    for row in skipped[:20]:
        note(f"left out: {row['name']}: {row['reason']}")
    more = f", {len(skipped)} left out ({DATASET} names them)" if skipped else ""
    print(f"{out}: {entry['samples']:,} samples in {plan.shards} shards{more}")
    return 0


def _check_classes(source: Source, out: Path, split: str) -> None:
    """A label means the same in all splits of a folder. A set that lacks a class would number the rest anew."""
    for other, entry in (read_dataset(str(out)) or {"splits": {}})["splits"].items():
        theirs, ours = entry.get("class_names") or [], list(source.class_names)
        if other != split and theirs and ours and theirs != ours:
            differ = sorted(set(theirs) ^ set(ours))
            what = f"{differ[0]} is in one of them only" if differ else "their order differs"
            raise ConfigError(
                f"{out}: classes are numbered otherwise in its split {other} ({what}); make them alike (an empty "
                "folder counts), or choose another --out"
            )


def _write_missing(source: Source, plan: Plan, out: Path, workers: int) -> None:
    missing = [s for s in range(plan.shards) if not is_complete(out / plan.file(s))]
    if len(missing) < plan.shards:
        note(f"{plan.shards - len(missing)} of {plan.shards} shards are complete already")
    _check_space(out, sum(plan.item(slot).size for s in missing for slot in plan.slots(s)))
    total = sum(len(plan.slots(s)) for s in missing)
    for _ in parallel.run(_write_shard, (source.reader, plan, out), missing, workers, "sharding", total):
        pass


def _write_shard(shared: tuple[Any, Plan, Path], counter: Any, shard: int) -> None:
    """One shard; samples that no reader takes are left out, and its index says which and why."""
    reader, plan, out = shared
    settings, slots = plan.settings, plan.slots(shard)
    reader.prepare([plan.item(slot) for slot in slots])
    file, bad, pending = ShardFile(out / plan.file(shard)), [], 0
    try:
        for slot in slots:
            item = plan.item(slot)
            try:
                sample = reader.read(item)
                image, ext, width, height = prepare(sample.image, settings.resize_shorter, settings.quality)
            except BadImage as error:
                bad.append((_text(item.name), str(error)))
            else:
                row = {
                    "name": _text(item.name),
                    "label": item.label,
                    "width": width,
                    "height": height,
                    "json": sample.json,
                }
                file.add(f"{slot:09d}", ext, image, row, sample.extra)
            pending += 1
            if pending == 64:
                counter.add(pending)
                pending = 0
        counter.add(pending)
        file.close(bad)
    except BaseException:
        file.discard()
        raise


def _text(name: str) -> str:
    """A file name that may not be UTF-8, as text that JSON can hold."""
    return name.encode("utf-8", "replace").decode()


def _entry(source: Source, plan: Plan, indexes: list[ShardIndex]) -> dict[str, Any]:
    counts: Counter[int] = Counter()
    for index in indexes:
        counts.update(index.label.tolist())
    settings = asdict(plan.settings)
    return {
        "samples": sum(len(index) for index in indexes),
        "classes": len([label for label in counts if label >= 0]),
        "class_names": list(source.class_names),
        "class_counts": {str(label): counts[label] for label in sorted(counts) if label >= 0},
        "unlabelled": counts[-1],
        "shuffled": plan.settings.shuffle_seed is not None,
        "source": source.text,
        "settings": settings,
        "fingerprint": plan.fingerprint,
        "skipped": [{"name": name, "reason": reason} for index in indexes for name, reason in index.skipped],
        "shards": [shard_entry(plan.file(s), index) for s, index in enumerate(indexes)],
    }


def _check(args: argparse.Namespace) -> None:
    if not 1 <= args.quality <= 100:
        raise ConfigError("--quality is a number from 1 to 100")
    for option, text in (("--split", args.split), ("--name", args.name or "x")):
        if not re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9_.-]*", text) or len(text) > 60:
            raise ConfigError(f"{option} {text!r}: use letters, digits, dot, dash and underscore")


def _check_space(out: Path, needed: int) -> None:
    free = shutil.disk_usage(out).free
    if needed > free:
        raise ConfigError(f"{out}: about {byte_text(needed)} to write, {byte_text(free)} free; choose another --out")


def _describe(source: Source, plan: Plan, out: Path) -> None:
    counts = plan.class_counts()
    labelled = len(counts) - (-1 in counts)
    size = sum(item.size for item in source.items)
    order = "source's order" if plan.settings.shuffle_seed is None else f"shuffled, seed {plan.settings.shuffle_seed}"
    rows = [
        ("source", source.text),
        ("samples", len(source.items)),
        ("classes", labelled),
        ("without a label", counts[-1]),
        ("bytes", byte_text(size)),
        ("order", order),
        ("shards", plan.shards),
        ("first", str(out / plan.file(0))),
        ("last", str(out / plan.file(plan.shards - 1))),
    ]
    table(("", plan.settings.split), rows)


def parse_bytes(text: str) -> int:
    """``256M``, ``1.5G``, ``1000`` -> bytes (decimal units)."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT]?)B?", text.strip().upper())
    if match is None:
        raise argparse.ArgumentTypeError(f"{text!r} is no size; write 256M or 1.5G")
    return int(float(match.group(1)) * _UNITS[match.group(2)])


def _cores() -> int:
    return len(os.sched_getaffinity(0))
