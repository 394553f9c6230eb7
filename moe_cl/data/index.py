"""The data set that a pattern names: ordered shards, their counts, and where each sample lies.

    DIR/NAME-train-000000.tar          a shard: members KEY.jpg, KEY.cls, KEY.json, ...
    DIR/NAME-train-000000.index.json   columns, one row a sample: key, name, offset, size, ext, label, width, height
    DIR/dataset.json                   splits, counts, sizes, sha256, class names; written last, so it means "complete"

A sample's global id is its row counted over all shards of all sources, in the order given.
"""

from __future__ import annotations

import glob
import json
import os
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from braceexpand import UnbalancedBracesError, braceexpand

from moe_cl.config import ConfigError
from moe_cl.data.scan import BrokenTar, TruncatedTar, scan
from moe_cl.data.shard import (
    UNSAFE_MEMBER,
    ZERO_LENGTH,
    Shard,
    ShardIndex,
    index_url,
    is_remote,
    load_index,
    open_file,
    read_bytes,
    save,
    write_atomic,
)  # fmt: skip

__all__ = [
    "UNSAFE_MEMBER", "ZERO_LENGTH", "BrokenTar", "Dataset", "Shard", "ShardIndex", "Source", "TruncatedTar", "expand",
    "index_url", "is_remote", "load_index", "open_file", "read_bytes", "read_dataset", "resolve", "save", "scan",
    "write_atomic",
]  # fmt: skip

DATASET = "dataset.json"


@dataclass(frozen=True)
class Source:
    """One ``::`` part of a pattern: shards [start, stop) of the data set; ``shuffled`` is None where nobody said."""

    pattern: str
    start: int
    stop: int
    shuffled: bool | None = None
    class_names: tuple[str, ...] = ()


@dataclass
class Dataset:
    """Ordered shards of ordered sources; sample ids count over all of them."""

    shards: list[Shard]
    sources: list[Source]
    _loaded: dict[int, ShardIndex] = field(default_factory=dict, repr=False)

    @cached_property
    def starts(self) -> np.ndarray:
        """(shards + 1,) int64: id of each shard's first sample, and the number of samples at the end."""
        return np.concatenate([[0], np.cumsum([s.samples for s in self.shards], dtype=np.int64)])

    def __len__(self) -> int:
        return int(self.starts[-1])

    @property
    def class_names(self) -> tuple[str, ...]:
        """Of the first source that has them."""
        return next((s.class_names for s in self.sources if s.class_names), ())

    def locate(self, sample_id: int) -> tuple[int, int]:
        """(shard number, row) of a global sample id."""
        if not 0 <= sample_id < len(self):
            raise IndexError(f"sample {sample_id} of {len(self)}")
        shard = int(np.searchsorted(self.starts, sample_id, side="right")) - 1
        return shard, int(sample_id - self.starts[shard])

    def index(self, shard: int, keep: int = 8) -> ShardIndex:
        """The index of a shard; the last ``keep`` are held. Raises ConfigError if it disagrees with the count."""
        if shard not in self._loaded:
            found = load_index(self.shards[shard].url)
            if len(found) != self.shards[shard].samples:
                raise ConfigError(
                    f"{index_url(self.shards[shard].url)}: {len(found)} samples, but {DATASET} says "
                    f"{self.shards[shard].samples}; run `python -m data_prep index` on the folder"
                )
            while len(self._loaded) >= max(keep, 1):
                self._loaded.pop(next(iter(self._loaded)))
            self._loaded[shard] = found
        return self._loaded[shard]


def expand(pattern: str) -> list[str]:
    """Brace patterns (``{000000..000009}``, ``{a,b}``) and, for local paths, ``*``. Raises ConfigError."""
    try:
        urls = list(braceexpand(pattern, escape=False))
    except UnbalancedBracesError:
        raise ConfigError(f"{pattern}: braces do not match; write NAME-{{000000..000009}}.tar") from None
    out: list[str] = []
    for url in urls:
        if not is_remote(url) and any(c in url for c in "*?[") and not os.path.exists(url):
            found = sorted(glob.glob(url))
            if not found:
                raise ConfigError(f"no file matches {url}; check the pattern")
            out += found
        else:
            out.append(url)
    return out


def resolve(pattern: str) -> Dataset:
    """The data set that a pattern names. Raises ConfigError, one line, if it names none.

    Args:
        pattern: sources joined by ``::``. Each is a folder with dataset.json (``DIR``; ``DIR/SPLIT`` where it has
            several splits), or a brace pattern of tars, local or by URL.
    """
    if not pattern.strip():
        raise ConfigError("data.train is empty; give a folder made by `python -m data_prep shard`, or a brace pattern")
    if "://" in pattern and "***" in pattern:
        raise ConfigError(f"{pattern}: its credentials are not kept with the run; name the data set again, with them")
    shards: list[Shard] = []
    sources: list[Source] = []
    for part in pattern.split("::"):
        found, shuffled, names = _resolve_one(part.strip())
        sources.append(Source(part.strip(), len(shards), len(shards) + len(found), shuffled, names))
        shards += found
    dataset = Dataset(shards, sources)
    if not len(dataset):
        raise ConfigError(f"{pattern}: shards without a single sample")
    return dataset


