"""``subset``: parts of a data set as lists of names, which every evaluation takes, and as shards of their own.

A stratified part takes, from each class, the first samples of one order that the seed gives. So 1 % lies inside 10 %,
and n samples a class inside n + 1, for the same seed; another seed is another draw.
"""

from __future__ import annotations

import argparse
import json
import re
from collections import Counter
from pathlib import Path

import numpy as np

from data_prep.console import note, table
from data_prep.plan import Settings, make_plan
from data_prep.shard import write_shards
from data_prep.sources.tars import open_shards
from moe_cl.arguments import whole
from moe_cl.config import ConfigError
from moe_cl.data.index import Dataset, resolve, write_atomic

FORMAT = "moe_cl.subset"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of the verb."""
    parser.add_argument(
        "pattern", help="labelled shards, as the loader takes them (folder, FOLDER/SPLIT, brace pattern)"
    )
    parser.add_argument("--out", required=True, metavar="DIR", help="folder of the lists")
    kind = parser.add_mutually_exclusive_group(required=True)
    kind.add_argument("--fraction", help="stratified parts: 0.01,0.1")
    kind.add_argument("--per-class", help="nested few-shot splits: 1,2,4,8 samples a class")
    kind.add_argument("--names", metavar="FILE", help="a file of names, as SimCLR publishes its 1%% and 10%% lists")
    kind.add_argument(
        "--classes", metavar="FILE", help="a file of class names, as the ImageNet-100 lists are published"
    )
    parser.add_argument("--seeds", default="0", help="of --fraction and --per-class: 0,1,2 (default: %(default)s)")
    parser.add_argument("--shards", metavar="DIR", help="write the part as shards too (one part only)")
    parser.add_argument("--workers", type=whole(1), default=1, metavar="N", help="for --shards (default: %(default)s)")


def run(args: argparse.Namespace) -> int:
    """The verb. Raises ConfigError."""
    dataset = resolve(args.pattern)
    names, labels = read_columns(dataset)
    parts = choose(args, dataset, names, labels)
    if args.shards and len(parts) > 1:
        raise ConfigError(f"--shards writes one part, but {len(parts)} were asked for; ask for one")
    out = Path(args.out)
    out.mkdir(parents=True, exist_ok=True)
    rows = []
    for part, ids in parts.items():
        counts = Counter(labels[ids].tolist())
        lines = [names[i] for i in ids]
        tree = {"format": FORMAT, "source": args.pattern, "samples": len(ids), "classes": sorted(counts),
                "ids": ids.tolist(), "names": lines, "labels": labels[ids].tolist()}  # fmt: skip
        write_atomic(out / f"{part}.txt", "".join(f"{line}\n" for line in lines))
        write_atomic(out / f"{part}.json", json.dumps(tree, separators=(",", ":")) + "\n")
        rows.append((part, len(ids), len(counts), min(counts.values()), max(counts.values())))
    table(("part", "samples", "classes", "fewest", "most"), rows, title=str(out))
    if args.shards:
        part, ids = next(iter(parts.items()))
        _write(args, part, ids, renumber=args.classes is not None)
    return 0


def read_columns(dataset: Dataset) -> tuple[list[str], np.ndarray]:
    """Names (keys where the index has no name) and labels (N,) of all samples, in the order of their ids."""
    names: list[str] = []
    labels = []
    for shard in range(len(dataset.shards)):
        index = dataset.index(shard)
        names += [name or key for name, key in zip(index.names, index.keys, strict=True)]
        labels.append(index.label)
    return names, np.concatenate(labels)


def choose(args: argparse.Namespace, dataset: Dataset, names: list[str], labels: np.ndarray) -> dict[str, np.ndarray]:
    """Part name -> ascending sample ids (int64)."""
    if args.names:
        return {Path(args.names).stem: by_names(_lines(args.names), names, args.names)}
    if args.classes:
        return {Path(args.classes).stem: by_classes(_lines(args.classes), dataset.class_names, labels, args.classes)}
    if not (labels >= 0).any():
        raise ConfigError(f"{args.pattern} has no labels; --fraction and --per-class need them")
    parts = {}
    seeds = _numbers(args.seeds, "--seeds", int)
    if min(seeds, default=-1) < 0:
        raise ConfigError(f"--seeds {args.seeds}: whole numbers from 0, separated by commas")
    for seed in seeds:
        for fraction in _numbers(args.fraction, "--fraction", float):
            percent = f"{100 * fraction:g}".replace(".", "_")
            parts[f"{percent}percent-seed{seed}"] = stratified(labels, fraction, seed)
        for count in _numbers(args.per_class, "--per-class", int):
            parts[f"{count}shot-seed{seed}"] = few_shot(labels, count, seed)
    return parts


def ranks(labels: np.ndarray, seed: int) -> np.ndarray:
    """(N,) place of each sample in its class's random order, from 0; unlabelled samples get the largest int64."""
    draw = np.random.Philox(key=seed).random_raw(len(labels))  # raw bits: the same in every numpy
    order = np.lexsort((draw, labels))
    ordered = labels[order]
    first = np.searchsorted(ordered, ordered)  # where each one's class begins
    out = np.empty(len(labels), np.int64)
    out[order] = np.arange(len(labels)) - first
    out[labels < 0] = np.iinfo(np.int64).max
    return out


