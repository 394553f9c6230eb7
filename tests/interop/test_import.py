"""Files written as others publish them: every key accounted for, and the same outputs on the same input."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
import torchvision

import moe_cl
from moe_cl import cli
from moe_cl.config import ConfigError
from moe_cl.interop.importing import import_file
from moe_cl.models.vit import sincos

GOLDEN = Path(__file__).parents[1] / "golden"
KEYMAPS = json.loads((GOLDEN / "moco_keymaps.json").read_text())
TIMM_VIT = {"img_size": 32, "patch_size": 8, "embed_dim": 192, "depth": 2, "num_heads": 3}


def golden(name, prefix):
    return {
        n.removeprefix(prefix): torch.from_numpy(v) for n, v in np.load(GOLDEN / name).items() if n.startswith(prefix)
    }


def features(module, x):
    with torch.no_grad():
        return module.eval()([x]).features


def close(a, b, tolerance=1e-6):
    """Largest difference, relative to the largest value where that is above 1."""
    assert a.shape == b.shape
    assert (a - b).abs().max().item() <= tolerance * max(1.0, b.abs().max().item())


def one_value(shapes):
    """Tensors of these shapes that take a value each on the disk."""
    state = {name: torch.full((), 0.01).expand(shape) for name, shape in shapes.items()}
    for name, value in state.items():
        if name.endswith("pos_embed"):
            state[name] = sincos(value.shape[-1], 14, 14)
    return state


@pytest.mark.parametrize(
    ("published", "backbone", "tensors", "left"),
    [
        ("moco_v1_resnet18", "resnet18", 120, 6),
        ("moco_v2_resnet50", "resnet50", 318, 10),
        ("mocov3_resnet50", "resnet50", 318, 27),
        ("mocov3_vit_small", "vit", 150, 42),
    ],
)
def test_key_maps(tmp_path, published, backbone, tensors, left):
    torch.save({"epoch": 200, "arch": "x", "state_dict": one_value(KEYMAPS[published])}, tmp_path / "file.pth.tar")
    _, settings, report, assumed = import_file(tmp_path / "file.pth.tar")
    assert settings.model.backbone == backbone and report.complete
    assert (len(report.loaded), len(report.left)) == (tensors, left)
    if backbone == "vit":
        assert settings.model.options["heads"] == 12 and assumed == ["model.options.heads=12"]
        assert settings.model.options["pos_embed"] == "sincos"


@pytest.mark.parametrize("which", ["student", "teacher"])
def test_moco_and_jcl_files_give_torchvisions_features(tmp_path, which):
    sides = {s: torchvision.models.resnet18(num_classes=128) for s in ("encoder_q", "encoder_k")}
    state = {f"module.{s}.{n}": v for s, net in sides.items() for n, v in net.state_dict().items()}
    state |= {"module.queue": torch.randn(128, 16), "module.queue_ptr": torch.zeros(1, dtype=torch.long)}
    torch.save(
        {"epoch": 3, "arch": "resnet18", "state_dict": state, "optimizer": {"state": {}}}, tmp_path / "f.pth.tar"
    )
    module, settings, report, _ = import_file(tmp_path / "f.pth.tar", which=which)
    theirs = sides["encoder_q" if which == "student" else "encoder_k"].eval()
    theirs.fc = torch.nn.Identity()
    x = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        close(features(module, x), theirs(x))
    assert settings.source["which"] == which and "queue" in report.left


def test_crmoe_file_and_folder_of_ranks_route_as_published(tmp_path):
    z = np.load(GOLDEN / "crmoe_e2e.npz")
    state = {f"module.{n}": v for n, v in golden("crmoe_e2e.npz", "sd/").items()}
    torch.save({"epoch": 1, "state_dict": state}, tmp_path / "one.pth.tar")
    folder = tmp_path / "ranks.pth.tar"
    folder.mkdir()
    for rank in range(2):  # rank 0 has everything, the others their experts
        part = {n: (v.chunk(2)[rank] if ".experts." in n else v) for n, v in state.items()}
        part = {n: v for n, v in part.items() if rank == 0 or ".experts." in n}
        torch.save({"state_dict": part}, folder / f"{rank}.pth")
    top_k = int((z["q1_gate_layer0"][0, 0] > 0).sum())
    more = ["model.options.heads=4", f"moe.top_k={top_k}"]
    x = torch.from_numpy(z["x1"])
    both = []
    for path in (tmp_path / "one.pth.tar", folder):
        module, settings, report, assumed = import_file(path, overrides=more)
        assert settings.moe.blocks == [1, 3] and settings.moe.experts == 4 and report.complete and not assumed
        with torch.no_grad():
            both.append(module.eval()([x]))
    for layer, routing in enumerate(both[0].routing[0]):
        gate = torch.zeros_like(routing.probabilities).scatter(2, routing.indices, routing.weights)
        close(gate, torch.from_numpy(z[f"q1_gate_layer{layer}"]), 1e-5)
    assert torch.equal(both[0].features, both[1].features)
    with pytest.raises(ConfigError, match="holds 2 of its 4 experts"):
        import_file(folder / "0.pth", overrides=more)
    (folder / "0.pth").rename(folder / "2.pth")
    with pytest.raises(ConfigError, match=r"0\.pth, 1\.pth"):
        import_file(folder)


@pytest.mark.parametrize("window", [7, 14])
def test_esvit_gives_its_published_features(tmp_path, window):
    state = golden("esvit_swin.npz", f"w{window}__sd__")
    z = np.load(GOLDEN / "esvit_swin.npz")
    state["layers.0.blocks.1.attn.relative_position_index"] = torch.zeros(window**2, window**2, dtype=torch.long)
    state["layers.0.blocks.1.attn_mask"] = torch.zeros(64, window**2, window**2)
    other = {f"module.{n}": torch.zeros_like(v) for n, v in state.items()}
    args = argparse.Namespace(arch="swin_tiny", epochs=300)
    torch.save({"student": other, "teacher": state, "epoch": 300, "args": args}, tmp_path / "checkpoint.pth")
    module, settings, report, _ = import_file(tmp_path / "checkpoint.pth")
    assert settings.source["which"] == "teacher" and settings.model.options["window"] == window
    assert len([n for n in report.derived if n.startswith("teacher.")]) == 2
    close(
        features(module, torch.from_numpy(z[f"w{window}__x224"])[:1].float()),
        torch.from_numpy(z[f"w{window}__pooled_224"]),
        1e-5,
    )
    close(
        features(module, torch.from_numpy(z[f"w{window}__x96"])[:1].float()),
        torch.from_numpy(z[f"w{window}__pooled_96"]),
        1e-5,
    )


@pytest.mark.parametrize("form", ["bare", "whole", "timm"])
def test_dino_and_timm_vits(tmp_path, form):
    theirs = timm.create_model("vit_tiny_patch16_224", num_classes=10 if form == "timm" else 0, **TIMM_VIT).eval()
    torch.nn.init.normal_(theirs.cls_token)
    state = theirs.state_dict()
    if form == "whole":
        head = {"module.head.mlp.0.weight": torch.ones(2, 2), "module.head.last_layer.weight_g": torch.ones(2, 1)}
        teacher = {f"backbone.{n}": v for n, v in state.items()} | {
            n.removeprefix("module."): v for n, v in head.items()
        }
        student = {f"module.backbone.{n}": v for n, v in state.items()} | head
        state = {"student": student, "teacher": teacher, "args": argparse.Namespace(out_dim=2), "dino_loss": {}}
    torch.save(state, tmp_path / "vit.pth")
    module, settings, report, assumed = import_file(tmp_path / "vit.pth")
    assert settings.model.options["heads"] == 3 and assumed == ["model.options.heads=3"]
    assert len(report.left) == {"bare": 0, "whole": 4, "timm": 2}[form]
    x = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        close(features(module, x), theirs.forward_head(theirs.forward_features(x), pre_logits=True))


def test_timm_swin(tmp_path):
    small = {"img_size": 56, "window_size": 7, "embed_dim": 16, "depths": (2, 2), "num_heads": (1, 2)}
    theirs = timm.create_model("swin_tiny_patch4_window7_224", norm_layer=timm.layers.LayerNorm, **small).eval()
    torch.save(theirs.state_dict(), tmp_path / "swin.pth")
    module, _, report, _ = import_file(tmp_path / "swin.pth", overrides=["model.options.img_size=56"])
    assert sorted(report.left) == ["heads.head.fc.bias", "heads.head.fc.weight"]
    x = torch.randn(2, 3, 56, 56)
    with torch.no_grad():
        close(features(module, x), theirs.forward_head(theirs.forward_features(x), pre_logits=True))


def test_torchvision_vit_and_resnet(tmp_path):
    from safetensors.torch import save_file

    vit = torchvision.models.VisionTransformer(32, 8, num_layers=2, num_heads=3, hidden_dim=192, mlp_dim=384).eval()
    resnet = torchvision.models.resnet18().eval()
    for theirs, name in ((vit, "vit.safetensors"), (resnet, "resnet.safetensors")):
        save_file(theirs.state_dict(), tmp_path / name)
        module, _, report, _ = import_file(tmp_path / name)
        assert len(report.left) == 2 and report.complete
        theirs.heads, theirs.fc = torch.nn.Identity(), torch.nn.Identity()
        x = torch.randn(2, 3, 32, 32)
        with torch.no_grad():
            close(features(module, x), theirs(x))


class Evil:
    def __reduce__(self):
        return print, ("unpickled",)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"state_dict": Evil()}, "more than tensors"),
        ({"state_dict": {"conv1.weight": 3}}, "no state dict of tensors"),
        ({}, "no state dict of tensors"),
        ([torch.ones(2)], "no state dict of tensors"),
        ({"unknown.weight": torch.ones(2)}, "no ViT, ResNet or Swin"),
        (b"<!DOCTYPE html><html>not found</html>", "no readable torch file|more than tensors"),
        (b"", "no readable torch file"),
        (None, "no such file"),
    ],
)
def test_what_is_no_weight_file(tmp_path, capsys, content, message):
    path = tmp_path / "file.pth"
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif content is not None:
        torch.save(content, path)
    with pytest.raises(ConfigError, match=message) as error:
        import_file(path)
    assert str(error.value).count("file.pth") == 1 and "\n" not in str(error.value)
    assert "unpickled" not in capsys.readouterr().out


def test_strict_by_default_and_the_report_always(tmp_path, capsys):
    state = torchvision.models.resnet18(num_classes=5).state_dict()
    state["extra.weight"] = torch.ones(1)
    del state["layer4.1.bn2.weight"]
    torch.save(state, tmp_path / "net.pth")
    command = ["import", str(tmp_path / "net.pth"), "--out", str(tmp_path / "out")]
    assert cli.main(command) == 2
    seen = capsys.readouterr()
    assert "missing      1: layer4.1.bn2.weight" in seen.out and "unused       1: extra.weight" in seen.out
    assert "--loose" in seen.err and not (tmp_path / "out").exists()
    assert cli.main([*command, "--loose"]) == 0
    assert "no backbone  2: heads.fc.weight, heads.fc.bias" in capsys.readouterr().out
    keys = json.loads((tmp_path / "out" / "config.json").read_text())["moe_cl"]["source"]["keys"]
    assert keys["missing"] == ["layer4.1.bn2.weight"] and keys["unused"] == ["extra.weight"]
    module = moe_cl.load(tmp_path / "out")
    assert torch.equal(module.conv1.weight, state["conv1.weight"]) and not module.training
    assert cli.main([*command, "--loose", "optim.base_lr=1"]) == 2
    assert "model.options.KEY" in capsys.readouterr().err
