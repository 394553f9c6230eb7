"""The grouped path's arithmetic on the CPU twin of torch's grouped matrix product, against the loop over experts."""

from types import SimpleNamespace

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
    assert not grouped.available(torch.zeros(2, 64), torch.bfloat16, 64, 2)


@pytest.mark.parametrize(("wide", "hidden", "rows", "taken"), [(64, 128, 5, True), (64, 100, 5, False),
                                                              (60, 128, 5, False), (64, 128, 0, False)])  # fmt: skip
def test_taken_where_its_rows_lie_at_16_bytes(wide, hidden, rows, taken, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    x = SimpleNamespace(is_cuda=True, shape=(5, wide), device="cuda")
    assert grouped.available(x, torch.bfloat16, hidden, rows) is taken


def test_no_row_for_this_rank():
    nobody_here("cpu")


def nobody_here(device):
    """Experts whose rank no token chose: zeros out, and gradients of 0."""
    experts = SparseMLP(64, MoEConfig(experts=4, init="xavier")).to(device).experts
    x, ids = torch.rand(6, 64, device=device, requires_grad=True), torch.full((6, 2), 4, device=device)
    with torch.autocast(device, dtype=torch.bfloat16):
        y = experts(x, ids, torch.rand(6, 2, device=device), complete=False)
    grads = torch.autograd.grad(y.sum(), [x, *experts.parameters()])
    assert y.shape == (6, 64) and not any(t.any() for t in (y, *grads))
