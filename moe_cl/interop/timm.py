"""timm's names and arguments of our dense backbones.

Features agree, with one exception that lies in timm: Swins at sizes that are no multiple of the windows (esvit.md 1.9),
because timm rolls before it pads.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from moe_cl.config import ConfigError, ModelConfig
from moe_cl.models.folder import swin_to_timm
from moe_cl.models.resnet import ResNet
from moe_cl.models.swin import Swin
from moe_cl.models.vit import Mlp, ViT

IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))


def dense(module: nn.Module, what: str) -> None:
    """Raises ConfigError for a network with experts, which no other library here knows."""
    if isinstance(module, ViT) and any(not isinstance(block.mlp, Mlp) for block in module.blocks):
        raise ConfigError(f"{what} knows no experts: export safetensors or huggingface, and load with moe_cl.load")


def architecture(module: nn.Module, model: ModelConfig) -> tuple[str, dict[str, Any]]:
    """timm's name and arguments of ``module``. Raises ConfigError where timm has no such network."""
    dense(module, "timm")
    if isinstance(module, ViT):
        if isinstance(module.patch_embed.proj, nn.Sequential):
            raise ConfigError(
                f"timm has no ViT with MoCo v3's convolutional stem ({model.backbone}): export safetensors"
            )
        block, proj = module.blocks[0], module.patch_embed.proj
        return "vit_small_patch16_224", {
            "img_size": module.grid * module.patch_size, "patch_size": module.patch_size, "in_chans": proj.in_channels,
            "embed_dim": module.dim, "depth": len(module.blocks), "num_heads": block.attn.heads,
            "mlp_ratio": block.mlp.fc1.out_features / module.dim,
        }  # fmt: skip
    if isinstance(module, Swin):
        stages, proj = module.layers, module.patch_embed.proj
        return "swin_tiny_patch4_window7_224", {
            "img_size": model.options.get("img_size", 224), "patch_size": module.patch_size,
            "in_chans": proj.in_channels, "embed_dim": proj.out_channels, "depths": [len(s.blocks) for s in stages],
            "num_heads": [s.blocks[0].attn.num_heads for s in stages], "window_size": stages[0].blocks[0].window,
            "mlp_ratio": stages[0].blocks[0].mlp.fc1.out_features / proj.out_channels,
        }  # fmt: skip
    if isinstance(module, ResNet):
        return model.backbone.removesuffix("_cifar"), {"in_chans": module.conv1.in_channels}
    raise ConfigError(f"timm has no {model.backbone}")


def state(module: nn.Module) -> dict[str, Tensor]:
    """Tensors by timm's names."""
    own = module.state_dict()
    return swin_to_timm(own) if isinstance(module, Swin) else own


def small_stem(module: nn.Module) -> list[str]:
    """The lines that give another library's ResNet (``net``) our CIFAR stem, if ``module`` has it."""
    if not (isinstance(module, ResNet) and isinstance(module.maxpool, nn.Identity)):
        return []
    conv = module.conv1
    return [
        f"net.conv1 = torch.nn.Conv2d({conv.in_channels}, {conv.out_channels}, 3, 1, 1, bias=False)",
        "net.maxpool = torch.nn.Identity()",
    ]


def usage(module: nn.Module, model: ModelConfig, file: str) -> list[str]:
    """Python lines that load ``file`` with timm."""
    name, args = architecture(module, model)
    text = "".join(f", {k}={v!r}" for k, v in args.items()) + norm(module)
    head = "import timm, torch" if small_stem(module) else "import timm"
    if small_stem(module):
        return [
            head,
            f"net = timm.create_model({name!r}, num_classes=0{text})",
            *small_stem(module),
            f"timm.models.load_checkpoint(net, {file!r})",
        ]
    return [head, f"net = timm.create_model({name!r}, num_classes=0{text}, checkpoint_path={file!r})",
            "features = net.eval()(images)"]  # fmt: skip


def norm(module: nn.Module) -> str:
    """EsViT's layer norms add 1e-6, timm's Swins 1e-5: the argument that says so."""
    return ", norm_layer=timm.layers.LayerNorm" if isinstance(module, Swin) else ""


def hub_config(module: nn.Module, model: ModelConfig, size: int, normalize: str) -> Mapping[str, Any]:
    """``config.json`` of timm's hub layout."""
    name, args = architecture(module, model)
    mean, std = IMAGENET if normalize == "imagenet" else ((0.5,) * 3, (0.5,) * 3)
    conv = module.conv1 if isinstance(module, ResNet) else module.patch_embed.proj
    first = "conv1" if isinstance(module, ResNet) else "patch_embed.proj"
    return {
        "architecture": name, "num_classes": 0, "num_features": module.dim,
        "global_pool": "token" if isinstance(module, ViT) else "avg", "model_args": args,
        "pretrained_cfg": {
            "input_size": [conv.in_channels, size, size], "mean": list(mean), "std": list(std), "num_classes": 0,
            "interpolation": "bilinear", "crop_pct": 0.875, "first_conv": first, "classifier": None,
            "fixed_input_size": not isinstance(module, ResNet), "custom_load": False,
        },
    }  # fmt: skip
