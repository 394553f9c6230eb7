"""torchvision's ResNets behind the backbone interface, with the batch norm of ``moe_cl.models.norm``.

MoCo v1/v2, JCL (moco_jcl.md 1.1), MoCo v3 (zero_init_residual, 1.3), EsViT's ResNet-50 (regions: esvit.md 1.1).
State-dict names are torchvision's without ``fc``.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models.resnet import BasicBlock, Bottleneck
from torchvision.models.resnet import ResNet as TorchvisionResNet

from moe_cl.models.backbone import Backbone
from moe_cl.models.norm import BatchNorm
from moe_cl.moe.router import Routing
from moe_cl.typed import Few

_VARIANTS = {
    "resnet18": (BasicBlock, [2, 2, 2, 2]),
    "resnet34": (BasicBlock, [3, 4, 6, 3]),
    "resnet50": (Bottleneck, [3, 4, 6, 3]),
    "resnet101": (Bottleneck, [3, 4, 23, 3]),
}


class ResNet(Backbone, TorchvisionResNet):
    """Features = global average pool, regions = the last stage's map (N, H/32*W/32, D).

    Args:
        cifar_stem: 3x3 stride-1 first convolution and no max-pool, for images of about 32 px.
        zero_init_residual: the last norm of each block starts at 0 (MoCo v3).
        in_chans: input channels.
    """

    def __init__(
        self,
        variant: str = "resnet50",
        *,
        cifar_stem: bool = False,
        zero_init_residual: bool = False,
        in_chans: Few = 3,
        norm: Callable[[int], nn.Module] = BatchNorm,
    ):
        block, layers = _VARIANTS[variant]
        TorchvisionResNet.__init__(self, block, layers, zero_init_residual=zero_init_residual, norm_layer=norm)
        self.dim = self.fc.in_features
        self.fc = nn.Identity()
        if cifar_stem or in_chans != 3:
            stem = (3, 1, 1) if cifar_stem else (7, 2, 3)
            self.conv1 = nn.Conv2d(in_chans, self.conv1.out_channels, *stem, bias=False)
            nn.init.kaiming_normal_(self.conv1.weight, mode="fan_out", nonlinearity="relu")
        if cifar_stem:
            self.maxpool = nn.Identity()

    forward = Backbone.forward  # torchvision's takes one image tensor

    def _stem(self, x: Tensor) -> Tensor:
        return self.maxpool(self.relu(self.bn1(self.conv1(x.to(self.conv1.weight.dtype)))))

    def feature_maps(self, x: Tensor) -> list[Tensor]:
        """Maps of the four stages (N, D_s, H_s, W_s)."""
        x, maps = self.run(self._stem, x), []
        for stage in (self.layer1, self.layer2, self.layer3, self.layer4):
            x = self.run(stage, x)
            maps.append(x)
        return maps

    def encode(self, x: Tensor, keys: Tensor | None) -> tuple[Tensor, Tensor, list[Routing]]:
        x = self.feature_maps(x)[-1]
        return x.mean((2, 3)), x.flatten(2).transpose(1, 2), []

    def last_features(self, x: Tensor, blocks: int = 1, patches: bool = False) -> Tensor:
        return torch.cat([F.adaptive_avg_pool2d(m, 1).flatten(1) for m in self.feature_maps(x)[-blocks:]], 1)
