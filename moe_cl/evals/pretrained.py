"""The frozen encoder of a run or an exported folder, for inference in one process: experts merged, no process group."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn

from moe_cl import config, methods
from moe_cl.comm import LocalComm
from moe_cl.config import ConfigError, RunConfig
from moe_cl.engine.checkpoint import store
from moe_cl.engine.checkpoint.format import Reader, read_manifest
from moe_cl.models import folder
from moe_cl.models.build import from_config


def run_config(out: Path) -> RunConfig:
    """The resolved config of the run in ``out`` (or of the checkpoint directory itself). Raises ConfigError."""
    path = out / "config.yaml"
    if not path.is_file():
        raise ConfigError(f"{out}: no config.yaml there; give a run's out directory or one of its checkpoints")
    return config.from_tree(config.read_yaml(path), methods.params_of)


def checkpoint_of(out: Path) -> Path:
    """``out`` if it is a checkpoint, else its newest complete one. Raises ConfigError."""
    path = out if (out / "manifest.json").is_file() else store.latest_complete(out)
    if path is None:
        raise ConfigError(f"{out}: no complete checkpoint there; let the run save one, or check the path")
    return path


def backbone(cfg: RunConfig) -> nn.Module:
    """A freshly initialised backbone as the run had at its start, with all experts here."""
    torch.manual_seed(cfg.seed)
    cfg.moe.ep_size = 1
    return from_config(
        cfg.model, cfg.moe if cfg.moe.blocks not in ("none", []) else None, comm=LocalComm(), teacher=True
    )


def load(out: Path, which: str = "auto") -> tuple[nn.Module, RunConfig, int]:
    """Backbone with a checkpoint's weights, the run's config and the checkpoint's step.

    Args:
        out: run directory, checkpoint directory, or a folder that ``export`` or ``import`` wrote.
        which: ``teacher``, ``student``, or ``auto``: the teacher where there is one.

    Raises:
        ConfigError: nothing there, damaged, or of another model.
    """
    if folder.is_folder(out):
        return _exported(out, which)
    path = checkpoint_of(out)
    cfg, reader, step = run_config(path), Reader(path), read_manifest(path).step
    if which == "auto":
        which = "teacher" if reader.names("teacher") else "student"
    module = backbone(cfg)
    names = [name for name in reader.names(which) if name.startswith("backbone.")]
    if not names:
        raise ConfigError(f"{path.name} has no {which}; choose teacher or student")
    module.load_state_dict({name.removeprefix("backbone."): reader.tensor(f"{which}/{name}") for name in names})
    return module, cfg, step


def _exported(out: Path, which: str) -> tuple[nn.Module, RunConfig, int]:
    module, settings = folder.load(out)
    source = settings.source
    if which != "auto" and which != source.get("which"):
        raise ConfigError(f"{out} holds a {source.get('which')}, no {which}; leave --which at auto")
    cfg = RunConfig(recipe=str(source.get("recipe", "")), out=str(out))
    cfg.model, cfg.moe, cfg.views = settings.model, settings.moe, settings.views
    return module, cfg, int(source.get("step", 0))
