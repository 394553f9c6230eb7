"""The run that ``model.init_from`` goes on from, before anything is loaded: when it is needed, and what must be kept.

Learning rate, EMA and temperatures are functions of step and epoch. A run that goes on at another's step is on the same
curves only with its batch, its schedule and its steps an epoch; and it has to end later than that step.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml
from torch import nn

from moe_cl import config as settings
from moe_cl.config import ConfigError, RunConfig
from moe_cl.engine.checkpoint import restore, start, store
from moe_cl.engine.checkpoint.format import Damaged, Reader
from moe_cl.engine.checks import changed, has_moe, listed


def needed(cfg: RunConfig) -> bool:
    """False once the run has checkpoints of its own: it goes on from those, whether its source still exists or not."""
    return bool(cfg.model.init_from) and store.latest_complete(cfg.out) is None


def kept(cfg: RunConfig) -> str | None:
    """What ``model.init_from`` of a run with checkpoints of its own was: resuming it reads that no more, so the option
    may be left out, or be the recipe's."""
    path = Path(cfg.out) / "config.yaml"
    if not cfg.resume or store.latest_complete(cfg.out) is None or not path.is_file():
        return cfg.model.init_from
    return settings.flatten(settings.read_yaml(path)).get("model.init_from", cfg.model.init_from)


def fresh_names(cfg: RunConfig, names: list[str]) -> list[str]:
    """The student's parameters without a past (``optim.param_groups``), at a resume those of the run's start."""
    for path in store.complete(cfg.out) if cfg.resume else []:
        try:
            fresh = Reader(path).state().get("fresh")
        except ConfigError:  # loading passes over it as well
            continue
        if fresh is not None:
            return [name for name in names if name in set(fresh)]
    return start.fresh_names(cfg.model.init_from, names)


def check_own(cfg: RunConfig, modules: dict[str, nn.Module]) -> None:
    """At a resume, the run's newest checkpoint that can be read is of this network and optimizer. Raises ConfigError.

    ``modules``: by what a checkpoint calls them, with all experts; they may stand on meta tensors.
    """
    for reader in _readers(store.complete(cfg.out) if cfg.resume else []):
        restore.check_moments(reader, cfg.optim.name)
        for kind, module in modules.items():
            restore.check_names(reader, kind, restore.shapes(module))
        return


def cursor(cfg: RunConfig) -> dict[str, Any] | None:
    """The loader's state that this start goes on with, if that is in the middle of an epoch."""
    path = start.checkpoint_at(Path(cfg.model.init_from)) if needed(cfg) else None
    other = [] if path is None or _starts_anew(cfg, path) else [path]
    for reader in _readers((store.complete(cfg.out) if cfg.resume else []) or other):
        try:
            state = reader.state()["extra"].get("loader")
        except Damaged:  # loading passes over it as well
            continue
        return state if state and state.get("cursor") else None
    return None


def _readers(paths: list[Path]) -> Iterator[Reader]:
    for path in paths:
        with contextlib.suppress(Damaged):  # loading passes over it as well, and says so
            yield Reader(path)


def check_schedule(cfg: RunConfig, total: int, per_epoch: int) -> None:
    """Steps are left after the source's, and its curves are this run's. Raises ConfigError.

    Args:
        cfg: the run. total: its last step. per_epoch: its steps an epoch.
    """
    path = start.checkpoint_at(Path(cfg.model.init_from)) if needed(cfg) else None
    if path is None or _starts_anew(cfg, path):
        return
    step, was, theirs = _origin(path)
    end = "schedule.epochs, schedule.stop_epochs, schedule.max_steps"
    way = f"or start at step 0 from its weights: `checkpoint convert {cfg.model.init_from} FILE.safetensors`"
    if step >= total:
        raise ConfigError(
            f"model.init_from={cfg.model.init_from} has {step} steps and this run ends at {total}: none is left; "
            f"let it end later ({end}), {way}"
        )
    if was not in (None, per_epoch):
        raise ConfigError(
            f"model.init_from={cfg.model.init_from} has {was} steps an epoch, this run {per_epoch} (data.train, "
            f"data.repeat, batch.global_batch): its schedules would jump at step {step}; keep them, {way}"
        )
    if other := [change for change in changed(theirs, settings.to_tree(cfg)) if on_curve(change[0])]:
        raise ConfigError(
            f"model.init_from={cfg.model.init_from} was made with other settings ({listed(other)}): its schedules "
            f"would jump at step {step}; keep them, {way}"
        )


def on_curve(key: str) -> bool:
    """Whether a setting makes the curves of learning rate, decay, EMA or temperatures, at whose step a run goes on."""
    group, _, name = key.partition(".")
    return (
        group in ("schedule", "teacher")
        or key in ("batch.global_batch", "optim.base_lr", "optim.lr_scaling")
        or name.startswith("weight_decay")
        or (group == "params" and ("temperature" in name or name.startswith("warmup")))
    )


def _starts_anew(cfg: RunConfig, path: Path) -> bool:
    """True where dense blocks become experts (sparse upcycling): that run starts at step 0."""
    return has_moe(cfg) and not any(".experts." in n for n in Reader(path).names("student"))


def _origin(path: Path) -> tuple[int, int | None, dict[str, Any]]:
    """Step, steps an epoch and settings of a checkpoint's run; nothing where it does not say."""
    try:
        reader = Reader(path)
        extra = reader.state()["extra"]
        tree = yaml.safe_load(reader.check("config.yaml").read_text()) if "config.yaml" in reader.manifest.files else {}
    except (Damaged, OSError, ValueError, yaml.YAMLError) as error:
        raise ConfigError(f"model.init_from: checkpoint {' '.join(str(error).split())}; take another") from None
    return int(extra.get("step", reader.manifest.step)), extra.get("steps_per_epoch"), tree or {}
