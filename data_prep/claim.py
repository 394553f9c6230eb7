"""Who may write a split's shards in a folder: one run at a time, and only over shards of the same plan."""

from __future__ import annotations

import fcntl
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from data_prep.manifest import write_split
from data_prep.plan import Plan
from moe_cl.config import ConfigError
from moe_cl.data.index import load_index, read_dataset


@contextmanager
def claim(out: Path, plan: Plan, overwrite: bool) -> Iterator[None]:
    """Holds the split's names in the folder: one run at a time, and only over shards of the same plan.

    ``NAME-SPLIT.plan`` has the fingerprint of an unfinished run and carries the lock; the end of the run removes it.
    """
    settings = plan.settings
    prefix = f"{settings.name}-{settings.split}"
    marker = out / f"{prefix}.plan"
    with open(marker, "a+") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ConfigError(f"{out}: another run is writing {prefix} right now; wait for it") from None
        lock.seek(0)
        split = (read_dataset(str(out)) or {"splits": {}})["splits"].get(settings.split)
        theirs = lock.read().strip() or (split or {}).get("fingerprint")
        named = re.compile(re.escape(prefix) + r"-\d{6}\.tar")
        present = {p.name for p in out.iterdir() if named.fullmatch(p.name)}
        if (present or split) and theirs != plan.fingerprint:
            if not overwrite:
                if theirs == (split or {}).get("fingerprint"):
                    marker.unlink()
                raise ConfigError(
                    f"{out} holds {settings.split} shards of another source or other settings; choose another --out, "
                    "or give --overwrite"
                )
            if split:
                write_split(out, settings.split, None)
            for name in present | {s["file"] for s in (split or {"shards": []})["shards"]}:
                (out / name).unlink(missing_ok=True)
                (out / name).with_suffix(".index.json").unlink(missing_ok=True)
        for part in out.glob(f"{prefix}-*.part"):
            part.unlink()
        lock.truncate(0)
        lock.write(plan.fingerprint)
        lock.flush()
        yield
        marker.unlink()


def is_complete(path: Path) -> bool:
    """Whether it is a shard that has its name and the size that its index says."""
    if not path.is_file():
        return False
    try:
        return load_index(str(path)).bytes == path.stat().st_size
    except ConfigError:
        return False
