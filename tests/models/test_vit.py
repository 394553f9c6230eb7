"""The ViT against the published forward, its start, its options; and backbones by name."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from moe_cl import rng
from moe_cl.config import ConfigError, ModelConfig, MoEConfig
from moe_cl.models.build import backbone_names, build_backbone, from_config, moe_blocks
from moe_cl.models.vit import sincos

GOLDEN = Path(__file__).parents[1] / "golden"
TINY = {"dim": 16, "depth": 2, "heads": 4, "patch_size": 8, "img_size": 16}


def golden_state(file, prefix, drop="head."):
    """Weights under ``prefix`` without the head."""
    state = {k.removeprefix(prefix): torch.from_numpy(file[k].copy()) for k in file.files if k.startswith(prefix)}
    return {k: v for k, v in state.items() if not k.startswith(drop)}


@pytest.mark.parametrize("name", ["vits_14x14_384", "tiny_7x7_192"])
def test_sincos_golden(name):
    g = np.load(GOLDEN / "moco_sincos.npz")
    shape = g[f"{name}/shape"]
    side = round((shape[-2] - 1) ** 0.5)
    table = sincos(int(shape[-1]), side, side)[0].numpy()
    rows = {"cls_row": 0, "first_patch_r0c0": 1, "patch_r0c1": 2, "patch_r1c0": 1 + side, "last_patch": -1}
    for key, row in rows.items():
        np.testing.assert_allclose(table[row], np.ravel(g[f"{name}/{key}"]), atol=7e-7)
    if f"{name}/full" in g.files:
        np.testing.assert_allclose(table, g[f"{name}/full"].reshape(table.shape), atol=7e-7)


def test_moco_v3_golden_names_load_and_trainable_set():
    g = np.load(GOLDEN / "moco_v3_forward_vit.npz")
    vit = build_backbone("vit", **TINY).double()
    vit.load_state_dict(golden_state(g, "world1/sd0/base_encoder."), strict=True)
    want = {n.removeprefix("base_encoder.") for n in g["world1/trainable"] if n.startswith("base_encoder.")}
    assert {n for n, p in vit.named_parameters() if p.requires_grad} == {n for n in want if not n.startswith("head.")}
    torch.testing.assert_close(build_backbone("vit", **TINY).pos_embed, vit.pos_embed.float(), rtol=0, atol=7e-7)


def test_start_is_mocov3s():
    torch.manual_seed(0)
    vit = build_backbone("vit_small")
    d = 384
    for block in vit.blocks:
        for linear, fan in ((block.attn.qkv, d + d), (block.attn.proj, d + d), (block.mlp.fc1, 5 * d)):
            bound = (6 / fan) ** 0.5
            assert 0.99 * bound < linear.weight.abs().max() <= bound
            assert not linear.bias.any()
    assert 0.0715 < vit.patch_embed.proj.weight.abs().max() <= 0.0722
    assert not vit.patch_embed.proj.weight.requires_grad and not vit.patch_embed.proj.bias.requires_grad
    assert vit.cls_token.abs().max() < 1e-5 and vit.cls_token.any()
    parameters = sum(p.numel() for p in vit.parameters()) + vit.pos_embed.numel()
    assert parameters == 21_665_664


def test_base_and_deit_sizes():
    with torch.device("meta"):
        count = {n: sum(p.numel() for p in build_backbone(n).parameters()) for n in ("vit_base", "deit_small")}
    assert count["vit_base"] + 197 * 768 == 85_798_656
    assert count["deit_small"] == 21_665_664
    assert build_backbone("deit_small", depth=1).blocks[0].attn.heads == 6


def test_conv_stem_has_its_widths_and_eleven_blocks():
    vit = build_backbone("vit_conv_small")
    assert len(vit.blocks) == 11
    widths = [m.out_channels for m in vit.patch_embed.proj if isinstance(m, torch.nn.Conv2d)]
    assert widths == [48, 96, 192, 384, 384]
    assert all(p.requires_grad for p in vit.patch_embed.parameters())
    out = vit([torch.randn(4, 3, 32, 32)], counts=[2])
    assert out.features.shape == (4, 384) and out.regions[0].shape == (4, 4, 384)
    assert vit.patch_embed.proj[1].num_batches_tracked == 2  # one a view


def test_resolutions_in_one_forward_are_forwards_of_their_own():
    vit = build_backbone("vit", **TINY).double()
    big, small = torch.randn(4, 3, 32, 32).double(), torch.randn(6, 3, 16, 16).double()
    both = vit([big, small])
    assert both.features.shape == (10, 16) and [r.shape[1] for r in both.regions] == [16, 4]
    torch.testing.assert_close(both.features[:4], vit([big]).features)
    torch.testing.assert_close(both.regions[1], vit([small]).regions[0])
    with pytest.raises(ConfigError, match="multiples of 8"):
        vit([torch.randn(1, 3, 20, 20)])


def test_a_wide_image_keeps_rows_and_columns_apart():
    table = sincos(16, 2, 3)[0, 1:].view(2, 3, 16)
    assert torch.equal(table[0, :, :8], table[0, :1, :8].expand(3, 8))  # one row: its half is equal
    assert torch.equal(table[:, 1, 8:], table[:1, 1, 8:].expand(2, 8))


def test_learned_positions_are_resampled_without_antialias():
    vit = build_backbone("deit_tiny", depth=1, img_size=64)
    out = vit([torch.randn(2, 3, 32, 32)])
    assert out.regions[0].shape == (2, 4, 192)
    table = vit.pos_embed[:, 1:].unflatten(1, (4, 4)).permute(0, 3, 1, 2)
    small = torch.nn.functional.interpolate(table, (2, 2), mode="bicubic").flatten(2).transpose(1, 2)
    torch.testing.assert_close(vit._positions(2, 2)[:, 1:], small)


def test_drop_path_is_a_function_of_the_keys():
    torch.manual_seed(0)
    vit = build_backbone("vit", **TINY, drop_path=0.5).double().train()
    x, keys = torch.randn(8, 3, 16, 16).double(), rng.sample_keys(1, 2, torch.arange(8))
    whole = vit([x], keys).features
    halves = torch.cat([vit([x[:4]], keys[:4]).features, vit([x[4:]], keys[4:]).features])
    torch.testing.assert_close(whole, halves, rtol=0, atol=1e-12)
    assert not torch.equal(whole, vit([x], rng.fold(keys, 1)).features)
    assert not torch.equal(vit([x]).features, vit([x]).features)  # without keys: torch's generator
    vit.eval()
    assert torch.equal(vit([x], keys).features, vit([x]).features)
    assert [round(b.drop1.rate, 3) for b in vit.blocks] == [0.0, 0.5]


@pytest.mark.parametrize("keyed", [True, False])
@pytest.mark.parametrize("blocks", ["none", "odd"])
def test_activation_checkpointing_changes_no_gradient(keyed, blocks):
    x = torch.randn(6, 3, 16, 16).double()
    keys = rng.sample_keys(1, 2, torch.arange(6)) if keyed else None
    results = []
    for again in (False, True):
        torch.manual_seed(0)
        moe = MoEConfig(blocks=blocks, experts=4, init="xavier", noise_std=float(keyed))
        vit = build_backbone("vit", **TINY, moe=moe, drop_path=0.3, activation_checkpointing=again).double()
        torch.manual_seed(1)
        out = vit([x], keys)
        (out.features.square().sum() + sum(r.weights.sum() for r in out.routing[0])).backward()
        results.append([p.grad for p in vit.parameters() if p.requires_grad])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


def test_vmoe_is_the_published_network():
    moe = MoEConfig(experts=16, top_k=2, hidden_ratio=2.0)
    vit = build_backbone("vmoe_small", moe=moe)
    parameters = sum(p.numel() for p in vit.parameters()) + vit.pos_embed.numel()
    assert parameters == 71_346_816  # crmoe.md 1.1
    assert not any(p.requires_grad for p in vit.patch_embed.parameters())  # defect 4.1.1 of the release is not repeated
    out = vit([torch.randn(2, 3, 32, 32)])
    assert len(out.routing[0]) == 6 and out.routing[0][0].indices.shape == (2, 5, 2)


def test_moe_blocks():
    assert moe_blocks("odd", 5) == [1, 3] and moe_blocks("all", 2) == [0, 1] and moe_blocks([3, 1], 4) == [1, 3]
    for wrong in ("even", [4], [1, 1], [-1]):
        with pytest.raises(ConfigError, match="moe.blocks"):
            moe_blocks(wrong, 4)


def test_autocast_keeps_the_residual_stream_in_fp32():
    vit = build_backbone("vit", **TINY)
    with torch.autocast("cpu", torch.bfloat16):
        assert vit.tokens(torch.randn(2, 3, 16, 16)).dtype == torch.float32
    half = build_backbone("vit", **TINY).bfloat16()
    assert half([torch.randn(2, 3, 16, 16)]).features.dtype == torch.bfloat16


def test_last_features_and_attention():
    vit = build_backbone("vit", **TINY).eval()
    x = torch.randn(2, 3, 16, 16)
    torch.testing.assert_close(vit.last_features(x, 1), vit([x]).features)
    assert vit.last_features(x, 2, patches=True).shape == (2, 48)
    weights = vit.attention(x)
    assert weights.shape == (2, 4, 5, 5)
    torch.testing.assert_close(weights.sum(-1), torch.ones(2, 4, 5))


def test_errors_name_the_nearest():
    for name, kw, text in (
        ("vit_smal", {}, "did you mean vit_small"),
        ("vit_small", {"patch": 16}, "did you mean patch_size"),
        ("vit_small", {"heads": 7}, "not a multiple of 7 heads"),
        ("vit_small", {"img_size": 30}, "multiple of patch_size"),
        ("resnet18", {"drop_path": 0.1}, "drop_path"),
        ("resnet50", {"moe": MoEConfig(blocks="odd")}, "moe.blocks"),
    ):
        with pytest.raises(ConfigError, match=text):
            build_backbone(name, **kw)
    assert "swin_tiny_w14" in backbone_names()


def test_config_gives_student_and_teacher():
    model = ModelConfig(backbone="vit", options=TINY, drop_path=0.2, activation_checkpointing=True)
    student, teacher = from_config(model, MoEConfig()), from_config(model, MoEConfig(), teacher=True)
    assert student.blocks[1].drop1.rate == 0.2 and teacher.blocks[1].drop1.rate == 0
    teacher.load_state_dict(student.state_dict(), strict=True)
    with pytest.raises(ConfigError, match="moe.blocks"):
        from_config(ModelConfig(backbone="vmoe_small"), MoEConfig())


def test_channels_last_changes_nothing():
    torch.manual_seed(0)
    a = build_backbone("vit", **TINY).double()
    torch.manual_seed(0)
    b = build_backbone("vit", **TINY, channels_last=True).double()
    x = torch.randn(3, 3, 16, 16).double()
    torch.testing.assert_close(a([x]).features, b([x]).features)
