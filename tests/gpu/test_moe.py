"""The MoE layer on a GPU: the grouped path against the loop, and equal bits from equal inputs."""

import pytest
import torch

from moe_cl.config import MoEConfig
from moe_cl.moe import grouped
from moe_cl.moe.experts import SparseMLP
from tests.moe.test_grouped import both, check, nobody_here

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]


@pytest.mark.parametrize("recompute", [False, True])
def test_grouped_equals_the_loop(recompute, monkeypatch):
    check(*both("cuda", recompute, monkeypatch, experts=16))


def test_fp32_equals_the_cpu():
    torch.manual_seed(0)
    layer = SparseMLP(64, MoEConfig(experts=8, init="xavier"))
    x = torch.randn(2, 33, 64)
    want = layer(x)[0]
    assert not grouped.available(x.cuda(), torch.float32, 64, 66)
    torch.testing.assert_close(layer.cuda()(x.cuda())[0].cpu(), want, rtol=0, atol=1e-4)


def test_a_hidden_width_that_is_no_multiple_of_8():
    torch.manual_seed(0)
    layer = SparseMLP(64, MoEConfig(experts=4, init="xavier", hidden_ratio=100 / 64)).cuda()
    with torch.autocast("cuda", dtype=torch.bfloat16):
        y, _ = layer(torch.rand(2, 9, 64, device="cuda"))
    y.sum().backward()
    assert layer.experts.w1.shape[1] == 100 and layer.experts.w1.grad.isfinite().all()


def test_no_row_for_this_rank():
    nobody_here("cuda")


def test_equal_bits():
    """No atomic additions: two runs of forward and backward agree in every bit."""
    torch.manual_seed(0)
    layer = SparseMLP(384, MoEConfig(experts=16, init="xavier")).cuda()
    x = torch.randn(8, 197, 384, device="cuda")
    runs = []
    for _ in range(2):
        part = x.clone().requires_grad_()
        with torch.autocast("cuda", dtype=torch.bfloat16):
            y, _ = layer(part)
        runs.append((y, *torch.autograd.grad(y.square().sum(), [part, *layer.parameters()])))
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))
