"""torchvision's ResNets: our names are theirs, but for the classifier that is left out."""

from __future__ import annotations

from torch import nn

from moe_cl.config import ConfigError, ModelConfig
from moe_cl.interop.timm import small_stem
from moe_cl.models.resnet import ResNet


def check(module: nn.Module, model: ModelConfig) -> None:
    """Raises ConfigError for anything but a ResNet."""
    if not isinstance(module, ResNet):
        raise ConfigError(
            f"the torchvision format is for ResNets, this is a {model.backbone}: export timm or safetensors"
        )


def usage(module: nn.Module, model: ModelConfig, file: str) -> list[str]:
    """Python lines that load ``file`` with torchvision."""
    lines = small_stem(module)
    if not lines and module.conv1.in_channels != 3:
        lines = [f"net.conv1 = torch.nn.Conv2d({module.conv1.in_channels}, 64, 7, 2, 3, bias=False)"]
    read = f"torch.load({file!r}, weights_only=True)"
    if file.endswith(".safetensors"):
        read = f"safetensors.torch.load_file({file!r})"
    return [
        "import safetensors.torch, torch, torchvision",
        f"net = torchvision.models.{model.backbone.removesuffix('_cifar')}()",
        "net.fc = torch.nn.Identity()",
        *lines,
        f"net.load_state_dict({read})",
    ]
