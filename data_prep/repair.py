"""``lint --fix``: shards with bad samples are written again without these; index and dataset.json follow."""

from __future__ import annotations

import hashlib
import io
import os
import tarfile
from collections import Counter
from pathlib import Path
from typing import Any

from data_prep.checks import ShardReport
from data_prep.manifest import shard_entry, write_split
from data_prep.writer import MTIME
from moe_cl.data.index import BrokenTar, read_dataset, save, scan
from moe_cl.data.scan import is_unsafe, split_member, walk

SHARD_KINDS = {"truncated_tar", "wrong_index", "wrong_hash", "no_index"}


def repair(reports: list[ShardReport], drop: frozenset[str] | set[str]) -> list[dict[str, Any]]:
    """Rewrites what has to be; returns ``{shard, kept, dropped}`` for each shard that was touched.

    Args:
        drop: kinds of findings whose sample goes. Truncated tars keep their whole samples; where only the index or the
            hash was wrong, the tar stays as it is and these are made anew.
    """
    out = []
    for report in reports:
        bad = {f.key for f in report.findings if f.kind in drop}
        shard_kinds = {f.kind for f in report.findings} & SHARD_KINDS
        path = Path(report.url)
        if (not bad and not shard_kinds) or not path.exists():
            continue
        if bad or "truncated_tar" in shard_kinds:
            kept, dropped = _rewrite(path, bad)
        else:
            kept, dropped = len(report.rows), 0
        index = scan(str(path))
        with open(path, "rb") as f:
            index.sha256 = hashlib.file_digest(f, "sha256").hexdigest()
        save(index, path)
        out.append({"shard": report.url, "kept": kept, "dropped": dropped})
    for folder in sorted({Path(line["shard"]).parent for line in out}):
        _update_manifest(folder, {Path(line["shard"]).name for line in out})
    return out


def _rewrite(path: Path, bad: set[str]) -> tuple[int, int]:
    """(samples kept, dropped). Members of good samples keep name, order and bytes."""
    part = path.with_name(path.name + ".part")
    keys: dict[str, bool] = {}
    length = path.stat().st_size
    with open(path, "rb") as stream, tarfile.open(part, "w", format=tarfile.PAX_FORMAT) as tar:
        pending: list[tarfile.TarInfo] = []

        def flush() -> None:
            for m in pending:
                stream.seek(m.offset_data)
                info = tarfile.TarInfo(m.name)
                info.size, info.mtime, info.mode, info.uname, info.gname = m.size, MTIME, 0o444, "root", "root"
                tar.addfile(info, io.BytesIO(stream.read(m.size)))

        current = None
        try:
            for member in walk(stream, str(path)):
                parts = None if member.isdir() else split_member(member.name)
                if parts is None:
                    continue
                if parts[0] != current:
                    flush()
                    pending, current = [], parts[0]
                    # A key that comes back is the second half of a broken sample: it went with the first.
                    keys[parts[0]] = parts[0] not in bad and parts[0] not in keys
                if keys[parts[0]] and not is_unsafe(member):
                    pending.append(member)
        except BrokenTar:
            if any(m.offset_data + m.size > length for m in pending):
                keys[current], pending = False, []
        flush()
    os.replace(part, path)
    return sum(keys.values()), len(keys) - sum(keys.values())


def _update_manifest(folder: Path, touched: set[str]) -> None:
    """Counts and hashes of the touched shards in dataset.json and the files for other loaders."""
    from moe_cl.data.index import load_index

    for name, entry in (read_dataset(str(folder)) or {"splits": {}})["splits"].items():
        if touched & {s["file"] for s in entry["shards"]}:
            indexes = {s["file"]: load_index(str(folder / s["file"])) for s in entry["shards"]}
            labels = Counter(label for index in indexes.values() for label in index.label.tolist())
            entry["shards"] = [shard_entry(file, index) for file, index in indexes.items()]
            entry["samples"] = sum(len(index) for index in indexes.values())
            entry["class_counts"] = {str(label): labels[label] for label in sorted(labels) if label >= 0}
            entry["classes"], entry["unlabelled"] = len(entry["class_counts"]), labels[-1]
            write_split(folder, name, entry)
