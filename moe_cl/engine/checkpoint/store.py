"""The directory of checkpoints: staging, commit by rename, pointer, retention.

OUT/checkpoints/
  latest                     the newest one's name, put there by os.replace
  step-00001234/             complete: a directory of this name never exists half written
    manifest.json            sizes, sha256, where each tensor's pieces lie; written last
    extra.json  config.yaml  cursor, schedules, loss scale; the recipe
    student-00000.safetensors  teacher-00000...  optimizer-00000...  method-00000...  rng-00000...
  .staging-TOKEN-step-00001300/   being written by this run; a dead run's is removed by the next
  .replaced-step-00001234/   the old one while the same step is written again: it counts until the new one is there
  damaged-step-00001200/     did not pass verification when a run continued: no rule counts or deletes it
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
from pathlib import Path

from moe_cl.config import CheckpointConfig, ConfigError
from moe_cl.engine.checkpoint.format import MANIFEST, read_manifest, sync_directory

POINTER = "latest"
REPLACED = ".replaced-"
_NAME = re.compile(rf"({re.escape(REPLACED)})?step-[0-9]+")


def root(out: str | Path) -> Path:
    """The checkpoints' directory of a run."""
    return Path(out) / "checkpoints"


def directory_name(step: int) -> str:
    """``step-00001234``."""
    return f"step-{step:08d}"


def step_of(path: Path) -> int:
    """1234 of ``step-00001234``."""
    return int(path.name.rsplit("-", 1)[1])


def complete(out: str | Path) -> list[Path]:
    """Checkpoints of a run, newest first, by their directories alone: one that lost its manifest since is damaged like
    any other, and whoever reads it says so."""
    found = [p for p in root(out).glob("*step-*") if _NAME.fullmatch(p.name) and p.is_dir()]
    return sorted((p for p in found if _new(p) == p or not _new(p).exists()), key=step_of, reverse=True)


def _new(path: Path) -> Path:
    """Where the checkpoint stands, or will, that replaces ``path``; else ``path``."""
    return path.with_name(path.name.removeprefix(REPLACED))


def at(path: Path) -> list[Path]:
    """The checkpoint that ``path`` is, or those of a run (by its directory or ``checkpoints`` in it), newest first."""
    if (path / MANIFEST).is_file() or (_NAME.fullmatch(path.name) and path.is_dir() and not root(path).is_dir()):
        return [path]
    whole = path.resolve()
    return complete(path) or (complete(whole.parent) if whole.name == root(".").name else [])


def latest_complete(out: str | Path) -> Path | None:
    """The newest complete checkpoint of a run directory, or None."""
    return next(iter(complete(out)), None)


def staging(out: str | Path, token: str, step: int) -> Path:
    """Where a checkpoint is written before it is complete."""
    return root(out) / f".staging-{token}-{directory_name(step)}"


def remove_leftovers(out: str | Path, but: Path | None = None) -> None:
    """Delete what is half written and will not be finished, all of it but ``but``; what was to be replaced, and was
    not, gets its name back (the caller owns the out dir)."""
    for path in root(out).glob(f"{REPLACED}*"):
        with contextlib.suppress(OSError):  # nothing can be written there: it counts under this name too
            if not _new(path).exists():
                os.rename(path, _new(path))
            else:
                _remove(path)
    for path in (*root(out).glob(".staging-*"), *root(out).glob(".removed-*")):
        if path != but:
            shutil.rmtree(path, ignore_errors=True)


def commit(stage: Path, step: int) -> Path:
    """Turn a staged directory, manifest inside, into a checkpoint: fsync, rename, fsync, pointer. Raises OSError."""
    final = stage.parent / directory_name(step)
    old = final.with_name(REPLACED + final.name)
    sync_directory(stage)
    again = final.exists()
    if again:
        # The same step again (a run that went back and passed it anew): the old one goes when the new one is there.
        os.rename(final, old)
    try:
        os.rename(stage, final)
    except OSError:
        if again:
            os.rename(old, final)
        raise
    sync_directory(stage.parent)
    _point_to(final)
    if again:
        with contextlib.suppress(OSError):  # what stays of it goes at the next save
            _remove(old)
    return final


def _point_to(path: Path) -> None:
    """For people, nothing here reads it: a full disk, which has room for a name and not for this, costs it alone."""
    pointer = path.parent / f".{POINTER}.tmp"
    with contextlib.suppress(OSError):
        with open(pointer, "w") as file:
            file.write(path.name + "\n")
            file.flush()
            os.fsync(file.fileno())
        os.replace(pointer, path.parent / POINTER)
        sync_directory(path.parent)


def set_aside(path: Path, good: Path) -> Path:
    """Rename a checkpoint that did not pass verification, so that it takes no good one's place among those kept, and
    none that was set aside before goes; ``good`` is the newest again. Returns its new path. Raises OSError."""
    kept, number = path.with_name(f"damaged-{path.name}"), 1
    while kept.exists():  # an earlier life's, of the same step
        number += 1
        kept = path.with_name(f"damaged-{path.name}-{number}")
    os.rename(path, kept)
    _point_to(good)
    return kept


def retain(out: str | Path, cfg: CheckpointConfig, committed: Path) -> list[Path]:
    """Delete checkpoints that no rule keeps (``committed`` just now, the last k, every n steps, the best); returns
    those deleted. One without its manifest takes no place and stays."""
    paths = [path for path in complete(out) if (path / MANIFEST).is_file()]
    keep = {committed, *paths[: max(1, cfg.keep_last)]}
    if cfg.keep_every:
        keep.update(p for p in paths if step_of(p) % cfg.keep_every == 0)
    best = best_of(paths, cfg.keep_best) if cfg.keep_best else None
    gone = [p for p in paths if p not in keep and p != best]
    for path in gone:
        _remove(path)
    return gone


def best_of(paths: list[Path], metric: str) -> Path | None:
    """The checkpoint with the highest ``metric`` of its manifest (``-name``: the lowest)."""
    sign, name = (-1, metric[1:]) if metric.startswith("-") else (1, metric)
    scored = []
    for path in paths:
        try:
            value = read_manifest(path).metrics.get(name)
        except ConfigError:  # damaged, or of another format version: no metric of it is known
            continue
        if value is not None:
            scored.append((sign * value, step_of(path), path))
    return max(scored)[2] if scored else None


def _remove(path: Path) -> None:
    # Renamed first: a kill in the middle of the deletion leaves no directory that looks complete.
    hidden = path.parent / f".removed-{path.name}"
    shutil.rmtree(hidden, ignore_errors=True)
    os.rename(path, hidden)
    shutil.rmtree(hidden, ignore_errors=True)
