"""Swin transformers as EsViT runs them: any input size, zero-padding before the roll (esvit.md 1.9, 1.10).

timm's window attention, MLP and patch merging; the block is ours because timm rolls first and pads after, which at
crops that are no multiple of the window (96 px) gives other features and lets wrapped tokens see each other. Pad tokens
take part as keys, as published. State-dict names are EsViT's (downsample at the end of a stage); maps are (N, H, W, D).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import lru_cache, partial
from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import Mlp
from timm.models.swin_transformer import PatchMerging, WindowAttention, window_partition, window_reverse
from torch import Tensor, nn

from moe_cl.config import ConfigError
from moe_cl.models.backbone import Backbone, DropPath, drop_rates
from moe_cl.moe.router import Routing
from moe_cl.typed import Few, Pixels, Ratio, Width

LayerNorm = partial(nn.LayerNorm, eps=1e-6)


@lru_cache(maxsize=256)
def shift_mask(height: int, width: int, window: int, shift: int, device: torch.device) -> Tensor:
    """(windows, w*w, w*w): 0 inside one of the nine regions that the roll puts side by side, -100 between them."""
    cuts = (slice(0, -window), slice(-window, -shift), slice(-shift, None))
    region = torch.zeros(1, height, width, 1, device=device)
    for i, rows in enumerate(cuts):
        for j, cols in enumerate(cuts):
            region[:, rows, cols] = 3 * i + j
    region = window_partition(region, (window, window)).flatten(1)
    return (region[:, None] != region[:, :, None]).float() * -100.0


class SwinBlock(nn.Module):
    """Window attention and MLP on a map (N, H, W, D) of any size."""

    def __init__(self, dim: int, heads: int, window: int, shift: int, mlp_ratio: float, drop: float, index: int):
        super().__init__()
        self.window, self.shift = window, shift
        self.norm1 = LayerNorm(dim)
        self.attn = WindowAttention(dim, num_heads=heads, window_size=window)
        self.attn.fused_attn = False  # the plain form is bit-equal to the published one
        self.norm2, self.mlp = LayerNorm(dim), Mlp(dim, int(dim * mlp_ratio))
        self.drop1, self.drop2 = DropPath(drop, index, 0), DropPath(drop, index, 1)

    def windows(self, x: Tensor) -> tuple[Tensor, Tensor | None, int, int]:
        """Padded, rolled and cut: (N*windows, w*w, D), mask, padded height and width."""
        height, width = x.shape[1:3]
        x = F.pad(x, (0, 0, 0, -width % self.window, 0, -height % self.window))
        high, wide = x.shape[1:3]
        mask = None
        if self.shift:
            x = torch.roll(x, (-self.shift, -self.shift), (1, 2))
            mask = shift_mask(high, wide, self.window, self.shift, x.device).to(x.dtype)
        return window_partition(x, (self.window, self.window)).flatten(1, 2), mask, high, wide

    def _attend(self, x: Tensor) -> Tensor:
        height, width = x.shape[1:3]
        cut, mask, high, wide = self.windows(x)
        cut = self.attn(cut, mask).unflatten(1, (self.window, self.window))
        x = window_reverse(cut, (self.window, self.window), high, wide)
        if self.shift:
            x = torch.roll(x, (self.shift, self.shift), (1, 2))
        return x[:, :height, :width]

    def forward(self, x: Tensor, keys: Tensor | None) -> Tensor:
        x = x + self.drop1(self._attend(self.norm1(x)), keys)
        return x + self.drop2(self.mlp(self.norm2(x)), keys)

    def weights(self, x: Tensor) -> Tensor:
        """Attention weights (N*windows, h, w*w, w*w) of this block on its input map."""
        cut, mask, _, _ = self.windows(self.norm1(x))
        q, k, _ = self.attn.qkv(cut).unflatten(2, (3, self.attn.num_heads, -1)).permute(2, 0, 3, 1, 4).unbind()
        logits = (q * self.attn.scale) @ k.transpose(2, 3) + self.attn._get_rel_pos_bias()
        if mask is not None:
            logits = logits.unflatten(0, (-1, len(mask))) + mask[:, None]
            logits = logits.flatten(0, 1)
        return logits.softmax(-1)


class PatchEmbed(nn.Module):
    """(N, C, H, W) -> (N, H/p, W/p, D), normalised."""

    def __init__(self, channels: int, dim: int, patch: int):
        super().__init__()
        self.proj, self.norm = nn.Conv2d(channels, dim, patch, patch), LayerNorm(dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.proj(x.to(self.proj.weight.dtype)).permute(0, 2, 3, 1))


class Stage(nn.Module):
    """Blocks of one resolution, then the merging of 2x2 tokens (odd sizes padded) except after the last stage."""

    def __init__(self, blocks: list[SwinBlock], dim: int, last: bool):
        super().__init__()
        self.blocks = nn.ModuleList(blocks)
        self.downsample = None if last else PatchMerging(dim, 2 * dim, norm_layer=LayerNorm)


class Swin(Backbone):
    """Features = mean of the normed tokens of the last map, regions = these tokens.

    Args:
        dim: width of the first stage. depths, heads: of each stage. window: 7 or 14 (any).
        img_size: decides the windows once: a stage no larger than the window takes its own size and no shift.
        patch_size, in_chans, mlp_ratio, drop_path: as usual.
    """

    def __init__(
        self,
        *,
        dim: Width = 96,
        depths: Sequence[Few] = (2, 2, 6, 2),
        heads: Sequence[Few] = (3, 6, 12, 24),
        window: Few = 7,
        img_size: Pixels = 224,
        patch_size: Pixels = 4,
        in_chans: Few = 3,
        mlp_ratio: Ratio = 4.0,
        drop_path: float = 0.0,
    ):
        super().__init__()
        if len(depths) != len(heads) or any((dim << i) % h for i, h in enumerate(heads)):
            raise ConfigError(f"swin: heads {list(heads)} must be one a stage and divide widths {dim}, {2 * dim}, ...")
        self.patch_size = patch_size
        self.patch_embed = PatchEmbed(in_chans, dim, patch_size)
        rates, side = drop_rates(drop_path, sum(depths)), img_size // patch_size
        self.layers = nn.ModuleList()
        for i, (depth, h) in enumerate(zip(depths, heads, strict=True)):
            size, shift = (side, 0) if side <= window else (window, window // 2)
            start = sum(depths[:i])
            blocks = [
                SwinBlock(dim << i, h, size, shift * (j % 2), mlp_ratio, rates[start + j], start + j)
                for j in range(depth)
            ]
            self.layers.append(Stage(blocks, dim << i, last=i == len(depths) - 1))
            side = (side + 1) // 2
        self.dim = dim << (len(depths) - 1)
        self.norm = LayerNorm(self.dim)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    def _maps(self, x: Tensor, keys: Tensor | None = None) -> Iterator[tuple[int, SwinBlock, Tensor, Tensor]]:
        """Each block in order: stage, block, its input map and its output map."""
        self.check_image(x.shape[2], x.shape[3])
        x = self.patch_embed(x)
        for i, stage in enumerate(self.layers):
            for block in stage.blocks:
                before, x = x, self.run(block, x, keys, keyed=keys is not None)
                yield i, block, before, x
            if stage.downsample is not None:
                x = stage.downsample(x)

    def encode(self, x: Tensor, keys: Tensor | None) -> tuple[Tensor, Tensor, list[Routing]]:
        for *_, last in self._maps(x, keys):
            x = last
        tokens = self.norm(x.flatten(1, 2))
        return tokens.mean(1), tokens, []

    def last_features(self, x: Tensor, blocks: int = 1, patches: bool = False) -> Tensor:
        last = len(self.layers) - 1
        maps = [(i, out.flatten(1, 2)) for i, _, _, out in self._maps(x)][-blocks:]
        return torch.cat([(self.norm(m) if i == last else m).mean(1) for i, m in maps], 1)

    def attention(self, x: Tensor, block: int = -1) -> Tensor:
        """Attention weights (N*windows, h, w*w, w*w) of one block."""
        _, chosen, before, _ = list(self._maps(x))[block]
        return chosen.weights(before)

    def compile_blocks(self, **options: Any) -> None:
        for stage in self.layers:
            for block in stage.blocks:
                block.compile(dynamic=False, **options)