def stratified(labels: np.ndarray, fraction: float, seed: int) -> np.ndarray:
    """``fraction`` of every class, rounded, at least one: ascending ids (int64)."""
    if not 0 < fraction <= 1:
        raise ConfigError(f"--fraction {fraction}: a number above 0, at most 1")
    counts = np.bincount(labels[labels >= 0])
    quota = np.maximum(np.floor(counts * fraction + 0.5).astype(np.int64), counts > 0)
    keep = ranks(labels, seed) < quota[np.maximum(labels, 0)]
    return np.flatnonzero(keep & (labels >= 0))


def few_shot(labels: np.ndarray, count: int, seed: int) -> np.ndarray:
    """``count`` samples of every class: ascending ids (int64). Raises ConfigError if a class has fewer."""
    counts = np.bincount(labels[labels >= 0])
    short = np.flatnonzero((counts > 0) & (counts < count))
    if count < 1 or len(short):
        which = f"; class {short[0]} has {counts[short[0]]}" if len(short) else ""
        raise ConfigError(f"--per-class {count}: every class must have that many{which}")
    return np.flatnonzero(ranks(labels, seed) < count)


def by_names(wanted: list[str], names: list[str], where: str) -> np.ndarray:
    """Ids of names; a name without a folder matches the last part. Raises ConfigError naming what is missing."""
    full = {name: i for i, name in enumerate(names)}
    base: dict[str, int] = {}
    twice = set()
    for i, name in enumerate(names):
        short = name.rsplit("/", 1)[-1]
        if short in base:
            twice.add(short)
        base[short] = i
        base.setdefault(re.sub(r"\.[^.]+$", "", short), i)
    ids, missing = [], []
    for name in wanted:
        found = full.get(name, base.get(name) if name not in twice else None)
        (missing if found is None else ids).append(name if found is None else found)
    if missing:
        raise ConfigError(
            f"{where}: {len(missing)} of {len(wanted)} names are not in the shards, the first {missing[0]}"
        )
    return np.unique(np.array(ids, np.int64))


def by_classes(wanted: list[str], class_names: tuple[str, ...], labels: np.ndarray, where: str) -> np.ndarray:
    """Ids of all samples of named classes. Raises ConfigError for a name that is no class."""
    numbers = {name: i for i, name in enumerate(class_names)}
    unknown = next((name for name in wanted if name not in numbers), None)
    if unknown is not None:
        raise ConfigError(f"{where}: {unknown} is no class of these shards (dataset.json lists {len(class_names)})")
    return np.flatnonzero(np.isin(labels, [numbers[name] for name in wanted]))


def _write(args: argparse.Namespace, part: str, ids: np.ndarray, renumber: bool) -> None:
    """The part as shards. Whole classes are numbered anew, 0 .. n-1 in sorted order, as the published lists mean."""
    if "::" in args.pattern:
        raise ConfigError("--shards takes one source, not several joined by ::")
    source = open_shards(args.pattern, f"{args.pattern} ({part})")
    if len(source.items) != len(resolve(args.pattern)):
        raise ConfigError(f"{args.pattern}: unsafe members in these shards; run `python -m data_prep lint --fix` first")
    items = [source.items[i] for i in ids]
    if renumber:
        labels = sorted({item.label for item in items})
        source.class_names = tuple(source.class_names[label] for label in labels)
        items = [item._replace(label=labels.index(item.label)) for item in items]
    source.items = items
    name = re.sub(r"[^A-Za-z0-9_.-]+", "_", f"{source.name}-{part}")
    write_shards(source, make_plan(items, Settings(name, "train")), Path(args.shards), args.workers)
    note(f"shards: {args.shards}")


def _lines(path: str) -> list[str]:
    """First word of each line that has one."""
    try:
        lines = [line.split()[0] for line in Path(path).read_text().splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError):
        raise ConfigError(f"{path}: no readable text file") from None
    if not lines:
        raise ConfigError(f"{path} is empty")
    return lines


def _numbers(text: str | None, option: str, kind: type) -> list:
    try:
        return [kind(part) for part in text.split(",")] if text else []
    except ValueError:
        raise ConfigError(f"{option} {text}: numbers separated by commas") from None
