"""Export, load with the other library, the same features."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from safetensors.torch import load_file

import moe_cl
from moe_cl import cli
from moe_cl.config import ConfigError, ModelConfig
from moe_cl.engine.checkpoint.format import MANIFEST, Reader, read_manifest, write_bytes, write_shard
from moe_cl.interop.export import open_encoder
from tests.evals.run_dir import TINY, make_run
from tests.interop.test_import import KEYMAPS, close, features

SWIN = {"img_size": 56, "window": 7, "dim": 16, "depths": [2, 2], "heads": [1, 2]}
DENSE = {
    "vit": (ModelConfig("vit", TINY), 16),
    "grey": (ModelConfig("deit_tiny", TINY | {"in_chans": 1}), 16),
    "resnet": (ModelConfig("resnet18"), 64),
    "cifar": (ModelConfig("resnet18_cifar", {"in_chans": 1}), 32),
    "swin": (ModelConfig("swin", SWIN), 56),
}


def run_of(tmp_path, name):
    """A run's folder, its encoder and images."""
    model, size = DENSE[name]
    make_run(tmp_path / "run", model=model, moe="none")
    torch.manual_seed(0)
    return tmp_path / "run", moe_cl.load(tmp_path / "run"), torch.randn(2, model.options.get("in_chans", 3), size, size)


def export(capsys, kind, run, out):
    """Export by command; the net that its printed lines build (names as they stand there)."""
    assert cli.main(["export", kind, "--checkpoint", str(run), "--out", str(out)]) == 0
    printed = capsys.readouterr().out
    return [line[4:] for line in printed.splitlines() if line.startswith("    ")]


def run_lines(lines, images):
    names = {"images": images, "torch": torch, "timm": timm, "C": 0}
    with torch.no_grad():
        exec("\n".join(lines), names)
        return names["features"] if "features" in names else names["net"].eval()(images)


@pytest.mark.parametrize("name", DENSE)
@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
def test_timm_file(tmp_path, capsys, name, suffix):
    run, ours, x = run_of(tmp_path, name)
    close(run_lines(export(capsys, "timm", run, tmp_path / f"net{suffix}"), x), features(ours, x))


@pytest.mark.parametrize("name", ["vit", "grey", "resnet", "swin"])
def test_hub_folder_opens_in_timm_and_here(tmp_path, capsys, name):
    run, ours, x = run_of(tmp_path, name)
    lines = export(capsys, "huggingface", run, tmp_path / "hub")
    close(run_lines(lines, x), features(ours, x))
    assert torch.equal(features(moe_cl.load(tmp_path / "hub"), x), features(ours, x))
    assert "timm.create_model" in (tmp_path / "hub" / "README.md").read_text()


@pytest.mark.parametrize("name", ["resnet", "cifar"])
@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
def test_torchvision_file(tmp_path, capsys, name, suffix):
    run, ours, x = run_of(tmp_path, name)
    close(run_lines(export(capsys, "torchvision", run, tmp_path / f"net{suffix}"), x), features(ours, x))


def test_deit_file_and_its_heads(tmp_path, capsys):
    run, ours, x = run_of(tmp_path, "vit")
    lines = export(capsys, "deit", run, tmp_path / "net.pth")
    close(run_lines(lines, x), features(ours, x))
    assert lines[0] == "# 2 heads"
    assert json.loads((tmp_path / "net.pth.json").read_text())["heads"] == TINY["heads"]
    file = torch.load(tmp_path / "net.pth", weights_only=True)
    assert list(file) == ["model"] and set(file["model"]) == set(ours.state_dict())
    net = timm.create_model("vit_small_patch16_224")  # the golden names are those DeiT's network has
    assert set(KEYMAPS["deit_vit_small"]["keys"]) == {n for n in net.state_dict() if not n.startswith("head.")}


@pytest.mark.parametrize("suffix", [".npz", ".safetensors"])
def test_detectron2_file_and_key_map(tmp_path, capsys, suffix):
    run, ours, _ = run_of(tmp_path, "resnet")
    out = tmp_path / f"net{suffix}"
    export(capsys, "detectron2", run, out)
    golden = {k.removeprefix("module.encoder_q."): v for k, v in KEYMAPS["detectron2_resnet18"].items()}
    golden = {k: v for k, v in golden.items() if not k.startswith("fc.")}
    assert json.loads((tmp_path / f"net{suffix}.json").read_text()) == golden
    arrays = dict(np.load(out, allow_pickle=False)) if suffix == ".npz" else load_file(out)
    own = ours.state_dict()
    assert set(arrays) == set(golden.values())
    assert all(torch.equal(torch.as_tensor(arrays[golden[n]]), own[n]) for n in own)


@pytest.mark.parametrize("kind", ["safetensors", "huggingface"])
def test_experts_of_several_files_become_one(tmp_path, capsys, kind):
    make_run(tmp_path / "run")
    path = next((tmp_path / "run" / "checkpoints").iterdir())
    ours, x = moe_cl.load(tmp_path / "run"), torch.randn(2, 3, 16, 16)
    before = features(ours, x)
    split_experts(path)
    assert torch.equal(features(moe_cl.load(tmp_path / "run"), x), before)
    lines = export(capsys, kind, tmp_path / "run", tmp_path / "net")
    names = {"images": x}
    exec("\n".join(lines), names)  # three lines, and no process group
    assert torch.equal(names["features"], before) and not torch.distributed.is_initialized()
    assert load_file(tmp_path / "net" / "model.safetensors")["blocks.1.mlp.experts.w1"].shape == (4, 16, 16)
    assert "4, 2 a token" in (tmp_path / "net" / "README.md").read_text()
    _, settings = open_encoder(tmp_path / "net")
    assert settings.source == {"method": "mocov3", "recipe": "small", "step": 7, "which": "teacher"}


