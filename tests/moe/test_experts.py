"""The layer against golden values of the published code and against plain autograd, on one rank and several."""

from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_cl.comm import SimComm
from moe_cl.config import ConfigError, MoEConfig
from moe_cl.moe import mlp
from moe_cl.moe.experts import Experts, SparseMLP

GOLDEN = {k: torch.from_numpy(v) for k, v in np.load(Path("tests/golden/crmoe_moelayer.npz")).items()}
NAMES = {"w1": "htoh4_weight", "b1": "htoh4_bias", "w2": "h4toh_weight", "b2": "h4toh_bias"}


def plain(layer, x, routing):
    """The definition, token by expert, in autograd's own operations."""
    e = layer.experts
    y = torch.zeros_like(x)
    for i in range(len(e.w1)):
        p = (routing.weights * (routing.indices == i)).sum(-1, keepdim=True)
        y = y + p * F.linear(F.gelu(F.linear(x, e.w1[i], e.b1[i])), e.w2[i], e.b2[i])
    return y


def grads(layer, x, y, cotangent):
    names = [n for n, _ in layer.named_parameters()]
    out = torch.autograd.grad((y * cotangent).sum(), [x, *layer.parameters()], retain_graph=True)
    return dict(zip(["x", *names], out, strict=True))


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("mode", ["eval", "train0", "train1"])
def test_golden(mode, recompute):
    """Output and every gradient of the published layer."""
    layer = SparseMLP(32, MoEConfig(experts=8, noise_std=float(mode == "train1"), recompute=recompute))
    layer.train(mode != "eval")
    layer.router.weight.data.copy_(GOLDEN["w_gate"])
    for ours, theirs in NAMES.items():
        getattr(layer.experts, ours).data.copy_(GOLDEN[theirs])
    if mode == "train1":
        layer.router._noise = lambda keys, n, t, dtype: GOLDEN["train1_noise"].view(n, t, -1)
    x = GOLDEN["x"].clone().requires_grad_()
    y, _ = layer(x)
    torch.testing.assert_close(y, GOLDEN[f"{mode}_y"], atol=4e-6, rtol=0)
    for name, got in grads(layer, x, y, GOLDEN["r"]).items():
        name = {"router.weight": "w_gate", **{f"experts.{k}": v for k, v in NAMES.items()}}.get(name, name)
        want = GOLDEN[f"{mode}_grad_{name}"]
        torch.testing.assert_close(got, want, atol=2e-5 * float(want.abs().max()), rtol=0)


@settings(deadline=None, max_examples=25)
@given(
    n=st.integers(0, 3), t=st.integers(1, 9), k=st.integers(1, 3), chunk=st.sampled_from([2, 5, 1024]),
    skew=st.booleans(), recompute=st.booleans(), seed=st.integers(0, 2**31),
)  # fmt: skip
def test_equals_the_definition(n, t, k, chunk, skew, recompute, seed):
    """fp64, any number of tokens, idle experts and uneven routing included."""
    torch.manual_seed(seed)
    layer = SparseMLP(6, MoEConfig(experts=4, top_k=k, init="xavier", recompute=recompute), seed=seed).double()
    with torch.no_grad():
        layer.experts.b1.normal_(), layer.experts.b2.normal_()
        if skew:
            layer.router.weight.zero_()
    x = torch.randn(n, t, 6, dtype=torch.float64, requires_grad=True)
    cotangent = torch.randn(n, t, 6, dtype=torch.float64)
    before, mlp.CHUNK = mlp.CHUNK, chunk
    try:
        y, routing = layer(x)
        got = grads(layer, x, y, cotangent)
    finally:
        mlp.CHUNK = before
    want = plain(layer, x, routing)
    torch.testing.assert_close(y, want, rtol=1e-12, atol=1e-12)
    for name, value in grads(layer, x, want, cotangent).items():
        torch.testing.assert_close(got[name], value, rtol=1e-11, atol=1e-11, msg=name)


def ranks_against_one(world, counts, experts, k, seed):
    """Outputs and gradients of ``world`` ranks with counts[r] tokens against one rank with all of them."""
    torch.manual_seed(seed)
    moe = MoEConfig(experts=experts, top_k=k, init="xavier")
    whole = SparseMLP(6, moe, layer=2, seed=seed).double()
    x = torch.randn(1, sum(counts), 6, dtype=torch.float64, requires_grad=True)
    cotangent = torch.randn_like(x)
    y, routing = whole(x)
    want = grads(whole, x, y, cotangent)
    starts = [sum(counts[:r]) for r in range(world)]

    def one(comm):
        layer = SparseMLP(6, moe, layer=2, comm=comm, seed=seed).double()
        own = slice(starts[comm.rank], starts[comm.rank] + counts[comm.rank])
        part = x.detach()[:, own].clone().requires_grad_()
        y, routing = layer(part)
        return y.detach(), grads(layer, part, y, cotangent[:, own]), routing

    out = SimComm.run(world, one)
    close = dict(rtol=0, atol=1e-10)
    torch.testing.assert_close(torch.cat([o[0] for o in out], 1), y, **close)
    torch.testing.assert_close(torch.cat([o[1]["x"] for o in out], 1), want["x"], **close)
    torch.testing.assert_close(sum(o[1]["router.weight"] for o in out), want["router.weight"], **close)
    for name in NAMES:
        got = torch.cat([o[1][f"experts.{name}"] for o in out])
        torch.testing.assert_close(got, want[f"experts.{name}"], **close)
    return routing, [o[2] for o in out]


