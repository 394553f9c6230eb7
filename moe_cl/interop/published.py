"""Files that others published, read as tensors only and renamed: which network, which sides, what else is in them.

Formats: MoCo v1/v2, JCL; MoCo v3; CR-MoE (one file, or the folder of one file a rank); EsViT and DINO (whole
checkpoints and bare backbones); timm's and torchvision's ResNets and ViTs, timm's Swins.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from moe_cl.config import ConfigError
from moe_cl.engine.checkpoint import foreign
from moe_cl.interop.official import split
from moe_cl.models.folder import swin_from_timm

# Tables that a network makes itself: published code saves them as buffers.
_DERIVED = re.compile(r".*\.(relative_position_index|relative_coords_table|attn_mask|mlp\.gate\.(mean|std))")
_EXPERT = re.compile(r".*\.experts\.(htoh4|h4toh)\.(weight|bias)")
_ENCODER = "encoder.layers.encoder_layer_"
_TORCHVISION_VIT = (
    ("class_token", "cls_token"), ("encoder.pos_embedding", "pos_embed"), ("conv_proj.", "patch_embed.proj."),
    ("encoder.ln.", "norm."), ("heads.", "head."), ("ln_1.", "norm1."), ("ln_2.", "norm2."),
    ("self_attention.in_proj_", "attn.qkv."), ("self_attention.out_proj.", "attn.proj."),
    ("mlp.linear_1.", "mlp.fc1."), ("mlp.linear_2.", "mlp.fc2."), ("mlp.0.", "mlp.fc1."), ("mlp.3.", "mlp.fc2."),
)  # fmt: skip


@dataclass
class Published:
    """``kind``: moco, mocov3, esvit (EsViT and DINO) or plain (a bare network). Backbone tensors of each side, by our
    names; ``left``: what is in the file and no part of a backbone (heads, queue); ``derived``: tables made anew."""

    kind: str
    student: dict[str, Tensor] = field(default_factory=dict)
    teacher: dict[str, Tensor] = field(default_factory=dict)
    left: list[str] = field(default_factory=list)
    derived: list[str] = field(default_factory=list)

    def side(self, which: str) -> tuple[str, dict[str, Tensor]]:
        """The side's name and backbone; ``auto`` is what its authors evaluate: EsViT's and DINO's teacher, else the
        student. Raises ConfigError."""
        if which == "auto":
            which = "teacher" if self.kind == "esvit" and self.teacher else "student"
        state = {"student": self.student, "teacher": self.teacher}[which]
        if not state:
            raise ConfigError(f"the file has no {which}; choose --which auto")
        return which, state


def read(path: Path) -> Published:
    """What the file (or CR-MoE's folder) holds. Raises ConfigError: absent, no weight file, or of nobody known."""
    if path.is_dir():
        return rename(_rank_files(path))
    if not path.is_file():
        raise ConfigError(f"{path}: no such file or directory")
    if path.suffix in (".npz", ".npy"):
        raise ConfigError(f"{path}: arrays for Detectron2 are not read back; export and import safetensors or timm")
    if not path.stat().st_size:
        raise ConfigError(f"{path}: no readable torch file (it is empty)")
    try:
        return rename(foreign.read_file(path) if path.suffix == ".safetensors" else foreign.read_torch(path))
    except ConfigError as error:
        text = str(error)
        raise ConfigError(text if text.startswith(str(path)) else f"{path}: {text}") from None


def rename(tree: Any) -> Published:
    """The parts of what a file held. Raises ConfigError for anything but tensors by name."""
    if isinstance(tree, Mapping) and any(isinstance(tree.get(k), Mapping) for k in ("student", "teacher")):
        sides = {k: _tensors(tree[k]) for k in ("student", "teacher") if isinstance(tree.get(k), Mapping)}
        out = Published("esvit")
        for name, state in sides.items():
            official = split({"student": state}).student
            setattr(out, name, _backbone(official, out, f"{name}."))
        return out
    for key in ("state_dict", "model"):
        if isinstance(tree, Mapping) and isinstance(tree.get(key), Mapping):
            tree = tree[key]
    state = _tensors(tree)
    if any(n.startswith(("encoder_q.", "base_encoder.")) for n in state):
        official = split(state)
        out = Published(official.kind, left=list(official.method))
        out.student = _backbone(official.student, out)
        out.teacher = _backbone(official.teacher, out, "teacher.")
        return out
    if all(n.startswith("backbone.") or n.startswith("head") for n in state):
        state = {n.removeprefix("backbone."): v for n, v in state.items()}
    if "class_token" in state:
        state = {_from_torchvision(n): v for n, v in state.items()}
    out = Published("plain")
    heads = ("fc.", "head.", "head_dense.", "heads.", "head_dist.")
    named = {(f"heads.{n}" if n.startswith(heads) else f"backbone.{n}"): v for n, v in swin_from_timm(state).items()}
    out.student = _backbone(named, out)
    return out


def _backbone(named: Mapping[str, Tensor], out: Published, prefix: str = "") -> dict[str, Tensor]:
    """Backbone tensors, and what is not one noted in ``out``."""
    state = {}
    for name, value in named.items():
        if _DERIVED.fullmatch(name):
            out.derived.append(prefix + name)
        elif name.startswith("backbone."):
            state[name.removeprefix("backbone.")] = value
        else:
            out.left.append(prefix + name)
    return state


def _tensors(tree: Any) -> dict[str, Tensor]:
    if not isinstance(tree, Mapping) or not tree or not all(isinstance(v, Tensor) for v in tree.values()):
        raise ConfigError("no weight file: it holds no state dict of tensors")
    if other := [name for name in tree if not isinstance(name, str)]:
        raise ConfigError(f"no weight file: a tensor of it is called {other[0]!r}, which is no name")
    for name, value in tree.items():
        if value.layout is not torch.strided or value.is_quantized or value.is_meta:
            raise ConfigError(f"{name} is quantised, sparse or without values; give a file of plain float weights")
    return {name.removeprefix("module."): value for name, value in tree.items()}


def _from_torchvision(name: str) -> str:
    if name.startswith(_ENCODER):
        number, _, rest = name.removeprefix(_ENCODER).partition(".")
        name = f"blocks.{number}.{rest}"
    for theirs, ours in _TORCHVISION_VIT:
        name = name.replace(theirs, ours)
    return name


def _rank_files(folder: Path) -> dict[str, Tensor]:
    """CR-MoE trained with experts over ranks: ``0.pth`` has everything, ``R.pth`` rank R's experts (crmoe.md 2.2)."""
    files = sorted((p for p in folder.glob("*.pth") if p.stem.isdigit()), key=lambda p: int(p.stem))
    if not files or [int(p.stem) for p in files] != list(range(len(files))):
        raise ConfigError(f"{folder}: give one file, or a folder with CR-MoE's 0.pth, 1.pth, ... of all ranks")
    trees = [foreign.read_torch(p) for p in files]
    states = [_tensors(t["state_dict"] if isinstance(t, Mapping) and "state_dict" in t else t) for t in trees]
    out = dict(states[0])
    for name in out:
        if _EXPERT.fullmatch(name):
            missing = [p.name for p, s in zip(files, states, strict=True) if name not in s]
            if missing:
                raise ConfigError(f"{folder / missing[0]}: {name} is missing")
            if len({s[name].shape[1:] for s in states}) > 1 or not out[name].dim():
                raise ConfigError(f"{folder}: {name} has other shapes in the ranks' files")
            out[name] = torch.cat([s[name] for s in states])
    return out