def split_experts(path: Path) -> None:
    """The checkpoint as two ranks with half of the experts each write it."""
    reader, manifest, halves = Reader(path), read_manifest(path), [{}, {}]
    for key, entry in manifest.tensors.items():
        if ".experts." in key:
            flat, entry.pieces = reader.tensor(key).flatten(), []
            for rank, half in enumerate(flat.chunk(2)):
                halves[rank][key] = half.clone()
                entry.pieces.append([f"rank-{rank}.safetensors", key, rank * len(half), (rank + 1) * len(half)])
    for rank, half in enumerate(halves):
        manifest.files[f"rank-{rank}.safetensors"] = write_shard(path / f"rank-{rank}.safetensors", half)
    (path / MANIFEST).write_text(manifest.dump())


@pytest.mark.parametrize("name", ["vit", "resnet", "swin"])
def test_an_exported_file_comes_back(tmp_path, capsys, name):
    run, ours, x = run_of(tmp_path, name)
    export(capsys, "timm", run, tmp_path / "net.safetensors")
    command = ["import", str(tmp_path / "net.safetensors"), "--out", str(tmp_path / "back")]
    more = {"vit": ["model.options.heads=2"], "swin": ["model.options.img_size=56"]}.get(name, [])
    assert cli.main([*command, *more]) == 0
    assert torch.equal(features(moe_cl.load(tmp_path / "back"), x), features(ours, x))


@pytest.mark.parametrize(
    ("kind", "name", "out", "message"),
    [
        ("timm", "experts", "net.pth", "knows no experts"),
        ("deit", "experts", "net.pth", "knows no experts"),
        ("deit", "resnet", "net.pth", "is for ViTs"),
        ("deit", "vit", "net.safetensors", "end so"),
        ("torchvision", "vit", "net.pth", "is for ResNets"),
        ("detectron2", "vit", "net.npz", "is for ResNets"),
        ("detectron2", "cifar", "net.npz", "stem for small images"),
        ("detectron2", "resnet", "net.pkl", "no pickle"),
        ("timm", "vit", "net.bin", "end in"),
        ("safetensors", "vit", ".", "something else"),
    ],
)
def test_what_a_format_cannot_hold(tmp_path, capsys, kind, name, out, message):
    if name == "experts":
        make_run(tmp_path / "run")
    else:
        make_run(tmp_path / "run", model=DENSE[name][0], moe="none")
    code = cli.main(["export", kind, "--checkpoint", str(tmp_path / "run"), "--out", str(tmp_path / out)])
    assert code == 2 and message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("kind", "place"),
    [
        ("timm", "x.pth"), ("timm", "x.safetensors"), ("torchvision", "x.pth"), ("detectron2", "x.npz"),
        ("detectron2", "x.safetensors"), ("safetensors", "x"),
    ],
)  # fmt: skip
def test_a_place_that_cannot_be_written_is_one_line(tmp_path, capsys, kind, place):
    make_run(tmp_path / "run", model=DENSE["resnet"][0], moe="none")
    assert cli.main(["export", kind, "--checkpoint", str(tmp_path / "run"), "--out", f"/proc/{place}"]) == 2
    error = capsys.readouterr().err
    assert "cannot be written" in error and error.count("\n") == 1, error


def test_arrays_for_detectron2_are_not_read_back(tmp_path, capsys):
    run, *_ = run_of(tmp_path, "resnet")
    export(capsys, "detectron2", run, tmp_path / "net.npz")
    assert cli.main(["import", str(tmp_path / "net.npz"), "--out", str(tmp_path / "back")]) == 2
    assert "export and import safetensors or timm" in capsys.readouterr().err


def test_load_names_what_is_wrong(tmp_path):
    with pytest.raises(ConfigError, match="no complete checkpoint"):
        moe_cl.load(tmp_path)
    make_run(tmp_path / "run", model=DENSE["vit"][0], moe="none")
    assert (
        cli.main(["export", "safetensors", "--checkpoint", str(tmp_path / "run"), "--out", str(tmp_path / "net")]) == 0
    )
    with pytest.raises(ConfigError, match="holds a teacher, no student"):
        moe_cl.load(tmp_path / "net", "student")
    (tmp_path / "net" / "model.safetensors").write_bytes(b"cut off")
    with pytest.raises(ConfigError, match="no readable safetensors"):
        moe_cl.load(tmp_path / "net")


@pytest.mark.parametrize("name", ["weights.safetensors", MANIFEST, "config.yaml"])
def test_no_encoder_leaves_a_damaged_checkpoint(tmp_path, capsys, name):
    """One flipped bit of what is read: one line, exit code 2 and no file, for export as for the evaluations."""
    make_run(tmp_path / "run", model=DENSE["vit"][0], moe="none")
    path = tmp_path / "run" / "checkpoints" / "step-00000007"
    manifest = read_manifest(path)
    manifest.files["config.yaml"] = write_bytes(path / "config.yaml", [(path / "config.yaml").read_bytes()])
    (path / MANIFEST).write_text(manifest.dump())
    moe_cl.load(tmp_path / "run")
    data = bytearray((path / name).read_bytes())
    data[-20] ^= 1
    (path / name).write_bytes(data)
    argv = ["--checkpoint", str(tmp_path / "run")]
    for command in (["export", "timm", *argv, "--out", str(tmp_path / "net.pth")], ["eval", "knn", *argv]):
        assert cli.main(command) == 2
        error = capsys.readouterr().err
        assert error.count("\n") == 1 and "step-00000007" in error and "take another" in error
    assert not (tmp_path / "net.pth").exists()


def test_the_package_imports_no_torch():
    code = "import moe_cl, sys; sys.exit('torch' in sys.modules or not callable(moe_cl.load))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
