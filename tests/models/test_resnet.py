"""ResNets: torchvision's values and names, statistics a view, the CIFAR stem, checkpointing."""

from __future__ import annotations

import pytest
import torch
import torchvision
from torch import nn

from moe_cl.comm import LocalComm
from moe_cl.models.build import build_backbone
from moe_cl.models.norm import batch_norms


@pytest.mark.parametrize("name", ["resnet18", "resnet50"])
def test_torchvision_weights_load_by_name_and_give_its_features(name):
    torch.manual_seed(0)
    theirs = getattr(torchvision.models, name)()
    ours = build_backbone(name)
    state = {k: v for k, v in theirs.state_dict().items() if not k.startswith("fc.")}
    ours.load_state_dict(state, strict=True)
    x = torch.randn(4, 3, 64, 64)
    theirs.fc = nn.Identity()
    for mode in (True, False):
        out = ours.train(mode)([x])
        torch.testing.assert_close(out.features, theirs.train(mode)(x))
    assert out.features.shape == (4, ours.dim) and out.regions[0].shape == (4, 4, ours.dim)
    torch.testing.assert_close(out.regions[0].mean(1), out.features)
    for key, value in theirs.state_dict().items():
        torch.testing.assert_close(ours.state_dict()[key], value, msg=key)


def test_cifar_stem_keeps_the_resolution():
    net = build_backbone("resnet18_cifar")
    out = net([torch.randn(2, 3, 32, 32)])
    assert out.regions[0].shape == (2, 16, 512)
    assert build_backbone("resnet18_cifar", in_chans=1)([torch.randn(2, 1, 28, 28)]).features.shape == (2, 512)


def test_views_have_statistics_of_their_own():
    torch.manual_seed(0)
    net = build_backbone("resnet18_cifar").double()
    twin = build_backbone("resnet18_cifar").double()
    twin.load_state_dict(net.state_dict())
    x = torch.randn(8, 3, 8, 8).double()
    both = net([x], counts=[2]).features
    one = torch.cat([twin([v]).features for v in x.chunk(2)])
    torch.testing.assert_close(both, one, rtol=0, atol=1e-10)
    torch.testing.assert_close(net.state_dict(), twin.state_dict(), rtol=0, atol=1e-12)


def test_checkpointing_counts_each_batch_once():
    results = []
    for again in (False, True):
        torch.manual_seed(0)
        net = build_backbone("resnet18_cifar", activation_checkpointing=again).double()
        x, y = torch.randn(8, 3, 8, 8).double(), torch.randn(6, 3, 4, 4).double()
        net([x, y], counts=[2, 3]).features.square().sum().backward()
        results.append(({n: p.grad for n, p in net.named_parameters()}, net.state_dict()))
    torch.testing.assert_close(results[0], results[1], rtol=1e-10, atol=1e-12)


def test_norm_choice_reaches_every_layer():
    comm = LocalComm()
    assert all(n.comm is comm for n in batch_norms(build_backbone("resnet18", comm=comm)))
    assert all(n.groups == 4 for n in batch_norms(build_backbone("resnet18", bn_groups=4)))
    assert len(batch_norms(build_backbone("resnet18"))) == 20


def test_zero_init_residual_and_channels_last():
    net = build_backbone("resnet18", zero_init_residual=True, channels_last=True)
    assert not net.layer1[0].bn2.weight.any()
    assert net.conv1.weight.is_contiguous(memory_format=torch.channels_last)
    out = net([torch.randn(2, 3, 32, 32)])
    assert out.features.shape == (2, 512)


def test_last_features_are_pooled_stages():
    net = build_backbone("resnet18").eval()
    x = torch.randn(2, 3, 32, 32)
    assert net.last_features(x, 2).shape == (2, 256 + 512)
    torch.testing.assert_close(net.last_features(x, 1), net([x]).features)
