"""The files beside the shards: dataset.json (ours), _info.json (timm) and sizes.json (open_clip). Written last."""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from moe_cl import __version__
from moe_cl.data.index import DATASET, ShardIndex, read_dataset, write_atomic

FORMAT = "moe_cl.dataset"
TIMM, OPEN_CLIP = "_info.json", "sizes.json"


def shard_entry(file: str, index: ShardIndex) -> dict[str, Any]:
    """What dataset.json says of one shard."""
    return {"file": file, "samples": len(index), "bytes": index.bytes, "sha256": index.sha256}


def write_split(folder: Path, split: str, entry: dict[str, Any] | None) -> None:
    """Add, replace or (None) remove a split in the three files; dataset.json, which says "complete", comes last."""
    with _locked(folder):
        tree = read_dataset(str(folder)) or {"splits": {}}
        splits = tree["splits"] | {split: entry}
        splits = {name: splits[name] for name in sorted(splits) if splits[name] is not None}
        write_atomic(folder / TIMM, _dump({"splits": {name: _timm(name, s) for name, s in splits.items()}}))
        write_atomic(folder / OPEN_CLIP, _dump({s["file"]: s["samples"] for e in splits.values() for s in e["shards"]}))
        head = {"format": FORMAT, "version": 1, "tool": f"moe_cl {__version__}"}
        write_atomic(folder / DATASET, _dump(head | {"splits": splits}))


def _timm(name: str, split: dict[str, Any]) -> dict[str, Any]:
    return {
        "name": name,
        "num_samples": split["samples"],
        "filenames": [s["file"] for s in split["shards"]],
        "shard_lengths": [s["samples"] for s in split["shards"]],
    }


def _dump(tree: dict[str, Any]) -> str:
    return json.dumps(tree, indent=1, ensure_ascii=False) + "\n"


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Two splits that end together write one after the other. The lock is on the folder itself: no file stays."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)
