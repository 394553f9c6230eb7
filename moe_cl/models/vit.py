"""Vision transformers of MoCo v3, DeiT and V-MoE.

Shapes: N images, T tokens (class token first), D width, h heads, g patches a side. State-dict names are timm's.
Source: MoCo v3 (Chen et al. 2021, section 4 and its code; moco_jcl.md 1.3), CR-MoE (crmoe.md 1.1), DeiT (Touvron 2020).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import lru_cache, partial
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moe_cl.config import ConfigError
from moe_cl.models.backbone import Backbone, DropPath, drop_rates
from moe_cl.models.norm import BatchNorm
from moe_cl.moe.router import Routing
from moe_cl.typed import Few, Pixels, Ratio, Width

MoEOf = Callable[[int], nn.Module]  # number of the MoE layer -> the layer

LayerNorm = partial(nn.LayerNorm, eps=1e-6)


@lru_cache(maxsize=64)
def sincos(dim: int, rows: int, cols: int) -> Tensor:
    """Fixed 2-D position embedding (1, 1 + rows*cols, dim) fp32; the class token's row is zero.

    Patch (r, c), row-major: [sin(r w), cos(r w), sin(c w), cos(c w)], w_k = 10000^(-k/(dim/4)) (moco_jcl.md 1.3).
    """
    if dim % 4:
        raise ConfigError(f"model width {dim}: a sin-cos position embedding needs a multiple of 4")
    # On the CPU also where models are built on the meta device: the table is kept for all later models.
    count = partial(torch.arange, dtype=torch.float64, device="cpu")
    frequency = 10000.0 ** (-count(dim // 4) / (dim // 4))
    r, c = torch.meshgrid(count(rows), count(cols), indexing="ij")
    angles = [r.reshape(-1, 1) * frequency, c.reshape(-1, 1) * frequency]
    table = torch.cat([f(a) for a in angles for f in (torch.sin, torch.cos)], 1)
    return torch.cat([table.new_zeros(1, dim), table])[None].float()


CACHE = (
    20 << 20
)  # bytes of one activation (in fp32) that are worked on at a time on a CPU: about its last-level cache's


def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """softmax(q k' / sqrt(d)) v on (N, h, T, d), softmax in fp32.

    torch's fused kernel, but for two cases on the CPU: in bf16 its backward is 3 to 14 times slower than two matrix
    products, and in fp32 it loses for short sequences (512 x 4 heads x 17 tokens: 84 ms against 6, 16 against 7).
    """
    if fused(q):
        return F.scaled_dot_product_attention(q, k, v)
    weights = (q * q.shape[-1] ** -0.5) @ k.transpose(2, 3)
    return weights.softmax(-1, dtype=torch.promote_types(q.dtype, torch.float32)).to(v.dtype) @ v


def fused(q: Tensor) -> bool:
    """Whether ``attention`` takes torch's fused kernel for q (N, h, T, d)."""
    return q.device.type != "cpu" or (q.dtype == torch.float32 and q.shape[2] > 64)


class Attention(nn.Module):
    """Multi-head self-attention on (N, T, D).

    Without a fused kernel, over as many images at a time as have their fp32 weights in cache: 32 images of
    12 heads and 197 tokens at once take 45 ms in bf16, in pieces 27; with the backward 97 and 80.
    """

    def __init__(self, dim: int, heads: int):
        super().__init__()
        self.heads = heads
        self.qkv, self.proj = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)

    def split(self, qkv: Tensor) -> tuple[Tensor, ...]:
        """Queries, keys and values, each (N, h, T, D/h), of their projections (N, T, 3 D)."""
        return qkv.unflatten(2, (3, self.heads, -1)).permute(2, 0, 3, 1, 4).unbind()

    def forward(self, x: Tensor) -> Tensor:
        qkv = self.qkv(x)
        q = self.split(qkv)[0]
        images = len(x) if fused(q) else max(1, CACHE // (4 * self.heads * q.shape[2] ** 2))
        pieces = [attention(*self.split(piece)).transpose(1, 2).flatten(2) for piece in qkv.split(images)]
        return self.proj(torch.cat(pieces) if len(pieces) > 1 else pieces[0])

    def weights(self, x: Tensor) -> Tensor:
        """Attention weights (N, h, T, T)."""
        q, k, _ = self.split(self.qkv(x))
        return (q @ k.transpose(2, 3) / math.sqrt(q.shape[-1])).softmax(-1)


class Mlp(nn.Module):
    """Linear, GELU, Linear."""

    def __init__(self, dim: int, hidden: int):
        super().__init__()
        if hidden < 1:
            raise ConfigError(f"model.options.mlp_ratio gives an MLP without a hidden unit at width {dim}; raise it")
        self.fc1, self.fc2 = nn.Linear(dim, hidden), nn.Linear(hidden, dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x)))


