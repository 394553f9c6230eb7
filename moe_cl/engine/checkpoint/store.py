"""The directory of checkpoints: staging, commit by rename, pointer, retention.

OUT/checkpoints/
  latest                     the newest one's name, put there by os.replace
  step-00001234/             complete: a directory of this name never exists half written
    manifest.json            sizes, sha256, where each tensor's pieces lie; written last
    extra.json  config.yaml  cursor, schedules, loss scale; the recipe
    student-00000.safetensors  teacher-00000...  optimizer-00000...  method-00000...  rng-00000...
  .staging-TOKEN-step-00001300/   being written by this run; a dead run's is removed by the next
  damaged-step-00001200/     did not pass verification when a run continued: no rule counts or deletes it
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from moe_cl.config import CheckpointConfig, ConfigError
from moe_cl.engine.checkpoint.format import MANIFEST, read_manifest, sync_directory

POINTER = "latest"


def root(out: str | Path) -> Path:
    """The checkpoints' directory of a run."""
    return Path(out) / "checkpoints"


def directory_name(step: int) -> str:
    """``step-00001234``."""
    return f"step-{step:08d}"


def step_of(path: Path) -> int:
    """1234 of ``step-00001234``."""
    return int(path.name.split("-")[1])


def complete(out: str | Path) -> list[Path]:
    """Complete checkpoints of a run, newest first."""
    found = [p for p in root(out).glob("step-*") if p.name[5:].isdigit() and (p / MANIFEST).is_file()]
    return sorted(found, key=step_of, reverse=True)


def latest_complete(out: str | Path) -> Path | None:
    """The newest complete checkpoint of a run directory, or None."""
    return next(iter(complete(out)), None)


def staging(out: str | Path, token: str, step: int) -> Path:
    """Where a checkpoint is written before it is complete."""
    return root(out) / f".staging-{token}-{directory_name(step)}"


def remove_leftovers(out: str | Path, but: Path | None = None) -> None:
    """Delete what is half written and will not be finished: all of it but ``but`` (the caller owns the out dir)."""
    for path in root(out).glob(".staging-*"):
        if path != but:
            shutil.rmtree(path, ignore_errors=True)
    for path in root(out).glob(".removed-*"):
        shutil.rmtree(path, ignore_errors=True)


def commit(stage: Path, step: int) -> Path:
    """Turn a staged directory, manifest inside, into a checkpoint: fsync, rename, fsync, pointer."""
    final = stage.parent / directory_name(step)
    sync_directory(stage)
    if final.exists():
        # The same step again (a run that went back and passed it anew): the old one goes only now.
        _remove(final)
    os.rename(stage, final)
    sync_directory(stage.parent)
    _point_to(final)
    return final


def _point_to(path: Path) -> None:
    pointer = path.parent / f".{POINTER}.tmp"
    with open(pointer, "w") as file:
        file.write(path.name + "\n")
        file.flush()
        os.fsync(file.fileno())
    os.replace(pointer, path.parent / POINTER)
    sync_directory(path.parent)


def aside(path: Path) -> Path:
    """The name of a damaged checkpoint that was set aside."""
    return path.with_name(f"damaged-{path.name}")


def set_aside(damaged: list[Path], good: Path) -> None:
    """Rename checkpoints that did not pass verification, so that they take no good one's place among those kept;
    ``good`` is the newest again. Raises OSError."""
    for path in damaged:
        shutil.rmtree(aside(path), ignore_errors=True)  # an earlier life's, of the same step
        os.rename(path, aside(path))
    if damaged:
        _point_to(good)


def retain(out: str | Path, cfg: CheckpointConfig, committed: Path) -> list[Path]:
    """Delete checkpoints that no rule keeps (``committed`` just now, the last k, every n steps, the best); returns
    those deleted."""
    paths = complete(out)
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
