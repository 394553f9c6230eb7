"""Backbones by name, and what every one of them returns."""

from __future__ import annotations

import difflib
import inspect
import typing
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any

from torch import Tensor

from moe_cl.comm import Comm
from moe_cl.config import ConfigError, ModelConfig, MoEConfig
from moe_cl.moe.router import Routing
from moe_cl.typed import Few, Width, convert

if TYPE_CHECKING:
    from torch import nn

    from moe_cl.models.backbone import Backbone


@dataclass
class Encoded:
    """What a backbone gives for a list of views (R resolutions, view-major rows).

    features: (V*B, D) pooled, all resolutions concatenated. regions: one (V_r*B, T_r, D) a resolution.
    routing: routing[r][l] = Routing of MoE layer l at resolution r (empty lists without MoE).
    """

    features: Tensor
    regions: list[Tensor] = field(default_factory=list)
    routing: list[list[Routing]] = field(default_factory=list)


_TINY, _SMALL = {"dim": 192, "heads": 3}, {"dim": 384, "heads": 12}  # MoCo v3's S has 12 heads, DeiT's 6
_BASE, _LARGE = {"dim": 768, "heads": 12}, {"dim": 1024, "heads": 16, "depth": 24}
_CONV = {"conv_stem": True, "depth": 11}
_DEIT = {"pos_embed": "learned", "init": "deit", "freeze_patch": False}

VITS: dict[str, dict[str, Any]] = {
    "vit": {},
    "vit_tiny": _TINY,
    "vit_small": _SMALL,
    "vit_base": _BASE,
    "vit_large": _LARGE,
    "vit_conv_small": _SMALL | _CONV,
    "vit_conv_base": _BASE | _CONV,
    "deit_tiny": _TINY | _DEIT,
    "deit_small": _DEIT | {"dim": 384, "heads": 6},
    "deit_base": _BASE | _DEIT,
    "vmoe_small": _SMALL,
    "vmoe_base": _BASE,
}
_STEM = {"cifar_stem": True}
RESNETS: dict[str, dict[str, Any]] = {
    "resnet18": {},
    "resnet34": {},
    "resnet50": {},
    "resnet101": {},
    "resnet18_cifar": _STEM,
    "resnet50_cifar": _STEM,
}
_SWIN_T = {"dim": 96, "depths": [2, 2, 6, 2], "heads": [3, 6, 12, 24]}
_SWIN_S = _SWIN_T | {"depths": [2, 2, 18, 2]}
_SWIN_B = _SWIN_S | {"dim": 128, "heads": [4, 8, 16, 32]}
_SWIN_L = _SWIN_S | {"dim": 192, "heads": [6, 12, 24, 48]}
SWINS: dict[str, dict[str, Any]] = {"swin": {}} | {
    name + suffix: sizes | {"window": window}
    for name, sizes in {
        "swin_tiny": _SWIN_T,
        "swin_small": _SWIN_S,
        "swin_base": _SWIN_B,
        "swin_large": _SWIN_L,
    }.items()
    for suffix, window in (("", 7), ("_w7", 7), ("_w14", 14))
}
_NOT_OPTIONS = {"self", "moe_blocks", "moe_of", "norm", "drop_path", "variant"}


def backbone_names() -> list[str]:
    """Every name that ``build_backbone`` knows."""
    return [*VITS, *RESNETS, *SWINS]