class Block(nn.Module):
    """Pre-norm block; ``mlp`` is dense, or an MoE layer (N, T, D), keys -> (N, T, D), Routing."""

    def __init__(self, dim: int, heads: int, mlp: nn.Module, drop: float, index: int):
        super().__init__()
        self.norm1, self.attn = LayerNorm(dim), Attention(dim, heads)
        self.norm2, self.mlp = LayerNorm(dim), mlp
        self.drop1, self.drop2 = DropPath(drop, index, 0), DropPath(drop, index, 1)
        self.dense = isinstance(mlp, Mlp)

    def forward(self, x: Tensor, keys: Tensor | None) -> tuple[Tensor, Routing | None]:
        x = x + self.drop1(self.attn(self.norm1(x)), keys)
        y = self.norm2(x)
        if self.dense:
            return x + self.drop2(self.mlp(y), keys), None
        y, routing = self.mlp(y, keys)
        return x + self.drop2(y.to(x.dtype), keys), routing


class PatchEmbed(nn.Module):
    """(N, C, H, W) -> (N, H/p * W/p, D) by a p x p projection."""

    def __init__(self, channels: int, dim: int, patch: int):
        super().__init__()
        self.proj = nn.Conv2d(channels, dim, patch, patch)

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(x.to(self.proj.weight.dtype)).flatten(2).transpose(1, 2)


