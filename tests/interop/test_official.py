"""Names of published checkpoints (their tensors: tests/conformance)."""

import pytest

from moe_cl.config import ConfigError
from moe_cl.interop.official import deit_names, detectron2_name, split


def test_moco():
    out = split({"module.encoder_q.conv1.weight": 1, "module.encoder_q.fc.weight": 2, "module.encoder_k.fc.2.bias": 3,
                 "module.queue": 4})  # fmt: skip
    assert out.kind == "moco" and out.student == {"backbone.conv1.weight": 1, "heads.fc.0.weight": 2}
    assert out.teacher == {"heads.fc.2.bias": 3} and out.method == {"queue": 4}


def test_crmoe_experts():
    names = {"base_encoder.blocks.1.mlp.gate.w_gate": 1, "momentum_encoder.blocks.1.mlp.experts.h4toh.bias": 2,
             "base_encoder.head.7.running_mean": 3, "predictor.3.weight": 4}  # fmt: skip
    out = split(names)
    assert out.student == {"backbone.blocks.1.mlp.router.weight": 1, "heads.projector.7.running_mean": 3,
                           "heads.predictor.3.weight": 4}  # fmt: skip
    assert out.teacher == {"backbone.blocks.1.mlp.experts.b2": 2}


def test_esvit_file_of_two_states():
    state = {"module.norm.weight": 1, "module.head.last_layer.weight_v": 2, "module.head_dense.mlp.0.bias": 3}
    out = split({"student": state, "teacher": state, "epoch": 7})
    want = {"backbone.norm.weight": 1, "heads.view.last_layer.weight_v": 2, "heads.region.mlp.0.bias": 3}
    assert out.kind == "esvit" and out.student == out.teacher == want


def test_what_nobody_published():
    with pytest.raises(ConfigError, match="no published checkpoint"):
        split({"model.encoder.weight": 1})


def test_names_elsewhere():
    assert detectron2_name("module.encoder_q.layer2.0.downsample.1.bias") == "res3.0.shortcut.norm.bias"
    assert detectron2_name("encoder_q.bn1.weight") == "stem.conv1.norm.weight"
    assert deit_names({"module.base_encoder.norm.bias": 1, "module.base_encoder.head.0.weight": 2}) == {"norm.bias": 1}
