"""The EMA: right formula, right parameters, fp32, and it moves."""

import contextlib

import pytest
import torch
from torch import nn

from moe_cl.engine.teacher import Teacher, ema_


def pair(seed=0):
    torch.manual_seed(seed)
    student = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))
    torch.manual_seed(seed)
    module = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4))
    return student, module


def test_starts_equal_moves_by_the_formula_and_leaves_buffers_and_frozen_alone():
    student, module = pair()
    with torch.no_grad():
        module[0].weight.add_(1)
    student[0].bias.requires_grad_(False)
    teacher = Teacher(module, student, contextlib.nullcontext)
    assert torch.equal(module[0].weight, student[0].weight)
    before = {n: p.clone() for n, p in module.state_dict().items()}
    with torch.no_grad():
        for p in student.parameters():
            p.add_(1)
        student[1].running_mean.add_(5)
    teacher.update(0.75)
    for name, p in module.named_parameters():
        moved = 0.75 * before[name] + 0.25 * dict(student.named_parameters())[name]
        expected = before[name] if name == "0.bias" else moved
        assert torch.allclose(p, expected, atol=1e-7), name
    assert torch.equal(module[1].running_mean, before["1.running_mean"])
    assert not any(p.requires_grad for p in module.parameters())


def test_a_thousand_small_steps_move_as_in_fp64():
    theta, target = torch.ones(1), torch.full((1,), 1.1)
    for _ in range(1000):
        ema_([theta], [target], 0.999)
    assert theta.item() == pytest.approx(1.1 - 0.1 * 0.999**1000, abs=1e-5)


def test_16_bit_teacher_is_refused():
    with pytest.raises(TypeError, match="keep the teacher in fp32"):
        ema_([torch.ones(1, dtype=torch.bfloat16)], [torch.ones(1, dtype=torch.bfloat16)], 0.999)


def test_parameter_without_a_twin_is_an_error():
    student, _ = pair()
    with pytest.raises(ValueError, match="student lacks"):
        Teacher(nn.ModuleDict({"other": nn.Linear(2, 2)}), student, contextlib.nullcontext)


def test_forward_has_no_graph():
    student, module = pair()
    out = Teacher(module, student, contextlib.nullcontext)(torch.randn(3, 4, requires_grad=True))
    assert not out.requires_grad
