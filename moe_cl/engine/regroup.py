"""Settings that follow the number of ranks: what one says on some ranks, another says on others.

Batch norm of a rank's own over ``params.bn_groups`` G parts has the groups of G ranks without; the groups of
``engine.statistics`` ``published`` (one a rank) are those of ``group: N`` with the N images of a rank's micro-batch.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from moe_cl import config as settings
from moe_cl.config import ConfigError, RunConfig
from moe_cl.engine.checkpoint import store
from moe_cl.engine.checkpoint.format import read_manifest

PARTS, STATISTICS = "params.bn_groups", "engine.statistics"


def spelled(statistics: Any) -> Any:
    """``group:64`` of an older version's settings as they are written now."""
    return settings.EngineConfig(statistics=statistics).statistics if isinstance(statistics, str) else statistics


def saved(out: str | Path) -> tuple[dict[str, Any], int] | None:
    """Flat settings and number of ranks of the newest checkpoint that says both; None without one."""
    for path in store.complete(out):
        try:
            world = read_manifest(path).world
            return settings.flatten(settings.read_yaml(path / "config.yaml")), world
        except (ConfigError, OSError):  # damaged, or of another version: loading says what is wrong
            continue
    return None


def check(cfg: RunConfig, ranks: int, micro: int) -> None:
    """A resumed run keeps its groups, however it says them. ``micro``: images of a rank's micro-batch. Raises
    ConfigError."""
    if not cfg.resume or (found := saved(cfg.out)) is None:
        return
    (was, before), now = found, settings.flatten(settings.to_tree(cfg))
    if PARTS in now and was.get(PARTS, now[PARTS]) != now[PARTS] and was[PARTS] * before != now[PARTS] * ranks:
        raise ConfigError(
            f"{cfg.out} holds a run with {PARTS}={was[PARTS]} on {before} ranks, {PARTS}={now[PARTS]} on {ranks} are "
            f"other groups of batch norm: ranks x {PARTS} stays {was[PARTS] * before} when {PARTS} changes"
        )
    theirs, mine = spelled(was.get(STATISTICS, now[STATISTICS])), now[STATISTICS]
    if theirs != mine and _images(theirs, _micro(was, before)) != _images(mine, micro):
        raise ConfigError(
            f"{cfg.out} holds a run with {STATISTICS}={theirs!r} (micro-batch {_micro(was, before)}), {mine!r} "
            f"(micro-batch {micro}) are other groups: keep {_images(theirs, _micro(was, before))!r}"
        )


def _images(statistics: Any, micro: int) -> Any:
    return f"group: {micro}" if statistics == "published" else statistics


def _micro(flat: dict[str, Any], ranks: int) -> int:
    share = flat.get("batch.global_batch", 0) // ranks
    return flat.get("batch.micro_batch") or share // (flat.get("batch.accumulation") or 1)
