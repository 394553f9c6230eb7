"""``index``: our indexes for shards that others made, checked against whatever counts they left beside them."""

from __future__ import annotations

import argparse
import hashlib
import itertools
import json
import os
from collections import Counter
from pathlib import Path
from typing import Any

from data_prep import parallel
from data_prep.console import note, table
from data_prep.manifest import OPEN_CLIP, TIMM, shard_entry, write_split
from moe_cl.arguments import whole
from moe_cl.config import ConfigError
from moe_cl.data.index import (
    BrokenTar,
    ShardIndex,
    expand,
    index_url,
    is_remote,
    load_index,
    read_dataset,
    save,
    scan,
)  # fmt: skip


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of the verb."""
    parser.add_argument("pattern", help="brace pattern of tars, or a folder of them")
    parser.add_argument(
        "--split", default="train", help="split of the tars that no file assigns (default: %(default)s)"
    )
    parser.add_argument("--shuffled", action="store_true", help="say that their samples lie in random order")
    parser.add_argument("--hash", action="store_true", help="sha256 of each tar too (reads all of it)")
    parser.add_argument("--force", action="store_true", help="build indexes that exist already again")
    parser.add_argument("--workers", type=whole(1), default=len(os.sched_getaffinity(0)), metavar="N")


def run(args: argparse.Namespace) -> int:
    """The verb. Raises ConfigError, also for a truncated tar; the indexes built before that stay."""
    if is_remote(args.pattern):
        raise ConfigError(f"{args.pattern}: run `index` where the shards lie, and upload the .index.json files too")
    folder, paths, known = find_shards(args.pattern, args.split)
    todo = [i for i, path in enumerate(paths) if args.force or not _there(path, args.hash)]
    for job, problem in parallel.run(_build, (paths, args.hash), todo, args.workers, "indexing", len(todo), "shards"):
        if problem:
            raise ConfigError(f"{problem}; `python -m data_prep lint --fix {paths[job]}` keeps its whole samples")
    indexes = {path: load_index(path) for path in paths}
    for path, index in indexes.items():
        said = known.get(os.path.basename(path), (None, None))[1]
        if said is not None and said != len(index):
            note(f"{path}: {len(index)} samples in the tar, {said} in the file beside it; the tar counts")
    if folder is not None:
        _write_manifest(folder, indexes, known, args)
    bad = Counter(fault for index in indexes.values() for fault in index.faults.values())
    rows = [
        ("shards", len(paths)),
        ("samples", sum(len(i) for i in indexes.values())),
        ("with a label", sum(int((i.label >= 0).sum()) for i in indexes.values())),
        ("header not readable", sum(int((i.width == 0).sum()) - len(i.faults) for i in indexes.values())),
        *((fault.replace("_", " "), count) for fault, count in sorted(bad.items())),
        ("groups without an image", sum(i.ignored for i in indexes.values())),
    ]
    table(("", args.pattern), rows)
    return 0


def find_shards(pattern: str, split: str) -> tuple[Path | None, list[str], dict[str, tuple[str, int | None]]]:
    """(folder if the pattern is one, tars, file name -> (split, count written beside it)). Raises ConfigError."""
    if not os.path.isdir(pattern):
        paths = expand(pattern)
        missing = next((p for p in paths if not os.path.isfile(p)), None)
        if missing:
            raise ConfigError(f"{missing} does not exist; check the shard pattern")
        return None, paths, read_counts(Path(paths[0]).parent, split)
    folder = Path(pattern)
    known = read_counts(folder, split)
    names = list(known) or sorted(p.name for p in folder.glob("*.tar"))
    missing = next((n for n in names if not (folder / n).is_file()), None)
    if missing:
        raise ConfigError(f"{folder / missing} is listed beside the shards but does not exist")
    if not names:
        raise ConfigError(f"{folder} has no .tar; give the folder of the shards, or a brace pattern")
    return folder, [str(folder / n) for n in names], known


def read_counts(folder: Path, split: str) -> dict[str, tuple[str, int | None]]:
    """Tar names with split and count, from timm's _info.json, open_clip's sizes.json or a wids JSON; else empty."""
    info = _json(folder / TIMM) or _json(folder / "info.json")
    if info and isinstance(info.get("splits"), dict):
        return {
            os.path.basename(file): (name, count)
            for name, entry in info["splits"].items()
            for file, count in itertools.zip_longest(entry["filenames"], entry.get("shard_lengths") or ())
        }
    sizes = _json(folder / OPEN_CLIP)
    if sizes:
        return {name: (split, count) for name, count in sizes.items() if name.endswith(".tar")}
    for path in sorted(folder.glob("*.json")):
        tree = _json(path)
        if tree and "wids_version" in tree and isinstance(tree.get("shardlist"), list):
            return {os.path.basename(s["url"]): (split, s.get("nsamples")) for s in tree["shardlist"]}
    return {}


def _there(path: str, want_hash: bool) -> bool:
    """Whether the tar has its index already, with its sha256 if that is wanted."""
    return os.path.exists(index_url(path)) and not (want_hash and not load_index(path).sha256)


def _build(shared: tuple[list[str], bool], counter: Any, job: int) -> str:
    paths, want_hash = shared
    try:
        index = scan(paths[job])
    except BrokenTar as error:
        return str(error)
    if want_hash:
        with open(paths[job], "rb") as f:
            index.sha256 = hashlib.file_digest(f, "sha256").hexdigest()
    save(index, paths[job])
    counter.add(1)
    return ""


def _write_manifest(folder: Path, indexes: dict[str, ShardIndex], known: dict, args: argparse.Namespace) -> None:
    """dataset.json for a folder that has none: counts from the tars, splits from the files of others. To one that is
    there it adds the hashes that it lacks."""
    if (tree := read_dataset(str(folder))) is not None:
        hashes = {os.path.basename(path): index.sha256 for path, index in indexes.items()}
        for split, entry in tree["splits"].items():
            lacking = [shard for shard in entry["shards"] if hashes.get(shard["file"]) and not shard.get("sha256")]
            for shard in lacking:
                shard["sha256"] = hashes[shard["file"]]
            if lacking:
                write_split(folder, split, entry)
        return
    splits: dict[str, list[str]] = {}
    for path in indexes:
        name = os.path.basename(path)
        splits.setdefault(known.get(name, (args.split, None))[0], []).append(path)
    for split, paths in splits.items():
        labels = Counter(label for p in paths for label in indexes[p].label.tolist())
        entry = {
            "samples": sum(len(indexes[p]) for p in paths),
            "classes": len([label for label in labels if label >= 0]),
            "class_names": [],
            "class_counts": {str(label): labels[label] for label in sorted(labels) if label >= 0},
            "unlabelled": labels[-1],
            "shuffled": True if args.shuffled else None,
            "source": "index",
            "shards": [shard_entry(os.path.basename(p), indexes[p]) for p in paths],
        }
        write_split(folder, split, entry)


def _json(path: Path) -> dict[str, Any] | None:
    try:
        tree = json.loads(path.read_text())
    except (OSError, ValueError):
        return None
    return tree if isinstance(tree, dict) else None
