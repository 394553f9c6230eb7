"""The frozen encoder of a run or an exported folder, for inference in one process: experts merged, no process group."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn

from moe_cl import config, methods
from moe_cl.comm import LocalComm
from moe_cl.config import ConfigError, RunConfig
from moe_cl.engine.checkpoint import store
from moe_cl.engine.checkpoint.format import MANIFEST, Damaged, Reader
from moe_cl.models import folder
from moe_cl.models.build import from_config


def run_config(out: Path) -> RunConfig:
    """The resolved config of the run in ``out`` (or of the checkpoint directory itself). Raises ConfigError."""
    path = out / "config.yaml"
    if not path.is_file():
        raise ConfigError(f"{out}: no config.yaml there; give a run's out directory or one of its checkpoints")
    if (out / MANIFEST).is_file():
        try:
            reader = Reader(out)
            if path.name in reader.manifest.files:
                reader.check(path.name)
        except Damaged as error:
            raise ConfigError(f"checkpoint {error}; take another") from None
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


def side(out: Path, which: str = "auto") -> str:
    """``teacher`` or ``student``: ``which``, or for ``auto`` the one that the method's authors evaluate.

    ``Method.evaluated`` says it; where a checkpoint holds only the other, that. A folder holds one. Raises ConfigError.
    """
    if folder.is_folder(out):
        held = folder.read_settings(out).source.get("which", "student")
        if which not in ("auto", held):
            raise ConfigError(f"{out} holds a {held}, no {which}; leave --which at auto")
        return held
    if which != "auto":
        return which
    path = checkpoint_of(out)
    own = methods.get(run_config(path).method).evaluated
    return own if Reader(path).names(own) else {"student": "teacher", "teacher": "student"}[own]


def load(out: Path, which: str = "auto") -> tuple[nn.Module, RunConfig, int]:
    """Backbone with a checkpoint's weights, the run's config and the checkpoint's step.

    Args:
        out: run directory, checkpoint directory, or a folder that ``export`` or ``import`` wrote.
        which: see ``side``.

    Raises:
        ConfigError: nothing there, damaged, or of another model.
    """
    if folder.is_folder(out):
        side(out, which)
        return _exported(out)
    path = checkpoint_of(out)
    cfg, reader = run_config(path), Reader(path)
    step = reader.manifest.step
    which = side(path, which)
    module = backbone(cfg)
    names = [name for name in reader.names(which) if name.startswith("backbone.")]
    if not names:
        raise ConfigError(f"{path.name} has no {which}; choose teacher or student")
    try:
        module.load_state_dict({name.removeprefix("backbone."): reader.tensor(f"{which}/{name}") for name in names})
    except Damaged as error:
        raise ConfigError(f"checkpoint {error}; take another") from None
    except RuntimeError as error:
        reason = " ".join(str(error).split())[:200]
        raise ConfigError(f"{path}: its {which} is not the model of its config.yaml ({reason}); take another") from None
    return module, cfg, step


def contrasted(out: Path, which: str) -> tuple[nn.Module, str]:
    """The encoder with its heads, ``which`` side, and the head whose output the method contrasts (its keys).

    Raises:
        ConfigError: an exported or imported folder, which has no heads, or a method without such a head.
    """
    if folder.is_folder(out):
        raise ConfigError(f"{out} holds a backbone without its projector: measure its features (--of features)")
    path = checkpoint_of(out)
    cfg, reader = run_config(path), Reader(path)
    names = reader.names(which)
    head = next((h for h in ("fc", "projector") if any(name.startswith(f"heads.{h}.") for name in names)), None)
    if head is None:
        raise ConfigError(f"{path.name}: its {which} has no keys to measure; take another --which, or --of features")
    method = methods.get(cfg.method)(cfg.params, LocalComm())
    module = (method.build_teacher if which == "teacher" else method.build_student)(backbone(cfg))
    try:
        module.load_state_dict(reader.tree(which))
    except Damaged as error:
        raise ConfigError(f"checkpoint {error}; take another") from None
    return module, head


def _exported(out: Path) -> tuple[nn.Module, RunConfig, int]:
    module, settings = folder.load(out)
    source = settings.source
    cfg = RunConfig(recipe=str(source.get("recipe", "")), out=str(out))
    cfg.model, cfg.moe, cfg.views = settings.model, settings.moe, settings.views
    return module, cfg, int(source.get("step", 0))
