"""A backbone in a folder, for inference and for others: ``model.safetensors``, ``config.json`` and a model card.

``config.json`` holds the settings under the key ``moe_cl``; other keys belong to other libraries (timm's hub layout).
Experts are full stacks (E, ...), so a folder knows nothing of the ranks that trained it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from moe_cl.config import ConfigError, ModelConfig, MoEConfig, ViewsConfig, build
from moe_cl.models.build import from_config

CONFIG, WEIGHTS, CARD = "config.json", "model.safetensors", "README.md"
VERSION = 1


@dataclass
class Settings:
    """What a backbone is: network, experts, the images it expects (size and normalisation), and where it is from."""

    model: ModelConfig = field(default_factory=ModelConfig)
    moe: MoEConfig = field(default_factory=MoEConfig)
    views: ViewsConfig = field(default_factory=ViewsConfig)
    source: dict[str, Any] = field(default_factory=dict)  # recipe, method, step, which, or the imported file

    def backbone(self) -> nn.Module:
        """Freshly initialised, all experts here. Raises ConfigError."""
        experts = self.moe if self.moe.blocks not in ("none", []) else None
        return from_config(self.model, experts, teacher=True)


def is_folder(path: Path) -> bool:
    """True for a folder that ``save`` wrote."""
    try:
        return "moe_cl" in json.loads((path / CONFIG).read_text())
    except (OSError, ValueError, TypeError):
        return False


def save(
    folder: Path, state: Mapping[str, Tensor], settings: Settings, card: str, more: Mapping[str, Any] | None = None
) -> None:
    """Write a folder. ``state``: the backbone's tensors; ``more``: further keys of ``config.json``.

    Raises:
        ConfigError: the folder holds something else already, or cannot be written.
    """
    if folder.exists() and not is_folder(folder) and (not folder.is_dir() or any(folder.iterdir())):
        raise ConfigError(f"{folder}: there is something else; give a new or empty folder")
    own = {
        "version": VERSION,
        "model": {k: v for k, v in asdict(settings.model).items() if k in ("backbone", "options")},
        "moe": asdict(settings.moe) | {"ep_size": 1},
        "views": {"size": settings.views.size, "normalize": settings.views.normalize},
        "source": settings.source,
    }
    try:
        folder.mkdir(parents=True, exist_ok=True)
        save_file({n: v.detach().cpu().contiguous() for n, v in state.items()}, folder / WEIGHTS, {"format": "pt"})
        (folder / CONFIG).write_text(json.dumps({**(more or {}), "moe_cl": own}, indent=1) + "\n")
        (folder / CARD).write_text(card)
    except (OSError, SafetensorError) as error:
        raise ConfigError(f"{folder}: cannot be written ({error})") from None


def read_settings(folder: Path) -> Settings:
    """The settings of a folder. Raises ConfigError."""
    if not is_folder(folder):
        raise ConfigError(f"{folder}: no {CONFIG} of an exported encoder there")
    tree = json.loads((folder / CONFIG).read_text())["moe_cl"]
    if not isinstance(tree, dict) or tree.get("version") != VERSION:
        raise ConfigError(f"{folder / CONFIG}: not of version {VERSION}; export it again with this version of moe_cl")
    kinds = {"model": ModelConfig, "moe": MoEConfig, "views": ViewsConfig}
    parts = {name: build(kind, tree.get(name, {}), f"{name}.") for name, kind in kinds.items()}
    return Settings(**parts, source=tree.get("source", {}))


def read_state(folder: Path) -> dict[str, Tensor]:
    """The tensors of a folder as they are named there. Raises ConfigError."""
    try:
        return load_file(folder / WEIGHTS)
    except (OSError, SafetensorError) as error:
        raise ConfigError(f"{folder / WEIGHTS}: no readable safetensors file ({error})") from None


def load(folder: Path) -> tuple[nn.Module, Settings]:
    """Backbone with its weights, and its settings. Raises ConfigError: nothing there, damaged, or of another model."""
    settings, state = read_settings(folder), swin_from_timm(read_state(folder))
    with torch.random.fork_rng(devices=[]):
        module = settings.backbone()
    try:
        module.load_state_dict(state)
    except RuntimeError as error:
        reason = " ".join(str(error).split())[:300]
        raise ConfigError(f"{folder / WEIGHTS}: not the network that {CONFIG} describes ({reason})") from None
    return module, settings


def swin_from_timm(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """timm's Swin merges at the start of a stage, EsViT's (and ours) at the end of the one before; others stay."""
    first = "layers.0.downsample.reduction.weight"  # ours merge in stage 0, timm's never
    if not any(n.startswith("layers.1.downsample.") for n in state) or first in state:
        return dict(state)
    return {_moved(name, -1): value for name, value in state.items()}


def swin_to_timm(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The other way."""
    return {_moved(name, 1): value for name, value in state.items()}


def _moved(name: str, by: int) -> str:
    parts = name.split(".")
    if parts[0] == "layers" and parts[1].isdigit() and parts[2:3] == ["downsample"]:
        parts[1] = str(int(parts[1]) + by)
    return ".".join(parts)