@settings(deadline=None, max_examples=25)
@given(data=st.data(), world=st.sampled_from([1, 2, 4]), k=st.integers(1, 3), seed=st.integers(0, 2**31))
def test_any_expert_parallel_size_is_the_same(data, world, k, seed):
    counts = data.draw(st.lists(st.integers(0, 7), min_size=world, max_size=world))
    ranks_against_one(world, counts, 4 * data.draw(st.integers(1, 2)), k, seed)


def test_a_token_travels_once_to_each_rank_that_holds_its_experts():
    counts = [5, 0, 11, 3]
    whole, parts = ranks_against_one(4, counts, 8, 2, seed=3)
    home = (whole.indices // 2).view(-1, 2).split(counts)
    for rank, (routing, homes) in enumerate(zip(parts, home, strict=True)):
        assert routing.sent == sum(len({*h.tolist()} - {rank}) for h in homes)


@pytest.mark.parametrize(("world", "experts"), [(2, 16), (4, 8)])
def test_bytes_sent_are_the_unique_pairs(world, experts):
    """A forward: counts, rows there, rows back; the backward: rows there, rows back.

    Beside the rows go k weights and one-byte ids of the pairs whose rank holds several of the token's experts (and the
    weights' gradients back), and E_local + 1 counts to each rank. Nothing else.
    """
    dim, k, local = 16, 2, experts // world

    def one(comm):
        messages, plain_exchange = [], comm._exchange

        def counting(x, send, recv):
            messages.append((len(x) - send[comm.rank]) * x[:1].numel() * x.element_size())
            return plain_exchange(x, send, recv)

        comm._exchange = counting
        layer = SparseMLP(dim, MoEConfig(experts=experts, top_k=k), comm=comm)
        x = torch.randn(2, 90 + comm.rank, dim, requires_grad=True)
        y, routing = layer(x)
        y.sum().backward()
        homes = [Counter(h) for h in (routing.indices // local).view(-1, k).tolist()]
        away = [number for h in homes for rank, number in h.items() if rank != comm.rank]
        return messages, len(away), sum(number > 1 for number in away)

    out = SimComm.run(world, one)
    assert all(len(messages) == 5 for messages, *_ in out)
    counts, there, back, grad_there, grad_back = (sum(m[i] for m, *_ in out) for i in range(5))
    pairs, shared = (sum(o[i] for o in out) for i in (1, 2))
    rows = pairs * dim * 4
    assert counts == world * (world - 1) * (local + 1) * 4
    assert (there - rows, back) == (shared * k * (4 + 1), rows)
    assert (grad_there, grad_back - rows) == (rows, shared * k * 4)
    assert 0 < shared < pairs / 2


def test_the_same_model_for_every_layout():
    one = Experts(6, 12, 8, 0, "published", layer=1, seed=5)
    parts = [Experts(6, 12, 2, first, "published", layer=1, seed=5) for first in (0, 2, 4, 6)]
    for name, value in one.state_dict().items():
        assert torch.equal(value, torch.cat([p.state_dict()[name] for p in parts]))
    assert not torch.equal(one.w1[0], one.w1[1])
    assert not torch.equal(one.w1, Experts(6, 12, 8, 0, "published", layer=2, seed=5).w1)


@pytest.mark.parametrize(("init", "bound"), [("published", (384 * 768) ** -0.5), ("xavier", (6 / 1152) ** 0.5)])
def test_init_range(init, bound):
    experts = Experts(384, 768, 2, 0, init, layer=0, seed=0)
    for w in (experts.w1, experts.w2):
        assert 0.999 * bound < w.abs().max() <= bound
    assert not experts.b1.any() and not experts.b2.any()


def test_idle_experts_get_a_zero_gradient():
    layer = SparseMLP(6, MoEConfig(experts=8, top_k=1))
    y, routing = layer(torch.randn(1, 2, 6))
    y.sum().backward()
    idle = [e for e in range(8) if e not in routing.indices.flatten()]
    assert len(idle) >= 6
    for parameter in layer.experts.parameters():
        assert parameter.grad is not None and not parameter.grad[idle].any()


def test_autocast_is_close_to_fp32_and_gradients_keep_their_type():
    torch.manual_seed(0)
    layer = SparseMLP(64, MoEConfig(experts=4, init="xavier"))
    x = torch.randn(2, 33, 64, requires_grad=True)
    y, _ = layer(x)
    want = grads(layer, x, y, torch.ones_like(y))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        low, _ = layer(x)
    assert low.dtype == torch.float32
    assert not torch.equal(low, y)
    torch.testing.assert_close(low, y, atol=0.02 * float(y.detach().abs().max()), rtol=0)
    for name, got in grads(layer, x, low, torch.ones_like(y)).items():
        assert got.dtype == torch.float32
        torch.testing.assert_close(got, want[name], atol=0.03 * float(want[name].abs().max()), rtol=0)


def test_experts_must_divide():
    with pytest.raises(ConfigError, match="moe.experts=6"):
        SimComm.run(4, lambda comm: SparseMLP(6, MoEConfig(experts=6), comm=comm))