def build_backbone(
    name: str,
    *,
    moe: MoEConfig | None = None,
    moe_factory: Callable[..., nn.Module] | None = None,
    drop_path: float = 0.0,
    activation_checkpointing: bool = False,
    channels_last: bool = False,
    compile: bool = False,
    comm: Comm | None = None,
    bn_groups: int = 1,
    **options: Any,
) -> Backbone:
    """A backbone with attribute ``dim``; ``forward(views, keys, counts)`` -> ``Encoded``.

    Args:
        name: see ``backbone_names``. ``vmoe_*`` puts experts into the odd blocks unless ``moe.blocks`` says otherwise.
        moe: experts of a ViT; None or ``blocks: none`` = dense.
        moe_factory: ``moe_factory(dim=, layer=, moe=)`` -> layer; None = ``SparseMLP`` with all experts here.
        drop_path: rate of the last block (linear from 0); a teacher takes 0.
        activation_checkpointing: blocks are computed again in the backward.
        channels_last: memory format of convolutions.
        compile: torch.compile of the dense blocks.
        comm: ranks that share batch-norm statistics; None = each its own. bn_groups: split batch norm on one rank.
        options: the network's own (dim, depth, heads, patch_size, img_size, ...; see ``ViT``, ``ResNet``, ``Swin``).

    Raises:
        ConfigError: unknown name or option (with the nearest one), or sizes that do not fit.
    """
    from moe_cl.models.norm import BatchNorm

    norm = partial(BatchNorm, comm=comm, groups=bn_groups)
    if name in VITS:
        from moe_cl.models.vit import ViT as kind

        sizes, fixed = VITS[name], {"norm": norm, "drop_path": drop_path}
        depth = convert(Few, options.get("depth", sizes.get("depth", 12)), "model.options.depth")
        moe = moe or MoEConfig()
        blocks = moe_blocks("odd" if name.startswith("vmoe") and moe.blocks == "none" else moe.blocks, depth)
        if blocks:
            dim = convert(Width, options.get("dim", sizes.get("dim", 384)), "model.options.dim")
            if round(dim * moe.hidden_ratio) < 1:
                raise ConfigError(
                    f"moe.hidden_ratio {moe.hidden_ratio:g} of the width {dim} gives experts without a hidden unit; "
                    f"raise it to {1 / dim:.2g} or more"
                )
            fixed |= {
                "moe_blocks": blocks,
                "moe_of": lambda layer: (moe_factory or _local)(dim=dim, layer=layer, moe=moe),
            }
    elif name in RESNETS or name in SWINS:
        if moe is not None and moe.blocks != "none":
            raise ConfigError(
                f"moe.blocks={moe.blocks}: experts live in ViT blocks, {name} has none; use moe.blocks=none"
            )
        if name in SWINS:
            from moe_cl.models.swin import Swin as kind

            sizes, fixed = SWINS[name], {"drop_path": drop_path}
        else:
            from moe_cl.models.resnet import ResNet as kind

            if drop_path:
                raise ConfigError(f"model.drop_path={drop_path}: {name} has no residual branches to drop; set it to 0")
            sizes, fixed = RESNETS[name], {"norm": norm, "variant": name.removesuffix("_cifar")}
    else:
        raise ConfigError(f"unknown backbone {name!r}{nearest(name, backbone_names())}")
    known = set(inspect.signature(kind.__init__).parameters) - _NOT_OPTIONS
    for key in options:
        if key not in known:
            raise ConfigError(
                f"backbone {name} has no option {key!r}{nearest(key, known)}; it has {', '.join(sorted(known))}"
            )
    hints = typing.get_type_hints(kind.__init__, include_extras=True)
    options = {key: convert(hints[key], value, f"model.options.{key}") for key, value in options.items()}
    backbone = kind(**(sizes | fixed | options))
    backbone.activation_checkpointing = activation_checkpointing
    if channels_last:
        import torch

        backbone.to(memory_format=torch.channels_last)
        backbone.channels_last = True
    if compile:
        backbone.compile_blocks()
    return backbone


def from_config(
    model: ModelConfig,
    moe: MoEConfig | None = None,
    *,
    moe_factory: Callable[..., nn.Module] | None = None,
    comm: Comm | None = None,
    teacher: bool = False,
) -> Backbone:
    """The backbone of a run's config; a teacher has no drop-path and keeps no graph (esvit.md 1.1).

    Raises:
        ConfigError: as ``build_backbone``; and ``vmoe_*`` without experts (a run says where they are).
    """
    if model.backbone.startswith("vmoe") and (moe is None or moe.blocks in ("none", [])):
        raise ConfigError(f"{model.backbone} has experts: set moe.blocks (odd, all or a list)")
    return build_backbone(
        model.backbone,
        moe=moe,
        moe_factory=moe_factory,
        drop_path=0.0 if teacher else model.drop_path,
        activation_checkpointing=model.activation_checkpointing and not teacher,
        channels_last=model.channels_last,
        compile=model.compile,
        comm=comm,
        **model.options,
    )


def moe_blocks(blocks: str | list[int], depth: int) -> list[int]:
    """Indices of the blocks with experts: ``none``, ``odd``, ``all`` or a list of them."""
    named = {"none": [], "odd": list(range(1, depth, 2)), "all": list(range(depth))}
    if isinstance(blocks, str):
        if blocks not in named:
            raise ConfigError(f"moe.blocks={blocks}: use none, odd, all or a list of block numbers")
        return named[blocks]
    wrong = [b for b in blocks if not 0 <= b < depth]
    if wrong or len(set(blocks)) < len(blocks):
        raise ConfigError(f"moe.blocks={blocks}: each number once, from 0 to {depth - 1}")
    return sorted(blocks)


def nearest(name: str, names: Iterable[str]) -> str:
    """``; did you mean X?``, or nothing."""
    close = difflib.get_close_matches(name, list(names), n=1, cutoff=0.4)
    return f"; did you mean {close[0]}?" if close else ""


def _local(*, dim: int, layer: int, moe: MoEConfig) -> nn.Module:
    from moe_cl.moe.experts import SparseMLP

    return SparseMLP(dim, moe, layer, None, 0)
