"""Swin against EsViT's published forward at 224 and 96 px, its sizes, and what keys and checkpointing do."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from moe_cl import rng
from moe_cl.config import ConfigError
from moe_cl.models.build import build_backbone

GOLDEN = np.load(Path(__file__).parents[1] / "golden" / "esvit_swin.npz")
SMALL = {"dim": 8, "depths": [2, 2, 2, 2], "heads": [2, 2, 4, 4]}


def golden_net(case):
    net = build_backbone("swin", **SMALL, window=int(case[1:])).eval()
    head = f"{case}__sd__"
    state = {k.removeprefix(head): torch.from_numpy(GOLDEN[k].copy()) for k in GOLDEN.files if k.startswith(head)}
    net.load_state_dict({k: v for k, v in state.items() if not k.startswith("head")}, strict=True)
    return net


def crops(case):
    return [torch.from_numpy(GOLDEN[f"{case}__{n}"].astype(np.float32)) for n in ("x224", "x96")]


@pytest.mark.parametrize("case", ["w7", "w14"])
def test_published_features(case):
    net = golden_net(case)
    with torch.no_grad():
        out = net(crops(case))
        regions = torch.cat([r.flatten(0, 1) for r in out.regions]).numpy()
        np.testing.assert_allclose(regions, GOLDEN[f"{case}__region_fea"], rtol=0, atol=2e-6)
        assert [r.shape[1] for r in out.regions] == GOLDEN[f"{case}__npatch"].tolist()
        for size, x in zip((224, 96), crops(case), strict=True):
            one = net([x[:1]])
            for name, got in (
                ("pooled", one.features),
                ("regions", one.regions[0]),
                ("last1", net.last_features(x[:1], 1)),
                ("last4", net.last_features(x[:1], 4)),
            ):
                np.testing.assert_allclose(got, GOLDEN[f"{case}__{name}_{size}"], rtol=0, atol=2e-6, err_msg=name)
        weights = net.attention(crops(case)[0][:1])
        np.testing.assert_allclose(
            weights.mean((0, 1)), GOLDEN[f"{case}__last_attn_224_mean_over_windows_heads"], atol=1e-6
        )


def test_sizes_and_parameter_counts():
    with torch.device("meta"):
        millions = {
            n: sum(p.numel() for p in build_backbone(n).parameters()) / 1e6
            for n in ("swin_tiny", "swin_tiny_w14", "swin_small_w7", "swin_base_w14")
        }
    for name, want in (
        ("swin_tiny", 27.52),
        ("swin_tiny_w14", 27.57),
        ("swin_small_w7", 48.84),
        ("swin_base_w14", 86.92),
    ):
        assert abs(millions[name] - want) < 0.01, name


def test_windows_follow_the_image_size():
    shifts = lambda net: [(b.window, b.shift) for s in net.layers for b in s.blocks]  # noqa: E731
    assert shifts(build_backbone("swin", **SMALL)) == [(7, 0), (7, 3)] * 3 + [(7, 0), (7, 0)]
    assert shifts(build_backbone("swin", **SMALL, window=14)) == [(14, 0), (14, 7)] * 2 + [(14, 0)] * 2 + [(7, 0)] * 2
    out = build_backbone("swin", **SMALL, img_size=28)([torch.randn(2, 3, 28, 28), torch.randn(2, 3, 20, 28)])
    assert out.features.shape == (4, 64)
    with pytest.raises(ConfigError, match="multiples of 4"):
        build_backbone("swin", **SMALL)([torch.randn(1, 3, 30, 30)])
    with pytest.raises(ConfigError, match="heads"):
        build_backbone("swin", dim=8, heads=[3, 3, 3, 3])


def test_keys_and_checkpointing():
    keys, x = rng.sample_keys(0, 1, torch.arange(4)), torch.randn(4, 3, 32, 32).double()
    grads = []
    for again in (False, True):
        torch.manual_seed(0)
        net = build_backbone("swin", **SMALL, drop_path=0.5, activation_checkpointing=again).double()
        net([x], keys).features.square().sum().backward()
        grads.append([p.grad for p in net.parameters()])
    torch.testing.assert_close(grads[0], grads[1], rtol=1e-10, atol=1e-12)
    halves = torch.cat([net([x[:1]], keys[:1]).features, net([x[1:]], keys[1:]).features])
    torch.testing.assert_close(net([x], keys).features, halves, rtol=1e-10, atol=1e-12)
    assert net.layers[3].blocks[1].drop1.rate == 0.5 and net.layers[0].blocks[0].drop1.rate == 0
