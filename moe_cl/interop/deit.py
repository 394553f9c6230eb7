"""DeiT's fine-tuning script (``--resume FILE``): ``{"model": ...}`` by timm's names, and a note on the heads.

MoCo v3's ViT-S has 12 heads, DeiT's 6; the tensors are the same, so the wrong one loads silently and learns badly
(moco_jcl.md section 3). The note beside the file says the number and the line that builds the network.
"""

from __future__ import annotations

from typing import Any

from torch import nn

from moe_cl.config import ConfigError, ModelConfig
from moe_cl.interop import timm
from moe_cl.models.vit import ViT


def note(module: nn.Module, model: ModelConfig) -> dict[str, Any]:
    """Sizes, heads first, and how to build the network. Raises ConfigError for no dense ViT."""
    if not isinstance(module, ViT):
        raise ConfigError(f"the deit format is for ViTs, this is a {model.backbone}: export timm or safetensors")
    timm.dense(module, "DeiT's script")
    name, args = timm.architecture(module, model)
    return {
        "heads": args["num_heads"],
        "build": f"timm.create_model({name!r}, "
        + ", ".join(f"{k}={v!r}" for k, v in args.items())
        + ", num_classes=C)",
        "script": "main.py --resume FILE (not --finetune), load_state_dict(strict=False): the classifier is new",
        **args,
    }
