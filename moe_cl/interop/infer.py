"""Which network a backbone's tensors are: names and shapes say nearly all, the rest is named as an assumption."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping

import torch
from torch import Tensor

from moe_cl.config import ConfigError, ModelConfig, MoEConfig
from moe_cl.models.vit import sincos

_HEADS = {192: 3, 384: 6, 768: 12, 1024: 16, 1280: 16}  # DeiT, DINO, timm
_RESNETS = {
    (2, 2, 2, 2, False): "resnet18",
    (3, 4, 6, 3, False): "resnet34",
    (3, 4, 6, 3, True): "resnet50",
    (3, 4, 23, 3, True): "resnet101",
}


def infer(state: Mapping[str, Tensor], mocov3: bool = False) -> tuple[ModelConfig, MoEConfig, list[str]]:
    """Network, experts, and what the tensors cannot say but was assumed (each names its setting).

    Args:
        state: a backbone's tensors by our names, without ``backbone.``.
        mocov3: the file is MoCo v3's or CR-MoE's, whose ViT-S has 12 heads.

    Raises:
        ConfigError: no ViT, ResNet or Swin.
    """
    if "cls_token" in state:
        return _vit(state, mocov3)
    if "layers.0.blocks.0.attn.relative_position_bias_table" in state:
        return _swin(state)
    if "conv1.weight" in state and "layer1.0.conv1.weight" in state:
        return _resnet(state)
    raise ConfigError(f"no ViT, ResNet or Swin known here: its tensors are {', '.join(sorted(state)[:4])} ...")


def _shape(state: Mapping[str, Tensor], name: str, dims: int) -> list[int]:
    """The shape of tensor ``name``, which must have ``dims`` dimensions. Raises ConfigError."""
    if name not in state:
        raise ConfigError(f"{name} is missing: no whole network is in the file")
    shape = list(state[name].shape)
    if len(shape) != dims or 0 in shape:
        raise ConfigError(f"{name} has shape {tuple(shape)} where {dims} dimensions, none of them 0, are known")
    return shape


def _count(state: Mapping[str, Tensor], pattern: str) -> int:
    found = [int(m[1]) for name in state if (m := re.match(pattern, name))]
    return 1 + max(found, default=-1)


def _vit(state: Mapping[str, Tensor], mocov3: bool) -> tuple[ModelConfig, MoEConfig, list[str]]:
    dim, depth = _shape(state, "cls_token", 3)[2], _count(state, r"blocks\.(\d+)\.")
    conv_stem = "patch_embed.proj.0.weight" in state
    first = _shape(state, "patch_embed.proj.0.weight" if conv_stem else "patch_embed.proj.weight", 4)
    _, positions, width = _shape(state, "pos_embed", 3)
    patch, tokens = 16 if conv_stem else first[3], positions - 1
    grid = math.isqrt(tokens)
    if width != dim or not depth:
        raise ConfigError(f"a ViT of width {dim} with positions of width {width} and {depth} blocks is none")
    if grid * grid != tokens or not tokens:
        raise ConfigError(f"a ViT with {tokens + 1} positions: one class token and a square grid are known here")
    fixed = dim % 4 == 0 and torch.allclose(state["pos_embed"].float(), sincos(dim, grid, grid), atol=1e-4)
    heads = (12 if dim == 384 else _HEADS.get(dim, 12)) if mocov3 else _HEADS.get(dim, max(dim // 64, 1))
    options = {
        "dim": dim, "depth": depth, "heads": heads, "patch_size": patch, "img_size": grid * patch,
        "in_chans": first[1], "pos_embed": "sincos" if fixed else "learned",
    }  # fmt: skip
    if conv_stem:
        options["conv_stem"] = True
    dense = next((name for name in state if name.endswith("mlp.fc1.weight")), None)
    if dense is not None:
        options["mlp_ratio"] = _shape(state, dense, 2)[0] / dim
    assumed = [f"model.options.heads={heads}"]
    moe = MoEConfig()
    blocks = sorted({int(n.split(".")[1]) for n in state if n.endswith(".mlp.router.weight")})
    if blocks:
        at = f"blocks.{blocks[0]}.mlp"
        experts = _shape(state, f"{at}.router.weight", 2)[1]
        held, hidden, _ = _shape(state, f"{at}.experts.w1", 3)
        if held != experts:
            raise ConfigError(f"{at} holds {held} of its {experts} experts: import the folder of all ranks' files")
        shazeer = f"{at}.router.noise_weight" in state
        moe = MoEConfig(blocks=blocks, experts=experts, top_k=min(2, experts), hidden_ratio=hidden / dim)
        moe.gate = "shazeer" if shazeer else "vmoe"
        assumed.append(f"moe.top_k={moe.top_k}")
    return ModelConfig("vit", options), moe, assumed


def _swin(state: Mapping[str, Tensor]) -> tuple[ModelConfig, MoEConfig, list[str]]:
    stages = _count(state, r"layers\.(\d+)\.")
    table = "layers.{}.blocks.0.attn.relative_position_bias_table"
    dim, channels, patch, _ = _shape(state, "patch_embed.proj.weight", 4)
    side, _ = _shape(state, table.format(0), 2)
    hidden, _ = _shape(state, "layers.0.blocks.0.mlp.fc1.weight", 2)
    options = {
        "dim": dim,
        "depths": [_count(state, rf"layers\.{i}\.blocks\.(\d+)\.") for i in range(stages)],
        "heads": [_shape(state, table.format(i), 2)[1] for i in range(stages)],
        "window": (math.isqrt(side) + 1) // 2,
        "patch_size": patch,
        "in_chans": channels,
        "mlp_ratio": hidden / dim,
    }
    return ModelConfig("swin", options), MoEConfig(), ["model.options.img_size=224"]


def _resnet(state: Mapping[str, Tensor]) -> tuple[ModelConfig, MoEConfig, list[str]]:
    counts = tuple(_count(state, rf"layer{i}\.(\d+)\.") for i in (1, 2, 3, 4))
    name = _RESNETS.get((*counts, "layer1.0.conv3.weight" in state))
    if name is None:
        raise ConfigError(f"a ResNet of {counts} blocks is not known here; resnet18, 34, 50 and 101 are")
    _, channels, _, side = _shape(state, "conv1.weight", 4)
    options = {} if channels == 3 else {"in_chans": channels}
    if side != 3:
        return ModelConfig(name, options), MoEConfig(), []
    # A stem for small images: the kernel says so, its stride 1 and the missing pooling are no tensors.
    return ModelConfig(name, options | {"cifar_stem": True}), MoEConfig(), ["model.options.cifar_stem=True"]
