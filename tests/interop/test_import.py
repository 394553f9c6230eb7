"""Files written as others publish them: every key accounted for, and the same outputs on the same input."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from unittest.mock import patch

import numpy as np
import pytest
import timm
import torch
import torchvision

import moe_cl
from moe_cl import cli
from moe_cl.config import ConfigError
from moe_cl.interop import published
from moe_cl.interop.importing import import_file
from moe_cl.models.vit import sincos

GOLDEN = Path(__file__).parents[1] / "golden"
KEYMAPS = json.loads((GOLDEN / "moco_keymaps.json").read_text())
HEADS = "model.options.heads=4"  # of the golden ViT
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


def test_mocov3_file_gives_timms_features_and_the_published_loss(tmp_path):
    """timm's features of the same tensors; and the golden step's loss, through the file's own heads."""
    z = np.load(GOLDEN / "moco_v3_forward_vit.npz")
    state, m = golden("moco_v3_forward_vit.npz", "world1/sd0/"), float(z["m"])
    torch.save({"epoch": 1, "state_dict": {f"module.{n}": v for n, v in state.items()}}, tmp_path / "v3.pth.tar")
    nets = {}
    for which in ("student", "teacher"):
        nets[which], settings, report, _ = import_file(tmp_path / "v3.pth.tar", which=which, overrides=[HEADS])
        assert report.complete and nets[which].double()
    own = settings.model.options
    options = {k: own[k] for k in ("img_size", "patch_size", "depth", "mlp_ratio")} | {"embed_dim": own["dim"]}
    theirs = timm.create_model("vit_small_patch16_224", num_classes=0, num_heads=own["heads"], **options)
    base = {n.removeprefix("base_encoder."): v for n, v in state.items() if n.startswith("base_encoder.")}
    theirs.load_state_dict({n: v for n, v in base.items() if not n.startswith("head.")})
    x = [torch.from_numpy(z[f"world1/x{i}"]) for i in (1, 2)]
    with torch.no_grad():
        close(features(nets["student"], x[0]), theirs.double().eval()(x[0]))
        for k, q in zip(nets["teacher"].parameters(), nets["student"].parameters(), strict=True):
            k.lerp_(q, 1 - m)  # the EMA comes before the keys
    for name in [n for n in state if n.startswith("momentum_encoder.head.") and state[n].is_floating_point()]:
        state[name] = torch.lerp(state[name], state[name.replace("momentum", "base")], 1 - m)

    def head(x, name, layers):
        for n in range(0, 3 * layers, 3):  # linear, batch norm, ReLU; the last without affine and ReLU
            affine = [state.get(f"{name}.{n + 1}.{p}") for p in ("weight", "bias")]
            x = torch.nn.functional.batch_norm(x @ state[f"{name}.{n}.weight"].T, None, None, *affine, training=True)
            x = x if affine[0] is None else x.relu()
        return x

    q = [head(head(features(nets["student"], v), "base_encoder.head", 3), "predictor", 2) for v in x]
    k = [head(features(nets["teacher"], v), "momentum_encoder.head", 3) for v in x]
    (q1, q2), (k1, k2), t = *([torch.nn.functional.normalize(v) for v in side] for side in (q, k)), float(z["T"])
    pairs = [torch.nn.functional.cross_entropy(a @ b.T / t, torch.arange(len(a))) for a, b in ((q1, k2), (q2, k1))]
    assert 2 * t * float(sum(pairs)) == pytest.approx(float(z["world1/loss"]), rel=1e-6)


def published_crmoe(state, x, heads, top_k):
    """CLS features of a published state dict (fused experts), token by token as the paper has it (crmoe.md 1.3)."""
    f = torch.nn.functional
    norm = lambda x, name: f.layer_norm(x, x.shape[-1:], state[f"{name}.weight"], state[f"{name}.bias"], 1e-6)  # noqa: E731
    line = lambda x, name: f.linear(x, state[f"{name}.weight"], state[f"{name}.bias"])  # noqa: E731
    patch = state["patch_embed.proj.weight"]
    x = f.conv2d(x, patch, state["patch_embed.proj.bias"], stride=patch.shape[-1]).flatten(2).transpose(1, 2)
    x = torch.cat([state["cls_token"].expand(len(x), -1, -1), x], 1) + state["pos_embed"]
    for block in range(1 + max(int(n.split(".")[1]) for n in state if n.startswith("blocks."))):
        at = f"blocks.{block}"
        qkv = line(norm(x, f"{at}.norm1"), f"{at}.attn.qkv").unflatten(2, (3, heads, -1)).permute(2, 0, 3, 1, 4)
        mixed = (qkv[0] @ qkv[1].transpose(-1, -2) / qkv.shape[-1] ** 0.5).softmax(-1) @ qkv[2]
        x = x + line(mixed.transpose(1, 2).flatten(2), f"{at}.attn.proj")
        tokens = norm(x, f"{at}.norm2")
        if f"{at}.mlp.fc1.weight" in state:
            x = x + line(f.gelu(line(tokens, f"{at}.mlp.fc1")), f"{at}.mlp.fc2")
            continue
        out, at = torch.zeros_like(tokens), f"{at}.mlp.experts"
        weights, chosen = (tokens @ state[at.replace("experts", "gate.w_gate")]).softmax(-1).topk(top_k)
        for i, j in np.ndindex(*tokens.shape[:2]):
            for weight, e in zip(weights[i, j], chosen[i, j], strict=True):
                hidden = f.gelu(state[f"{at}.htoh4.weight"][e] @ tokens[i, j] + state[f"{at}.htoh4.bias"][e])
                out[i, j] += weight * (state[f"{at}.h4toh.weight"][e] @ hidden + state[f"{at}.h4toh.bias"][e])
        x = x + out
    return norm(x, "norm")[:, 0]


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
    student = golden("crmoe_e2e.npz", "sd/base_encoder.")
    close(both[0].features, published_crmoe(student, x, 4, top_k), 1e-5)
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


