"""Upcycling: experts are cuts or copies of the dense MLP, and the function is kept where it can be."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from moe_cl.comm import Comm
from moe_cl.config import ConfigError, MoEConfig
from moe_cl.models.build import build_backbone
from moe_cl.models.upcycle import can_upcycle, units, upcycle
from moe_cl.moe.experts import SparseMLP

SIZES = {"dim": 16, "depth": 4, "heads": 4, "patch_size": 8, "img_size": 16}


def pair(**moe):
    dense = build_backbone("vit", **SIZES).double()
    sparse = build_backbone("vit", **SIZES, moe=MoEConfig(blocks="odd", experts=4, top_k=2, **moe)).double()
    return dense, sparse


@pytest.mark.parametrize("ratio", [4.0, 8.0])
def test_renormalised_full_width_experts_keep_the_function(ratio):
    dense, sparse = pair(hidden_ratio=ratio, renormalize=True)
    assert can_upcycle(sparse, dense.state_dict())
    report = upcycle(sparse, dense.state_dict())
    x = torch.randn(3, 3, 16, 16).double()
    torch.testing.assert_close(sparse([x]).features, dense([x]).features, rtol=1e-6, atol=1e-7)
    assert report.fresh == ["blocks.1.mlp.router.weight", "blocks.3.mlp.router.weight"]
    assert len(report.experts) == 8 and "blocks.0.mlp.fc1.weight" in report.copied
    assert set(report.fresh + report.experts + report.copied) == set(sparse.state_dict())


def test_narrow_experts_cover_the_mlp():
    dense, sparse = pair(hidden_ratio=2.0)
    router = sparse.blocks[1].mlp.router.weight.clone()
    upcycle(sparse, dense.state_dict())
    experts, mlp = sparse.blocks[1].mlp.experts, dense.blocks[1].mlp
    assert torch.equal(experts.w1[:2].flatten(0, 1), mlp.fc1.weight)
    assert torch.equal(experts.w1[2:], experts.w1[:2])
    assert torch.equal(torch.cat([experts.w2[0], experts.w2[1]], 1), mlp.fc2.weight)
    assert torch.equal(sparse.blocks[1].mlp.router.weight, router)


@given(st.integers(0, 5), st.integers(1, 40), st.integers(1, 20))
def test_shares_of_a_unit_sum_to_one(expert, hidden, dense):
    index, share = units(expert, hidden, dense)
    total = torch.zeros(dense).index_add_(0, index, share)
    assert torch.allclose(total[index.unique()], torch.ones(len(index.unique())))
    assert len(index.unique()) == min(hidden, dense)


def test_a_rank_fills_its_own_experts():
    dense, whole = pair(hidden_ratio=2.0)
    upcycle(whole, dense.state_dict())
    second = Comm()
    second.rank, second.world = 1, 2
    factory = lambda dim, layer, moe: SparseMLP(dim, moe, layer, second)  # noqa: E731
    moe = MoEConfig(blocks="odd", experts=4, hidden_ratio=2.0)
    half = build_backbone("vit", **SIZES, moe=moe, moe_factory=factory).double()
    upcycle(half, dense.state_dict())
    for name in ("w1", "b1", "w2", "b2"):
        a, b = (getattr(m.blocks[3].mlp.experts, name) for m in (half, whole))
        assert torch.equal(a, b[2:])


def test_errors_say_what_does_not_fit():
    dense, sparse = pair()
    state = dense.state_dict()
    for change, text in (
        ({"norm.weight": None}, "no norm.weight"),
        ({"norm.weight": torch.ones(3)}, r"\(3,\) in the checkpoint"),
        ({"blocks.1.mlp.fc2.bias": None}, "no blocks.1.mlp.fc2.bias"),
        ({"head.weight": torch.ones(3)}, "no place for head.weight"),
    ):
        wrong = {k: v for k, v in (state | change).items() if v is not None}
        with pytest.raises(ConfigError, match=text):
            upcycle(sparse, wrong)
    assert not can_upcycle(dense, state)
