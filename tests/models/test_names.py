"""Backbones have the published networks' tensors: the same names (head aside) and shapes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from moe_cl.models.build import build_backbone

KEYMAPS = json.loads((Path(__file__).parents[1] / "golden" / "moco_keymaps.json").read_text())


@pytest.mark.parametrize(
    ("published", "prefix", "name"),
    [
        ("mocov3_vit_small", "module.base_encoder.", "vit_small"),
        ("mocov3_vit_base", "module.base_encoder.", "vit_base"),
        ("mocov3_resnet50", "module.base_encoder.", "resnet50"),
        ("moco_v2_resnet50", "module.encoder_q.", "resnet50"),
        ("moco_v1_resnet18", "module.encoder_k.", "resnet18"),
    ],
)
def test_names_and_shapes(published, prefix, name):
    theirs = {k.removeprefix(prefix): tuple(v) for k, v in KEYMAPS[published].items() if k.startswith(prefix)}
    with torch.device("meta"):
        ours = {k: tuple(v.shape) for k, v in build_backbone(name).state_dict().items()}
    assert ours == {k: v for k, v in theirs.items() if not k.startswith(("fc.", "head."))}


@pytest.mark.parametrize("published", ["mocov3_vit_small", "mocov3_vit_base"])
def test_trainable_set(published):
    names = {n.removeprefix("base_encoder.") for n in KEYMAPS[f"{published}_trainable"] if "base_encoder." in n}
    names = {n.removeprefix("module.") for n in names}
    with torch.device("meta"):
        net = build_backbone(published.removeprefix("mocov3_"))
    ours = {n for n, p in net.named_parameters() if p.requires_grad}
    assert ours == {n.removeprefix("base_encoder.") for n in names if "head." not in n}
