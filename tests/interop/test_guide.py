"""Every command and line of docs/interop.md, on small runs and on files as others publish them."""

from __future__ import annotations

import json
import re

import pytest
import timm
import torch
import torchvision

from moe_cl.cli import main
from moe_cl.config import ModelConfig
from tests import guide
from tests.evals.run_dir import TINY, make_images, make_run

VIT = {"img_size": 32, "patch_size": 8, "embed_dim": 384, "depth": 2}


def moco_file(path):
    """``encoder_q`` and ``encoder_k`` with an MLP head, and the queue."""
    sides = {side: torchvision.models.resnet18(num_classes=128) for side in ("encoder_q", "encoder_k")}
    state = {f"module.{side}.{n}": v for side, net in sides.items() for n, v in net.state_dict().items()}
    state["module.queue"] = torch.randn(128, 16)
    torch.save({"epoch": 800, "arch": "resnet18", "state_dict": state}, path)


def mocov3_file(path):
    """``base_encoder`` and ``momentum_encoder``, a ViT without class weights."""
    from moe_cl.models.vit import sincos

    state = {}
    for side in ("base_encoder", "momentum_encoder"):
        net = timm.create_model("vit_small_patch16_224", num_heads=12, num_classes=0, **VIT)
        net.pos_embed.data = sincos(384, 4, 4)
        state |= {f"module.{side}.{n}": v for n, v in net.state_dict().items()}
    torch.save({"epoch": 300, "arch": "vit_small", "state_dict": state}, path)


def dino_file(path):
    """A bare ViT."""
    net = timm.create_model("vit_small_patch16_224", num_classes=0, **VIT)
    torch.save(net.state_dict() | {}, path)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with the runs, files and images that the guide names."""
    base = tmp_path_factory.mktemp("guide")
    images = make_images(base / "images", size=32)
    make_run(base / "runs" / "quickstart", images)
    make_run(base / "runs" / "mocov3_vit", images, ModelConfig("vit", TINY), "none")
    make_run(base / "runs" / "mocov2", images, ModelConfig("resnet18"), "none")
    for name, write in {"moco_v2_800ep_pretrain.pth.tar": moco_file, "vit-s-300ep.pth.tar": mocov3_file,
                        "dino_deitsmall16_pretrain.pth": dino_file}.items():  # fmt: skip
        write(base / name)
    return base


def test_every_command_in_order(place, monkeypatch, capsys):
    monkeypatch.chdir(place)
    commands = guide.commands("interop")
    assert len(commands) == 11
    for command in commands:
        guide.run(command)
        printed = capsys.readouterr().out
        if "export" in command and "detectron2" not in command:
            lines = [line[4:] for line in printed.splitlines() if line.startswith("    ")]
            side = 32 if "imported" in command else 16
            names = {"images": torch.randn(2, 3, side, side), "torch": torch, "timm": timm, "C": 0}
            exec("\n".join(lines), names)
    assert json.loads((place / "imported/dino/evals/knn.json").read_text())["values"]["k10/top1"] > 0.9
    kept = json.loads((place / "imported/mocov3/config.json").read_text())["moe_cl"]["source"]
    assert kept["which"] == "teacher" and kept["assumed"] == ["model.options.heads=12"] and not kept["keys"]["missing"]


def test_the_three_lines(place, monkeypatch):
    monkeypatch.chdir(place)
    (lines,) = re.findall(r"^    import moe_cl\n(?:    .*\n)*", (guide.DOCS / "interop.md").read_text(), re.MULTILINE)
    names = {"images": torch.randn(3, 3, 16, 16)}
    exec("\n".join(line[4:] for line in lines.splitlines()), names)
    assert names["features"].shape == (3, names["encoder"].dim)


@pytest.mark.parametrize("protocol", ["summary", "linear", "fewshot", "logistic", "finetune", "correspondence"])
def test_an_imported_folder_is_evaluated_as_a_run(place, tmp_path, monkeypatch, capsys, protocol):
    monkeypatch.chdir(place)
    folder = tmp_path / "imported"
    guide.run(f"python -m moe_cl import dino_deitsmall16_pretrain.pth --out {folder} model.options.heads=6")
    assert main(["eval", protocol, "--checkpoint", str(folder)]) == 2
    error = capsys.readouterr().err
    assert "labelled" in error and "--t" in error and error.count("\n") == 1
    sets = ["--train", "folder:images/train", "--test", "folder:images/test"]
    cut = {"finetune": ["--epochs", "1", "--train-batch", "8"], "logistic": ["--iterations", "3"]}.get(protocol, [])
    assert main(["eval", protocol, "--checkpoint", str(folder), *sets, *cut]) == 0
    found = json.loads((folder / "evals" / f"{protocol}.json").read_text())
    assert found["values"] and found["setting"]["test"] == "folder:images/test"
    assert not (folder / "journal.jsonl").exists(), "an imported folder is no run"