@pytest.mark.parametrize("form", ["bare", "whole", "headless", "timm"])
def test_dino_and_timm_vits(tmp_path, form):
    theirs = timm.create_model("vit_tiny_patch16_224", num_classes=10 if form == "timm" else 0, **TIMM_VIT).eval()
    torch.nn.init.normal_(theirs.cls_token)
    state = theirs.state_dict()
    if form == "headless":
        state = {s: {f"module.backbone.{n}": v for n, v in state.items()} for s in ("student", "teacher")}
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
    assert len(report.left) == {"bare": 0, "whole": 4, "headless": 0, "timm": 2}[form]
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
        ({0: torch.ones(2)}, "called 0"),
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


def test_a_damaged_file_is_refused(tmp_path):
    """torch does not look at the archive's checksums."""
    path = tmp_path / "net.pth"
    torch.save(torchvision.models.resnet18().state_dict(), path)
    data = bytearray(path.read_bytes())
    middle = len(data) // 2
    data[middle : middle + 4000] = bytes(4000)
    path.write_bytes(data)
    with pytest.raises(ConfigError, match="is damaged .* another checksum") as error:
        import_file(path)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda x: x.mul_(float("nan")), "conv1.weight has values that are not finite"),
        (lambda x: x.to(torch.int8), "conv1.weight is int8 in the file, float32 in the network"),
        (lambda x: x.to(torch.complex64), "conv1.weight is complex64"),
        (lambda x: x.to_sparse(), "conv1.weight is quantised, sparse"),
        (lambda x: x[:0], r"conv1.weight has shape \(0, 3, 7, 7\)"),
        (lambda x: x.sum(), r"conv1.weight has shape \(\)"),
    ],
)
def test_values_that_are_no_weights(tmp_path, change, message):
    state = torchvision.models.resnet18(num_classes=2).state_dict()
    state["conv1.weight"] = change(state["conv1.weight"])
    torch.save(state, tmp_path / "net.pth")
    for strict in (True, False):
        with pytest.raises(ConfigError, match=message):
            import_file(tmp_path / "net.pth", strict=strict)


@pytest.mark.parametrize("name", ["vit", "swin", "resnet", "crmoe"])
def test_any_missing_or_shapeless_tensor_is_one_line(tmp_path, name):
    """No traceback, whichever tensor it is (a missing batch counter alone is taken: old files have none)."""
    more = []
    if name == "vit":
        state = timm.create_model("vit_tiny_patch16_224", num_classes=0, **TIMM_VIT).state_dict()
    elif name == "swin":
        small = {"img_size": 56, "window_size": 7, "embed_dim": 16, "depths": (1, 1), "num_heads": (1, 2)}
        state = timm.create_model("swin_tiny_patch4_window7_224", num_classes=0, **small).state_dict()
        more = ["model.options.img_size=56"]
    elif name == "resnet":
        state = torchvision.models.resnet18().state_dict()
    else:
        state, more = golden("crmoe_e2e.npz", "sd/"), ["model.options.heads=4"]
        state = {n: v for n, v in state.items() if not n.startswith(("momentum", "predictor"))}
    some = ("conv1.weight", "bn1.weight", "layer1.0.conv1.weight", "layer4.1.conv2.weight")  # slow to build
    for key in state if name != "resnet" else some:
        if "head." in key or key.endswith(("num_batches_tracked", "relative_position_index", "attn_mask")):
            continue
        for value in (None, torch.ones(()), torch.ones(0)):
            changed = {n: v for n, v in state.items() if n != key} | ({} if value is None else {key: value})
            with patch.object(published, "read", lambda path, changed=changed: published.rename(changed)):
                with pytest.raises(ConfigError) as error:
                    import_file(tmp_path / "net.pth", overrides=more)
            assert "\n" not in str(error.value)


def test_a_stem_for_small_images_is_an_assumption(tmp_path):
    state = torchvision.models.resnet18(num_classes=2).state_dict()
    state["conv1.weight"] = torch.randn(64, 3, 3, 3)
    torch.save(state, tmp_path / "net.pth")
    module, _, report, assumed = import_file(tmp_path / "net.pth")
    assert assumed == ["model.options.cifar_stem=True"] and report.complete
    assert isinstance(module.maxpool, torch.nn.Identity)


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
