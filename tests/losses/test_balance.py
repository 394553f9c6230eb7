"""Balance of experts: published values, and the same loss and gradient for any number of ranks."""

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_cl.comm import LocalComm, SimComm
from moe_cl.config import ConfigError
from moe_cl.losses.balance import balance, cv2, expert_sums

GOLDEN = Path(__file__).parents[1] / "golden"


@pytest.mark.parametrize("case", "ABC")
def test_published_sums(case):
    z = np.load(GOLDEN / "crmoe_gate.npz")
    at = f"{case}_train0_"
    weights = torch.from_numpy(z[at + "topk_w"])[None]
    indices = torch.from_numpy(z[at + "topk_idx"])[None]
    sums = expert_sums(indices, weights, z[at + "importance"].shape[0])
    np.testing.assert_allclose(sums[0, 0], z[at + "importance"], rtol=2e-6)
    np.testing.assert_allclose(sums[0, 1], z[at + "load"], rtol=2e-6)
    loss, parts = balance(sums[None, None], LocalComm())
    np.testing.assert_allclose(parts[0, 0], [z[at + "cv2_importance"], z[at + "cv2_load"]], rtol=5e-6, atol=1e-7)
    np.testing.assert_allclose(loss, z[at + "aux_loss"], rtol=5e-6)


def _case(seed, samples, layers=2, views=2, tokens=3, top_k=2, experts=4):
    g = torch.Generator().manual_seed(seed)
    p = torch.rand(layers, views, samples, tokens, experts, generator=g, dtype=torch.float64).softmax(-1)
    return p, top_k, experts


def _loss(p, top_k, experts, comm, statistics):
    w, i = p.topk(top_k)
    layers, views, batch = p.shape[:3]
    sums = torch.stack(
        [
            expert_sums(i[n].flatten(0, 1), w[n].flatten(0, 1), experts).view(views, batch, 2, experts)
            for n in range(layers)
        ]
    )
    return balance(sums, comm, statistics)[0]


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10**6), st.sampled_from(["global", "group: 2", "group: 4", "group: 8", "group: 1"]))
def test_any_world(seed, statistics):
    p, top_k, experts = _case(seed, 8)
    whole = p.clone().requires_grad_()
    expected = _loss(whole, top_k, experts, LocalComm(), statistics)
    expected.backward()
    for world in (2, 4):

        def rank(comm):
            mine = p[:, :, comm.rank :: comm.world].clone().requires_grad_()
            loss = _loss(mine, top_k, experts, comm, statistics)
            loss.backward()
            return loss.item(), mine.grad

        out = SimComm.run(world, rank)
        assert np.mean([loss for loss, _ in out]) == pytest.approx(expected.item(), rel=1e-10, abs=1e-12)
        for r, (_, grad) in enumerate(out):  # ranks are averaged
            torch.testing.assert_close(grad / world, whole.grad[:, :, r::world], rtol=1e-9, atol=1e-12)


def test_published_is_groups_of_a_rank():
    p, top_k, experts = _case(3, 8)
    grouped = _loss(p, top_k, experts, LocalComm(), "group: 4")
    per_rank = SimComm.run(2, lambda c: _loss(p[:, :, c.rank :: 2], top_k, experts, c, "published").item())
    assert np.mean(per_rank) == pytest.approx(grouped.item(), rel=1e-12)


def test_bad_statistics():
    p, top_k, experts = _case(0, 6)
    for wrong in ("group: 4", "group: 0", "local", "group 3"):
        with pytest.raises(ConfigError):
            _loss(p, top_k, experts, LocalComm(), wrong)


def test_balanced_is_zero_and_one_expert_is_zero():
    assert cv2(torch.ones(3, 5)).abs().max() == 0
    assert cv2(torch.full((2, 1), 3.0)).abs().max() == 0