class ConvStem(PatchEmbed):
    """MoCo v3's stem: four 3x3 stride-2 convolutions with batch norm, then 1x1 (Xiao et al. 2021); patches of 16."""

    def __init__(self, channels: int, dim: int, norm: Callable[[int], nn.Module]):
        nn.Module.__init__(self)
        layers: list[nn.Module] = []
        for width in (dim // 8, dim // 4, dim // 2, dim):
            layers += [nn.Conv2d(channels, width, 3, 2, 1, bias=False), norm(width), nn.ReLU(inplace=True)]
            channels = width
        self.proj = nn.Sequential(*layers, nn.Conv2d(dim, dim, 1))

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(x.to(self.proj[0].weight.dtype)).flatten(2).transpose(1, 2)


class ViT(Backbone):
    """A vision transformer; features = class token after the final norm, regions = patch tokens after it.

    Args:
        dim, depth, heads, mlp_ratio, patch_size, in_chans: sizes. ``img_size``: the size ``pos_embed`` is stored for;
            other sizes are taken too: sin-cos is computed for their grid, a learned one is resampled (bicubic without
            antialias, esvit.md 1.10).
        pos_embed: ``sincos`` (fixed) or ``learned``. init: ``mocov3`` (xavier) or ``deit`` (truncated normal .02).
        freeze_patch: the patch projection stays at its random start (MoCo v3's stop-grad-conv1), MoE networks included.
        conv_stem: MoCo v3's ConvStem (never frozen).
        moe_blocks: indices of blocks whose MLP is ``moe_of(n)``, n = 0, 1, ... in their order.
        norm: batch norm of the ConvStem by width.
    """

    def __init__(
        self,
        *,
        dim: Width = 384,
        depth: Few = 12,
        heads: Few = 12,
        mlp_ratio: Ratio = 4.0,
        patch_size: Pixels = 16,
        img_size: Pixels = 224,
        in_chans: Few = 3,
        pos_embed: Literal["sincos", "learned"] = "sincos",
        init: Literal["mocov3", "deit"] = "mocov3",
        freeze_patch: bool = True,
        conv_stem: bool = False,
        drop_path: float = 0.0,
        moe_blocks: Sequence[int] = (),
        moe_of: MoEOf | None = None,
        norm: Callable[[int], nn.Module] = BatchNorm,
    ):
        super().__init__()
        _check_sizes(dim, heads, patch_size, img_size, conv_stem)
        self.dim, self.patch_size, self.grid = dim, patch_size, img_size // patch_size
        self.patch_embed = ConvStem(in_chans, dim, norm) if conv_stem else PatchEmbed(in_chans, dim, patch_size)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, dim))
        self.learned = pos_embed == "learned"
        if self.learned:
            self.pos_embed = nn.Parameter(torch.zeros(1, 1 + self.grid**2, dim))
        else:
            self.register_buffer("pos_embed", sincos(dim, self.grid, self.grid).clone())
        layer_of = {block: layer for layer, block in enumerate(moe_blocks)}
        self.blocks = nn.ModuleList(
            Block(dim, heads, moe_of(layer_of[i]) if i in layer_of else Mlp(dim, int(dim * mlp_ratio)), rate, i)
            for i, rate in enumerate(drop_rates(drop_path, depth))
        )
        self.norm = LayerNorm(dim)
        {"mocov3": self._init_mocov3, "deit": self._init_deit}[init](conv_stem)
        if freeze_patch and not conv_stem:
            self.patch_embed.requires_grad_(False)

    def _dense(self) -> list[tuple[str, nn.Linear]]:
        """Linear layers outside the MoE layers, which start themselves."""
        pairs = [(n, m) for block in self.blocks for n, m in block.attn.named_modules()]
        pairs += [(n, m) for block in self.blocks if isinstance(block.mlp, Mlp) for n, m in block.mlp.named_modules()]
        return [(name, module) for name, module in pairs if isinstance(module, nn.Linear)]

    def _init_mocov3(self, conv_stem: bool) -> None:
        for name, linear in self._dense():
            if name == "qkv":  # three D x D matrices, not one 3D x D
                bound = math.sqrt(6.0 / (linear.weight.shape[0] // 3 + linear.weight.shape[1]))
                nn.init.uniform_(linear.weight, -bound, bound)
            else:
                nn.init.xavier_uniform_(linear.weight)
            nn.init.zeros_(linear.bias)
        nn.init.normal_(self.cls_token, std=1e-6)
        if self.learned:
            nn.init.trunc_normal_(self.pos_embed, std=0.02)
        if not conv_stem:
            weight = self.patch_embed.proj.weight
            bound = math.sqrt(6.0 / (weight[0].numel() + weight.shape[0]))
            nn.init.uniform_(weight, -bound, bound)
            nn.init.zeros_(self.patch_embed.proj.bias)

    def _init_deit(self, conv_stem: bool) -> None:
        for _, linear in self._dense():
            nn.init.trunc_normal_(linear.weight, std=0.02)
            nn.init.zeros_(linear.bias)
        nn.init.trunc_normal_(self.cls_token, std=0.02)
        if self.learned:
            nn.init.trunc_normal_(self.pos_embed, std=0.02)

    def _positions(self, rows: int, cols: int) -> Tensor:
        if rows == cols == self.grid:
            return self.pos_embed
        if not self.learned:
            return sincos(self.dim, rows, cols).to(self.pos_embed.device)
        table = self.pos_embed[:, 1:].float().unflatten(1, (self.grid, self.grid)).permute(0, 3, 1, 2)
        table = F.interpolate(table, (rows, cols), mode="bicubic", align_corners=False)
        return torch.cat([self.pos_embed[:, :1].float(), table.flatten(2).transpose(1, 2)], 1)

    def tokens(self, x: Tensor) -> Tensor:
        """Images (N, C, H, W) -> tokens before the first block (N, T, D)."""
        rows, cols = x.shape[2] // self.patch_size, x.shape[3] // self.patch_size
        self.check_image(x.shape[2], x.shape[3])
        # in the parameters' type, not autocast's: the residual stream stays fp32 under autocast
        positions = self._positions(rows, cols).to(self.cls_token.dtype)
        cls = (self.cls_token + positions[:, :1]).expand(len(x), -1, -1)
        return torch.cat([cls, self.patch_embed(x) + positions[:, 1:]], 1)

    def pieces(self, x: Tensor) -> int:
        """Images of x (N, T, D) that a dense block takes at a time: on the CPU no more than have its widest activations
        in cache. 32 images of ViT-S/16 take 5 % less time as 16 and 16."""
        widest = max((block.mlp.fc1.out_features for block in self.blocks if block.dense), default=0)
        return len(x) if x.device.type != "cpu" or not widest else max(1, CACHE // (4 * x.shape[1] * widest))

    def encode(self, x: Tensor, keys: Tensor | None) -> tuple[Tensor, Tensor, list[Routing]]:
        x, routing = self.tokens(x), []
        n = self.pieces(x) if len(x) else 1
        parts, keyed = x.split(n), keys is not None
        part_keys = keys.split(n) if keyed else [None] * len(parts)
        for block in self.blocks:
            if block.dense:
                parts = [self.run(block, part, k, keyed=keyed)[0] for part, k in zip(parts, part_keys, strict=True)]
                continue
            x, route = self.run(block, torch.cat(parts) if len(parts) > 1 else parts[0], keys, keyed=keyed)
            parts, routing = x.split(n), [*routing, route]
        x = self.norm(torch.cat(parts) if len(parts) > 1 else parts[0])
        return x[:, 0], x[:, 1:], routing

    def last_features(self, x: Tensor, blocks: int = 1, patches: bool = False) -> Tensor:
        x, kept = self.tokens(x), []
        for i, block in enumerate(self.blocks):
            x, _ = block(x, None)
            if i >= len(self.blocks) - blocks:
                kept.append(self.norm(x))
        mean = [kept[-1][:, 1:].mean(1)] if patches else []
        return torch.cat([k[:, 0] for k in kept] + mean, 1)

    def compile_blocks(self, **options: Any) -> None:
        for block in self.blocks:  # an MoE layer's shapes follow its routing: only the attention beside it
            (block if isinstance(block.mlp, Mlp) else block.attn).compile(dynamic=False, **options)

    def attention(self, x: Tensor, block: int = -1) -> Tensor:
        """Attention weights (N, h, T, T) of one block, class token first."""
        x, block = self.tokens(x), block % len(self.blocks)
        for earlier in self.blocks[:block]:
            x, _ = earlier(x, None)
        chosen = self.blocks[block]
        return chosen.attn.weights(chosen.norm1(x))


def _check_sizes(dim: int, heads: int, patch: int, image: int, conv_stem: bool) -> None:
    if dim % heads:
        raise ConfigError(f"model width {dim} is not a multiple of {heads} heads")
    if image % patch:
        raise ConfigError(f"img_size {image} is not a multiple of patch_size {patch}")
    if conv_stem and (patch != 16 or dim % 8):
        raise ConfigError("conv_stem needs patch_size 16 and a width that is a multiple of 8")
