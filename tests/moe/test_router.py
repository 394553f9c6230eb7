"""The router against golden values of the published gate, and its own promises."""

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_cl.config import ConfigError, MoEConfig
from moe_cl.moe.router import Router

GOLDEN = {k: torch.from_numpy(v) for k, v in np.load(Path("tests/golden/crmoe_gate.npz")).items()}


def cv2(x):
    return x.var() / (x.mean() ** 2 + 1e-10)


def golden_router(case, mode, monkeypatch=None, **options):
    weight = GOLDEN[f"{case}_w_gate"]
    moe = MoEConfig(
        experts=weight.shape[1],
        top_k=int(GOLDEN[f"{case}_top_k"]),
        noise_std=float(GOLDEN[f"{case}_{mode}_noise_std_cfg"]),
        **options,
    )
    router = Router(weight.shape[0], moe).train(bool(GOLDEN[f"{case}_{mode}_train"]))
    router.weight.data.copy_(weight)
    noise = GOLDEN.get(f"{case}_{mode}_noise")
    if noise is not None:
        router._noise = lambda keys, n, t, dtype: noise.view(n, t, -1)
    return router


def sparse(routing):
    dense = torch.zeros(*routing.indices.shape[:2], routing.experts)
    return dense.scatter(-1, routing.indices, routing.weights)


@pytest.mark.parametrize("mode", ["eval", "train0", "train1", "train3"])
@pytest.mark.parametrize("case", "ABC")
def test_golden(case, mode):
    """Indices, weights, both activations and the statistics of the published gate."""
    router = golden_router(case, mode)
    routing = router(GOLDEN[f"{case}_x"][None])
    clear = GOLDEN[f"{case}_{mode}_tie_margin"] > 1e-6
    assert torch.equal(routing.indices[0][clear], GOLDEN[f"{case}_{mode}_topk_idx"][clear])
    torch.testing.assert_close(routing.weights[0], GOLDEN[f"{case}_{mode}_topk_w"], atol=5e-6, rtol=0)
    torch.testing.assert_close(sparse(routing)[0], GOLDEN[f"{case}_{mode}_activation"], atol=5e-6, rtol=0)
    torch.testing.assert_close(routing.probabilities[0], GOLDEN[f"{case}_{mode}_softmax_activation"], atol=5e-6, rtol=0)
    if mode == "eval":
        return
    importance = sparse(routing).sum((0, 1))
    torch.testing.assert_close(importance, GOLDEN[f"{case}_{mode}_importance"], rtol=3e-6, atol=0)
    torch.testing.assert_close(cv2(importance), GOLDEN[f"{case}_{mode}_cv2_importance"], rtol=1e-5, atol=1e-7)
    if mode == "train0":
        assert routing.load is None
        cv2(importance).backward()
        want = GOLDEN[f"{case}_{mode}_grad_w_gate_aux"]
        torch.testing.assert_close(router.weight.grad, want, atol=2e-5 * float(want.abs().max()), rtol=0)


@pytest.mark.parametrize("form", ["published", "corrected"])
@pytest.mark.parametrize("mode", ["train1", "train3"])
@pytest.mark.parametrize("case", "ABC")
def test_golden_smooth_load(case, mode, form):
    """The load in the published (softmax thresholds) and the corrected (logit thresholds) form, with its gradient."""
    router = golden_router(case, mode, load=form)
    routing = router(GOLDEN[f"{case}_x"][None])
    prefix = f"{case}_{mode}_"
    load = routing.load.sum(0)
    if form == "published":
        torch.testing.assert_close(load, GOLDEN[prefix + "load"], rtol=1e-5, atol=1e-4)
        loss = cv2(load) + cv2(sparse(routing).sum((0, 1)))
        want = GOLDEN[prefix + "grad_w_gate_aux"]
    else:
        torch.testing.assert_close(load, GOLDEN[prefix + "fixed_load"], rtol=1e-5, atol=1e-4)
        loss = cv2(load)
        torch.testing.assert_close(loss, GOLDEN[prefix + "fixed_cv2_load"], rtol=1e-5, atol=1e-6)
        want = GOLDEN[prefix + "fixed_grad_w_gate_cv2_load"]
    loss.backward()
    torch.testing.assert_close(router.weight.grad, want, atol=1e-4 * float(want.abs().max()), rtol=0)


@settings(deadline=None, max_examples=20)
@given(cut=st.integers(0, 6), seed=st.integers(0, 2**31))
def test_noise_belongs_to_the_sample(cut, seed):
    """The same noise for a sample in any split of the batch; none in evaluation."""
    torch.manual_seed(seed)
    x, keys = torch.randn(6, 5, 8, dtype=torch.float64), torch.randint(-(2**62), 2**62, (6,))
    router = Router(8, MoEConfig(experts=4, noise_std=2.0), layer=3).double()
    whole = router(x, keys)
    parts = [router(x[:cut], keys[:cut]), router(x[cut:], keys[cut:])]
    assert torch.equal(whole.indices, torch.cat([p.indices for p in parts]))
    torch.testing.assert_close(whole.weights, torch.cat([p.weights for p in parts]), rtol=1e-12, atol=1e-12)
    other = Router(8, MoEConfig(experts=4, noise_std=2.0), layer=4).double()
    other.weight.data.copy_(router.weight)
    assert not torch.equal(whole.probabilities, other(x, keys).probabilities)
    router.eval()
    assert torch.equal(router(x).probabilities, (x @ router.weight).softmax(-1))


def test_noise_without_keys_says_so():
    with pytest.raises(ValueError, match="keys"):
        Router(8, MoEConfig(experts=4, noise_std=1.0))(torch.randn(1, 2, 8))


def test_top_k_is_checked():
    with pytest.raises(ConfigError, match="top_k"):
        Router(8, MoEConfig(experts=2, top_k=3))


def test_renormalized_weights_sum_to_one_and_z_loss():
    router = Router(8, MoEConfig(experts=4, renormalize=True, z_loss=0.5))
    x = torch.randn(3, 5, 8)
    routing = router(x)
    torch.testing.assert_close(routing.weights.sum(-1), torch.ones(3, 5))
    want = 0.5 * (x @ router.weight).logsumexp(-1).square().mean(1)
    torch.testing.assert_close(routing.z_loss, want)
    assert Router(8, MoEConfig(experts=4))(x).z_loss is None


def test_fp32_under_autocast():
    router = Router(64, MoEConfig(experts=8))
    x = torch.randn(2, 7, 64)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = router(x)
    assert inside.weights.dtype == torch.float32
    assert torch.equal(inside.probabilities, router(x).probabilities)


def test_published_init_range():
    weight = Router(384, MoEConfig(experts=16)).weight
    assert weight.abs().max() <= 0.25 and weight.abs().max() > 0.245
