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


def _count(state: Mapping[str, Tensor], pattern: str) -> int:
    found = [int(m[1]) for name in state if (m := re.match(pattern, name))]
    return 1 + max(found, default=-1)


def _vit(state: Mapping[str, Tensor], mocov3: bool) -> tuple[ModelConfig, MoEConfig, list[str]]:
    dim, depth = state["cls_token"].shape[-1], _count(state, r"blocks\.(\d+)\.")
    conv_stem = "patch_embed.proj.0.weight" in state
    first = state.get("patch_embed.proj.0.weight" if conv_stem else "patch_embed.proj.weight")
    if first is None or "pos_embed" not in state:
        raise ConfigError("a ViT without patch_embed.proj or pos_embed: such a network is not known here")
    patch, tokens = 16 if conv_stem else first.shape[-1], state["pos_embed"].shape[1] - 1
    grid = math.isqrt(tokens)
    if grid * grid != tokens:
        raise ConfigError(f"a ViT with {tokens + 1} positions: one class token and a square grid are known here")
    fixed = dim % 4 == 0 and torch.allclose(state["pos_embed"].float(), sincos(dim, grid, grid), atol=1e-4)
    heads = (12 if dim == 384 else _HEADS.get(dim, 12)) if mocov3 else _HEADS.get(dim, max(dim // 64, 1))
    options = {
        "dim": dim, "depth": depth, "heads": heads, "patch_size": patch, "img_size": grid * patch,
        "in_chans": first.shape[1], "pos_embed": "sincos" if fixed else "learned",
    }  # fmt: skip
    if conv_stem:
        options["conv_stem"] = True
    hidden = next((v.shape[0] for n, v in state.items() if n.endswith("mlp.fc1.weight")), None)
    if hidden is not None:
        options["mlp_ratio"] = hidden / dim
    assumed = [f"model.options.heads={heads}"]
    moe = MoEConfig()
    blocks = sorted({int(n.split(".")[1]) for n in state if n.endswith(".mlp.router.weight")})
    if blocks:
        at = f"blocks.{blocks[0]}.mlp"
        experts = state[f"{at}.router.weight"].shape[1]
        w1 = state.get(f"{at}.experts.w1")
        if w1 is None or len(w1) != experts:
            held = 0 if w1 is None else len(w1)
            raise ConfigError(f"{at} holds {held} of its {experts} experts: import the folder of all ranks' files")
        shazeer = f"{at}.router.noise_weight" in state
        moe = MoEConfig(blocks=blocks, experts=experts, top_k=min(2, experts), hidden_ratio=w1.shape[1] / dim)
        moe.gate = "shazeer" if shazeer else "vmoe"
        assumed.append(f"moe.top_k={moe.top_k}")
    return ModelConfig("vit", options), moe, assumed


def _swin(state: Mapping[str, Tensor]) -> tuple[ModelConfig, MoEConfig, list[str]]:
    stages = _count(state, r"layers\.(\d+)\.")
    table = "layers.{}.blocks.0.attn.relative_position_bias_table"
    proj = state["patch_embed.proj.weight"]
    side, _ = state[table.format(0)].shape
    hidden = state["layers.0.blocks.0.mlp.fc1.weight"].shape[0]
    options = {
        "dim": proj.shape[0],
        "depths": [_count(state, rf"layers\.{i}\.blocks\.(\d+)\.") for i in range(stages)],
        "heads": [state[table.format(i)].shape[1] for i in range(stages)],
        "window": (math.isqrt(side) + 1) // 2,
        "patch_size": proj.shape[2],
        "in_chans": proj.shape[1],
        "mlp_ratio": hidden / proj.shape[0],
    }
    return ModelConfig("swin", options), MoEConfig(), ["model.options.img_size=224"]


def _resnet(state: Mapping[str, Tensor]) -> tuple[ModelConfig, MoEConfig, list[str]]:
    counts = tuple(_count(state, rf"layer{i}\.(\d+)\.") for i in (1, 2, 3, 4))
    name = _RESNETS.get((*counts, "layer1.0.conv3.weight" in state))
    if name is None:
        raise ConfigError(f"a ResNet of {counts} blocks is not known here; resnet18, 34, 50 and 101 are")
    stem = state["conv1.weight"]
    options = {} if stem.shape[1] == 3 else {"in_chans": stem.shape[1]}
    if stem.shape[-1] == 3:
        options["cifar_stem"] = True
    return ModelConfig(name, options), MoEConfig(), []
