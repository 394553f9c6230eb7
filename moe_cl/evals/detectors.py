"""Detectors on a pretrained ResNet: R-CNNs with FPN from torchvision, and the C4 head with batch norm after res5.

All layers are trained and batch norm keeps learning, over all ranks (moco_jcl.md section 3: FREEZE_AT 0, SyncBN,
STRIDE_IN_1X1 False as torchvision has it). The C4 detector is MoCo's: one map of stride 16 after res4, 15 anchors a
place, RoIAlign 14, res5 as the head of each region, a batch norm after it, RPN 6000/1000 at test.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable
from typing import Literal

import torch
from torch import Tensor, nn
from torchvision.models.detection import FasterRCNN, KeypointRCNN, MaskRCNN
from torchvision.models.detection.backbone_utils import BackboneWithFPN
from torchvision.models.detection.faster_rcnn import FastRCNNPredictor
from torchvision.models.detection.rpn import AnchorGenerator
from torchvision.ops import MultiScaleRoIAlign

from moe_cl.comm import Comm
from moe_cl.config import ConfigError
from moe_cl.models.norm import BatchNorm, batch_norms, share_statistics
from moe_cl.models.resnet import ResNet

Kind = Literal["mask_fpn", "keypoint_fpn", "box_fpn", "box_c4", "mask_c4"]
KINDS = ("mask_fpn", "keypoint_fpn", "box_fpn", "box_c4", "mask_c4")


class C4Body(nn.Module):
    """A ResNet up to res4, one map of stride 16."""

    def __init__(self, net: ResNet):
        super().__init__()
        self.stem = nn.Sequential(OrderedDict(conv1=net.conv1, bn1=net.bn1, relu=net.relu, maxpool=net.maxpool))
        self.layer1, self.layer2, self.layer3 = net.layer1, net.layer2, net.layer3
        self.out_channels = net.dim // 2

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        return {"0": self.layer3(self.layer2(self.layer1(self.stem(x))))}


class Res5(nn.Module):
    """res5 on each region's 14 x 14 map, then the extra batch norm."""

    def __init__(self, net: ResNet):
        super().__init__()
        self.layer4, self.norm = net.layer4, BatchNorm(net.dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.layer4(x))


class Pooled(nn.Module):
    """Box head: mean over the region's map."""

    def __init__(self, res5: Res5):
        super().__init__()
        self.res5 = res5

    def forward(self, x: Tensor) -> Tensor:
        return self.res5(x).mean((2, 3))


class MaskC4(nn.Module):
    """Mask head on the shared res5: a deconvolution to 14 x 14, then one mask a class."""

    def __init__(self, res5: Res5, width: int, classes: int):
        super().__init__()
        self.res5 = res5
        self.up = nn.ConvTranspose2d(width, 256, 2, 2)
        self.predict = nn.Conv2d(256, classes, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.predict(torch.relu(self.up(self.res5(x))))


def build_detector(
    net: nn.Module,
    kind: Kind,
    classes: int,
    *,
    min_size: tuple[int, ...] = (800,),
    max_size: int = 1333,
    keypoints: int = 17,
    rois: int = 512,
    comm: Comm | None = None,
) -> nn.Module:
    """A torchvision detection model around the pretrained ``net``; ``classes`` includes the background.

    ``min_size``: short sides drawn in training, the last one at test. ``rois``: regions an image in training.

    Raises:
        ConfigError: the encoder is no ResNet with the ordinary stem.
    """
    if not isinstance(net, ResNet) or isinstance(net.maxpool, nn.Identity):
        raise ConfigError("eval detection needs a ResNet with the ordinary stem (resnet18, resnet50 ...)")
    for p in net.parameters():
        p.requires_grad_(True)
    sizes = {"min_size": min_size, "max_size": max_size, "box_batch_size_per_image": rois}
    if kind.endswith("_fpn"):
        inner = [net.dim // 8, net.dim // 4, net.dim // 2, net.dim]
        layers = {f"layer{i + 1}": str(i) for i in range(4)}
        body = BackboneWithFPN(net, layers, inner, 256, norm_layer=BatchNorm)
        model = {
            "mask_fpn": lambda: MaskRCNN(body, classes, **sizes),
            "keypoint_fpn": lambda: KeypointRCNN(body, classes, num_keypoints=keypoints, **sizes),
            "box_fpn": lambda: FasterRCNN(body, classes, **sizes),
        }[kind]()
    else:
        model = _c4(net, kind, classes, sizes)
    return share_statistics(model, comm)


def _c4(net: ResNet, kind: Kind, classes: int, sizes: dict[str, object]) -> nn.Module:
    res5 = Res5(net)
    pool = MultiScaleRoIAlign(["0"], output_size=14, sampling_ratio=2)
    anchors = AnchorGenerator(((32, 64, 128, 256, 512),), ((0.5, 1.0, 2.0),))
    options = {
        "rpn_anchor_generator": anchors, "rpn_pre_nms_top_n_train": 12000, "rpn_pre_nms_top_n_test": 6000,
        "rpn_post_nms_top_n_train": 2000, "rpn_post_nms_top_n_test": 1000, "box_roi_pool": pool,
        "box_head": Pooled(res5), "box_predictor": FastRCNNPredictor(net.dim, classes), **sizes,
    }  # fmt: skip
    if kind == "box_c4":
        return FasterRCNN(C4Body(net), **options)
    return MaskRCNN(
        C4Body(net),
        mask_roi_pool=pool,
        mask_head=nn.Identity(),
        mask_predictor=MaskC4(res5, net.dim, classes),
        **options,
    )


@torch.no_grad()
def precise_norms(model: nn.Module, batches: Iterable[tuple[list[Tensor], list[dict[str, Tensor]]]]) -> None:
    """Running statistics as the plain mean over ``batches`` with the final weights ("precise BN", before a test)."""
    norms = batch_norms(model)
    momenta = [n.momentum for n in norms]
    model.train()
    for i, (images, targets) in enumerate(batches):
        for n in norms:
            n.momentum = 1.0 / (i + 1)
        model(images, targets)
    for n, momentum in zip(norms, momenta, strict=True):
        n.momentum = momentum