def read_dataset(folder: str) -> dict[str, Any] | None:
    """``dataset.json`` of a folder, or None where there is none. Raises ConfigError if it is not ours."""
    where = f"{folder.rstrip('/')}/{DATASET}"
    try:
        tree = json.loads(read_bytes(where))
    except (FileNotFoundError, NotADirectoryError):
        return None
    except ConfigError:  # a ValueError too: the file is refused
        raise
    except (ValueError, RecursionError):
        raise ConfigError(f"{where}: not valid JSON") from None
    if not isinstance(tree, dict) or not isinstance(tree.get("splits"), dict):
        raise ConfigError(f"{where}: no `splits` in it; was it written by `python -m data_prep shard`?")
    for name, split in tree["splits"].items():
        if not _lists_shards(split):
            raise ConfigError(
                f"{where}: split {name!r} does not list its shards (file, samples, bytes of each); write it again with "
                "`python -m data_prep shard`, or give the tars as a brace pattern"
            )
    return tree


def _lists_shards(split: Any) -> bool:
    if not isinstance(split, dict) or not isinstance(split.get("shards"), list):
        return False
    kinds = {"file": str, "samples": int, "bytes": int}
    return all(isinstance(s, dict) and all(isinstance(s.get(k), t) for k, t in kinds.items()) for s in split["shards"])


def _resolve_one(pattern: str) -> tuple[list[Shard], bool | None, tuple[str, ...]]:
    if pattern.endswith("/" + DATASET):
        pattern = pattern[: -len(DATASET) - 1]
    if pattern.endswith(".tar") or "{" in pattern or (not is_remote(pattern) and any(c in pattern for c in "*?[")):
        return _from_tars(expand(pattern))
    folder = pattern.rstrip("/")
    tree = read_dataset(folder)
    if tree is not None:
        splits = tree["splits"]
        if not splits:  # the state between `--overwrite` and the new shards
            raise ConfigError(f"{folder}/{DATASET} names no split; give the `python -m data_prep shard` command again")
        if len(splits) != 1:
            first = "train" if "train" in splits else sorted(splits)[0]
            raise ConfigError(f"{folder} has the splits {', '.join(sorted(splits))}; write {folder}/{first}")
        return _from_split(folder, next(iter(splits.values())))
    parent, _, split = folder.rpartition("/")
    tree = None if not is_remote(folder) and os.path.isdir(folder) else read_dataset(parent or ".")
    if tree is not None:
        if split not in tree["splits"]:
            there = ", ".join(sorted(tree["splits"])) or "none"
            raise ConfigError(f"{parent or '.'} has no split {split!r}; it has {there}")
        return _from_split(parent or ".", tree["splits"][split])
    if is_remote(folder):
        raise ConfigError(f"{folder}: no {DATASET} there; give a brace pattern of its tars")
    if not os.path.isdir(folder):
        raise ConfigError(f"{folder} does not exist; make shards with `python -m data_prep shard SOURCE --out DIR`")
    if glob.glob(glob.escape(folder) + "/*.plan"):
        raise ConfigError(
            f"{folder}: sharding is not finished; give the same `python -m data_prep shard` command again"
        )
    tars = sorted(glob.glob(glob.escape(folder) + "/*.tar"))
    if not tars:
        within = sorted(Path(found).parent.name for found in glob.glob(glob.escape(folder) + f"/*/{DATASET}"))
        if within:
            first = "train" if "train" in within else within[0]
            raise ConfigError(f"{folder} has the data sets {', '.join(within)} in it; write {folder}/{first}")
        raise ConfigError(f"{folder} has neither {DATASET} nor a .tar; make shards with `python -m data_prep shard`")
    return _from_tars(tars)


def _from_split(folder: str, split: dict[str, Any]) -> tuple[list[Shard], bool | None, tuple[str, ...]]:
    shards = [Shard(f"{folder}/{s['file']}", s["samples"], s["bytes"], s.get("sha256", "")) for s in split["shards"]]
    for shard in shards:
        if not is_remote(shard.url) and not os.path.exists(shard.url):
            raise ConfigError(f"{shard.url} is in {DATASET} but not in the folder; run the sharder again")
        _check_bytes(shard.url)
    return shards, split.get("shuffled"), tuple(split.get("class_names") or ())


def _check_bytes(url: str) -> None:
    """A tar that is cut short is a fault the loader names and works around; one without a byte was never written."""
    if not is_remote(url) and os.path.getsize(url) == 0:
        raise ConfigError(f"{url} has no bytes: it was never written; make or copy the shard again")


def _from_tars(urls: list[str]) -> tuple[list[Shard], bool | None, tuple[str, ...]]:
    """Shards by name: counts from the dataset.json of their folder where it lists them, else from each index."""
    for url in urls:
        if not is_remote(url) and not os.path.isfile(url):
            raise ConfigError(f"{url} does not exist; check the shard pattern")
        _check_bytes(url)
    shards: list[Shard] = []
    folders: dict[str, dict[str, tuple[Shard, dict[str, Any]]]] = {}
    splits: list[dict[str, Any]] = []
    for url in urls:
        folder = url.rpartition("/")[0] or "."
        if folder not in folders:
            tree = read_dataset(folder) or {"splits": {}}
            folders[folder] = {s["file"]: (s, split) for split in tree["splits"].values() for s in split["shards"]}
        known = folders[folder].get(url.rpartition("/")[2])
        if known:
            shards.append(Shard(url, known[0]["samples"], known[0]["bytes"], known[0].get("sha256", "")))
            splits.append(known[1])
        else:
            index = load_index(url)
            shards.append(Shard(url, len(index), index.bytes, index.sha256))
    shuffled = {s.get("shuffled") for s in splits} if len(splits) == len(urls) else {None}
    names = tuple(splits[0].get("class_names") or ()) if splits else ()
    return shards, shuffled.pop() if len(shuffled) == 1 else None, names
