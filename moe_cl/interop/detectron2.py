"""Detectron2's ResNet names, written without pickle: npz or safetensors, with the exact key map beside it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from torch import Tensor, nn

from moe_cl.config import ConfigError, ModelConfig
from moe_cl.interop.official import detectron2_name
from moe_cl.models.resnet import ResNet


def keymap(module: nn.Module, model: ModelConfig) -> dict[str, str]:
    """Our (torchvision's) names -> Detectron2's. Raises ConfigError for what Detectron2's ResNet cannot be."""
    if not isinstance(module, ResNet):
        raise ConfigError(f"the detectron2 format is for ResNets, this is a {model.backbone}: export safetensors")
    if isinstance(module.maxpool, nn.Identity):
        raise ConfigError(f"{model.backbone} has a stem for small images, which Detectron2's ResNet has not")
    return {name: detectron2_name(name) for name in module.state_dict()}


def write_npz(path: Path, state: dict[str, Tensor]) -> None:
    """Arrays by name."""
    with open(path, "wb") as file:
        np.savez(file, **{name: value.cpu().numpy() for name, value in state.items()})


def usage(file: str) -> list[str]:
    """Python lines that load ``file`` with Detectron2. The heuristics find the prefix (backbone, res5 in the head)."""
    read = f"dict(numpy.load({file!r}))"
    if file.endswith(".safetensors"):
        read = f"safetensors.numpy.load_file({file!r})"
    return [
        "import numpy, safetensors.numpy",
        "from detectron2.checkpoint import DetectionCheckpointer",
        f'weights = {{"model": {read}, "__author__": "moe_cl", "matching_heuristics": True}}',
        "DetectionCheckpointer(model)._load_model(weights)  # RGB, PIXEL_MEAN 123.675 116.28 103.53, "
        "PIXEL_STD 58.395 57.12 57.375, STRIDE_IN_1X1 False",
    ]
