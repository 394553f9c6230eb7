"""The grouped path's arithmetic on the CPU twin of torch's grouped matrix product, against the loop over experts."""

import pytest
import torch

from moe_cl.config import MoEConfig
from moe_cl.moe import grouped
from moe_cl.moe.experts import SparseMLP


def both(device, recompute, monkeypatch, experts=4):
    """Output and gradients of the loop and of the grouped path, on the same bf16 layer."""
    torch.manual_seed(0)
    layer = SparseMLP(64, MoEConfig(experts=experts, init="xavier", recompute=recompute)).to(device)
    with torch.no_grad():
        layer.experts.b1.normal_(), layer.experts.b2.normal_()
        layer.router.weight[:, 1] = -5.0  # positive inputs never choose expert 1
    x = torch.rand(3, 21, 64, device=device)
    out = []
    for use in (False, True):
        monkeypatch.setattr(grouped, "available", lambda *_, use=use: use)
        part = x.clone().requires_grad_()
        with torch.autocast(device, dtype=torch.bfloat16):
            y, routing = layer(part)
        assert 1 not in routing.indices
        grads = torch.autograd.grad(y.float().square().sum(), [part, *layer.parameters()])
        out.append((y, *grads))
    return out


def check(loop, grouped_path):
    for one, two in zip(loop, grouped_path, strict=True):
        assert one.dtype == two.dtype == torch.float32
        torch.testing.assert_close(two, one, rtol=0, atol=0.03 * float(one.detach().abs().max()))


@pytest.mark.parametrize("recompute", [False, True])
def test_grouped_equals_the_loop(recompute, monkeypatch):
    loop, grouped_path = both("cpu", recompute, monkeypatch)
    check(loop, grouped_path)
    assert not grouped_path[3][1].any()  # the idle expert's gradient is 0, not missing


def test_not_taken_on_the_cpu():
    assert not grouped.available(torch.zeros(2, 64), torch.bfloat16)
